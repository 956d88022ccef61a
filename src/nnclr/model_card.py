"""The README.md of an encoder that is given to others: what it is, what it saw, how good it is, how to load it.

Nothing in it depends on where the files lay: of a path only the name is told.
"""

from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import nnclr
from nnclr.bounded_toml import parse_toml
from nnclr.errors import InputError
from nnclr.run_folder import read_lines

_NOT_TOLD = {"out", "device", "num_workers"}  # settings that say something of the machine and nothing of the weights


def model_card(title: str, config: dict[str, Any], preprocessing: dict[str, Any], run: str | Path | None = None) -> str:
    """The text of a model card.

    Args:
        title: what the encoder is called.
        config: the encoder folder's config.json.
        preprocessing: as `Encoder.preprocessing` gives it.
        run: the run folder that the encoder comes from: its configuration and evaluations are listed.

    Returns:
        Markdown with the Hub's block of facts at its top.

    Raises:
        InputError: if `run` is no run folder, or its records cannot be read.
    """
    facts, architecture = config["nnclr"]["provenance"], config["architecture"]
    settings, evaluations = ({}, []) if run is None else _records(Path(run))
    lines = [
        "---",
        "library_name: timm",
        "tags: [image-feature-extraction, timm, transformers, nnclr, self-supervised]",
        "---",
        f"# {_plain(Path(title).name)}",
        "",
        f"A vision encoder: images to features of {config['num_features']} numbers. Architecture `{architecture}`, "
        "without a classifier, in timm's layout.",
        *_section("What it was trained on", facts),
        *_section("Preprocessing", preprocessing),
        "",
        "Pixels are RGB on the scale of 0 to 1 before mean and std. Another preprocessing gives other, worse features.",
        *_evaluation_table(evaluations),
        *_section("Settings of the training", settings),
        "",
        "## Loading",
        "",
        *_loading(config),
        *_section("Versions that wrote it", versions()),
    ]
    return "\n".join(lines) + "\n"


def without_paths(provenance: dict[str, Any]) -> dict[str, Any]:
    """The same facts with folders cut down to their names."""
    return {key: _name(value) if key in ("data", "checkpoint") else value for key, value in provenance.items()}


def versions() -> dict[str, str]:
    """Versions of what wrote an encoder."""
    others = {name: metadata.version(name) for name in ("torchvision", "timm")}
    return {"nnclr": nnclr.__version__, "torch": torch.__version__} | others


def _section(title: str, values: dict[str, Any]) -> list[str]:
    if not values:
        return []
    rows = [f"| {_plain(name)} | {_plain(_text(value))} |" for name, value in values.items()]
    return ["", f"## {title}", "", "| | |", "|---|---|", *rows]


def _evaluation_table(evaluations: list[dict[str, Any]]) -> list[str]:
    """The latest figure of each kind."""
    latest = {}
    for record in evaluations:
        if not {"protocol", "metric", "test", "parameters", "value", "n_test"} <= record.keys():
            continue  # a line that is not ours
        interval = record.get("interval")
        spread = "" if interval is None else " ({:.1f} to {:.1f})".format(*(100 * v for v in interval))
        parameters = ", ".join(f"{name} {_text(value)}" for name, value in record["parameters"].items())
        what = (record["protocol"], record["metric"], _name(record["test"]), parameters)
        latest[what] = (f"{100 * record['value']:.1f} %{spread}", record["n_test"])
    if not latest:
        return []
    rows = [
        f"| {protocol} | {_plain(metric)} | {value} | {_plain(test)}, {n} images | {_plain(parameters)} |"
        for (protocol, metric, test, parameters), (value, n) in latest.items()
    ]
    head = ["| protocol | metric | value (95 % interval) | scored on | parameters |", "|---|---|---|---|---|"]
    return ["", "## Evaluations", "", *head, *rows]


def _loading(config: dict[str, Any]) -> list[str]:
    known = "/" not in config["architecture"] and ":" not in config["architecture"]
    blocks = ["With nnclr:", "", "```python", "import nnclr", ""]
    blocks += ['encoder = nnclr.Encoder.from_pretrained("FOLDER")  # or OWNER/NAME on the Hub']
    blocks += ['features = encoder.embed("PHOTOS")  # (n, d) float32', "```"]
    if known:
        blocks += ["", "With timm (from the Hub: `hf-hub:OWNER/NAME`):", "", "```python", "import timm", ""]
        blocks += ['model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()']
        blocks += ["transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))", "```"]
        blocks += ["", "With transformers:", "", "```python", "from transformers import AutoImageProcessor, AutoModel"]
        blocks += ["", 'processor = AutoImageProcessor.from_pretrained("FOLDER")']
        blocks += ['model = AutoModel.from_pretrained("FOLDER").eval()']
        blocks += ['features = model(**processor(image, return_tensors="pt")).pooler_output', "```"]
    return blocks


def _records(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings and the evaluations of a run folder."""
    try:
        settings = parse_toml((run / "config.toml").read_bytes())
        told = {name: value for name, value in settings.items() if name not in _NOT_TOLD}
        for name in ("data", "test_data"):
            if name in told:
                told[name] = _name(told[name])
        return told, read_lines(run / "evaluations.jsonl")[0]
    except (OSError, ValueError) as error:
        raise InputError(f"{run} is no run folder with a config.toml that can be read ({error})") from error


def _name(value: Any) -> Any:
    """The last part of a path, of each path in a list, or of a source's name that joins several."""
    if isinstance(value, list):
        return [_name(part) for part in value]
    return ", ".join(Path(part).name or part for part in value.split(", ")) if isinstance(value, str) else value


def _text(value: Any) -> str:
    return ", ".join(map(_text, value)) if isinstance(value, (list, tuple)) else str(value)


def _plain(text: Any) -> str:
    """Text that cannot break out of a cell of a table."""
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")

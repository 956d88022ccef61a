"""The parts of the documents that are written from the code and from the records, never by hand.

    python -m tests.test_docs

A part stands between `<!-- KIND: NAME -->` and `<!-- end -->`; the kinds are those of `PARTS`. The presets page and the
table of the configuration are written as a whole.
"""

import ast
import dataclasses
import inspect
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch
import tyro

from benchmarks.learning import cell
from nnclr import config, options
from nnclr.config import Config
from nnclr.objectives import OBJECTIVES

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- ([a-z]+): ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
PAGE_OF = {"evaluate": "evaluation"}  # where a command's page has another name
TABLE = "from the fields of Config -->\n", "<!-- end -->"


def texts():
    """Path -> what it should hold, of every page with a part that is written."""
    pages = {path: path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
    pages = {path: rewritten(text) for path, text in pages.items() if BLOCK.search(text)}
    path = ROOT / "docs/configuration.md"
    before, rest = path.read_text().split(TABLE[0])
    pages[path] = before + TABLE[0] + configuration_table() + TABLE[1] + rest.split(TABLE[1])[1]
    pages[ROOT / "docs/presets.md"] = presets_page()
    return pages


def rewritten(text):
    """The page with its parts as they should be today; KeyError for an unknown kind or name."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{PARTS[match[2]](match[3])}\n\n{match[4]}", text)


def table(header, rows):
    top = "|" + "|".join(f" {title} " if title else " " for title in header) + "|"
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([top, "|---" * len(header) + "|", *lines])


# ---- the command line --------------------------------------------------------------------------------------


def verbs():
    """Verb -> the dataclass of what it takes, in the order of `nnclr --help`."""
    kinds = [kind for kind in vars(options).values() if dataclasses.is_dataclass(kind)]
    by_name = {kind.__name__.lower(): kind for kind in kinds}
    return {"demo": by_name.pop("demo"), "pretrain": Config, **by_name}


def explained(kind):
    """Field -> the docstring below it."""
    body = ast.parse(inspect.getsource(kind)).body[0].body
    return {
        node.target.id: " ".join(after.value.value.split())
        for node, after in pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }


def written(field, hint):
    """How an option stands on the command line: a word in its place, or the flags for it."""
    extras = getattr(hint, "__metadata__", ())
    made = next((extra for extra in extras if hasattr(extra, "metavar")), None)
    name = getattr(made, "name", None) or field.name.replace("_", "-")
    if tyro.conf.Positional in extras:
        return [getattr(made, "metavar", None) or name.upper()]
    if field.default is True:
        return [f"--no-{name}"]
    return [*(getattr(made, "aliases", None) or ()), f"--{name}"]


def flags(verb):
    """What a verb takes, as a table."""
    kind, rows = verbs()[verb], []
    hints, meaning = get_type_hints(kind, include_extras=True), explained(kind)
    for field in dataclasses.fields(kind):
        text = meaning[field.name]
        if field.default is True:
            text = f"Do not: {text[0].lower()}{text[1:]}"
        if get_origin(hints[field.name]) is Literal:
            text += f" One of {', '.join(f'`{choice}`' for choice in get_args(hints[field.name]))}."
        default = "" if field.default in (None, True, False, ()) else f"`{field.default}`"
        default = "required" if field.default is dataclasses.MISSING else default
        rows.append([", ".join(f"`{word}`" for word in written(field, hints[field.name])), default, text])
    return table(["argument", "default", "meaning"], rows)


def list_of_verbs(_):
    """Every verb, what it says of itself, and its page."""
    rows = []
    for verb, kind in verbs().items():
        said = "Train a backbone without labels; the same command goes on with a run."
        if kind is not Config:
            said = " ".join(inspect.cleandoc(kind.__doc__).split("\n\n")[0].split())
        rows.append([f"[`nnclr {verb}`]({PAGE_OF.get(verb, verb)}.md)", said])
    return table(["command", "what it does"], rows)


# ---- the configuration -------------------------------------------------------------------------------------


def configuration_table():
    rows, meaning = [], explained(Config)
    for field in dataclasses.fields(Config):
        shown = "" if field.default in (None, dataclasses.MISSING) else f"`{field.default}`"
        star = "*" if field.name in config.RESUME_MAY_CHANGE else ""
        rows.append([f"`{field.name}`{star}", shown, meaning[field.name]])
    return "\n" + table(["setting", "default", "meaning"], rows) + "\n\n"


def presets_page():
    """What each recipe says of itself in its first comments, and its main settings."""
    lines = [
        "# Presets\n",
        "Written by `python -m tests.test_docs` from `src/nnclr/presets/`.",
        "Use: `nnclr pretrain DATA --out RUN --preset NAME`. Every flag beside it wins over it; `--dry-run` shows what",
        "a run would be. Expected figures are those of the sources, measured by their code.",
    ]
    for name in config.presets():
        text = (Path(config.__file__).parent / "presets" / f"{name}.toml").read_text()
        said = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
        made = config.load_preset(name)
        keys = ("backbone", "image_size", "epochs", "batch_size", "optimizer", "learning_rate", "augmentation")
        shown = ", ".join(f"{key} {made[key]}" for key in keys if key in made)
        lines.append(f"\n## {name}\n\n" + "\n".join(said) + f"\n\n`{shown}`")
    return "\n".join(lines) + "\n"


# ---- the methods -------------------------------------------------------------------------------------------


def method_settings(name):
    """The fields of the config that a method takes, with the default of a run and that of its class."""
    kind = OBJECTIVES[name]
    own = inspect.signature(kind).parameters
    meaning, rows = explained(Config), []
    for field in (f for f in dataclasses.fields(Config) if f.name in kind.settings):
        of_class = own[field.name].default
        of_run = f"`{of_class if field.default is None else field.default}`"
        if field.name == "support_set_size":
            of_run = "half of the images, at most `98304`"
        elif of_class is None:
            of_run = "none"
        rows.append([f"`{field.name}`", of_run, "none" if of_class is None else f"`{of_class}`", meaning[field.name]])
    return table(["setting", "default of a run", "default of the class", "meaning"], rows) if rows else "None."


def small(name, **settings):
    """A method with few weights."""
    sizes = {"embedding_dim": 8, "projector_hidden_dim": 8, "predictor_hidden_dim": 8, "support_set_size": 64}
    sizes |= {"prototypes": 4, "swav_queue_size": 8, "labels": torch.arange(3), **settings}
    kind = OBJECTIVES[name]
    return kind(8, **{key: value for key, value in sizes.items() if key in kind.settings})


def facts(name):
    """What the loop does for a method, and what a checkpoint holds of it."""
    made = small(name)
    turns = ", rising to 1 over the run" if made.momentum_to_one else ", constant"
    optional = made.momentum is None and "ema_momentum" in made.settings
    rows = [
        ["small views of multi-crop", "taken" if made.multi_crop else "refused"],
        ["labels in training", {"nnclr": "only the oracle", "supervised": "yes"}.get(name, "none")],
        ["averaged backbone", "none" if made.momentum is None else f"momentum {made.momentum}{turns}"],
    ]
    if optional:
        rows[-1][1] = f"with `ema_momentum`, {turns[2:]}"
        made = small(name, ema_momentum=0.9)
    kept = dict.fromkeys(f"`objective.{key.partition('.')[0]}`" for key in made.state_dict())
    kept |= {} if made.momentum is None else {"`average`": None}
    added = {"`objective.average_projector`", "`average`"} if optional else set()
    shown = [f"{key} (with `ema_momentum`)" if key in added else key for key in kept]
    rows.append(["in a checkpoint, beside backbone and optimiser", ", ".join(shown)])
    return table(["", ""], rows)


def result(name):
    """What a method reached in docs/results/methods.json, beside the references there."""
    record = json.loads((ROOT / "docs/results/methods.json").read_text())
    rows = []
    for method in dict.fromkeys(["raw pixels", "untrained", name, "nnclr", "simclr", "supervised"]):
        found = [row for row in record["rows"] if row["method"] == method]
        shown = f"**{method}**" if method == name else method
        rows.append([shown, len(found), *(cell([row["values"][m] for row in found]) for m in ("kNN", "linear"))])
    return (
        f"On the demo's {record['images']} patches, 6 epochs, one recipe for every method; test accuracy in %, mean\n"
        "over seeds, lowest and highest in brackets.\n\n" + table(["", "seeds", "kNN", "linear"], rows)
    )


PARTS = {"flags": flags, "verbs": list_of_verbs, "settings": method_settings, "facts": facts, "result": result}

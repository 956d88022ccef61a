"""What the documents say is what the package does."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmarks import lines

from nnclr import cli, config, errors, evaluation, objectives
from nnclr.data.transfer_sets import TRANSFER_SETS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
START, END = "from the fields of Config -->\n", "<!-- end -->"


def configuration_table():
    source = Path(config.__file__).read_text()
    body = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Config").body
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    defaults = {field.name: field.default for field in dataclasses.fields(config.Config)}
    for number, node in enumerate(body):
        if isinstance(node, ast.AnnAssign):
            name, default = node.target.id, defaults[node.target.id]
            shown = "" if default is None or default is dataclasses.MISSING else f"`{default}`"
            star = "*" if name in config.RESUME_MAY_CHANGE else ""
            lines.append(f"| `{name}`{star} | {shown} | {body[number + 1].value.value} |")
    return "\n" + "\n".join(lines) + "\n\n"


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


def test_presets_page_is_that_of_the_presets():
    assert (ROOT / "docs/presets.md").read_text() == presets_page(), "run python -m tests.test_docs"


def test_configuration_page_is_the_dataclass():
    text = (ROOT / "docs/configuration.md").read_text()
    assert text.split(START)[1].split(END)[0] == configuration_table(), "run python -m tests.test_docs"


def test_every_flag_in_the_documents_exists():
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(config.Config)}
    flags |= {
        "--" + field.name.replace("_", "-")
        for kind in (cli.Demo, cli.Evaluate, cli.Compare)
        for field in dataclasses.fields(kind)
    }
    for page in PAGES:
        for command in re.findall(
            r"^\s*nnclr (?:pretrain|evaluate|demo|compare).*(?:\\\n.*)*", page.read_text(), re.MULTILINE
        ):
            for flag in re.findall(r"--[a-z][a-z-]*", command):
                assert flag in flags, f"{page.name}: {flag}"


def test_every_link_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_exit_codes_page_lists_every_error():
    text = (ROOT / "docs/exit-codes.md").read_text()
    codes = {kind.exit_code for kind in errors.NNCLRError.__subclasses__()}
    assert codes == {2, 80, 81, 82, 83, 84, 86}
    assert all(f"\n| {code} |" in text for code in codes | {0, 1, 130})


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md", "docs/methods.md", "docs/evaluation.md"])
def test_python_examples_run(page, tmp_path, monkeypatch):
    """The examples, on a small folder that stands where they expect one."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / "photos" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    names = {"__name__": "example"}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_a_method_of_ones_own_is_one_file(tmp_path):
    """The example of docs/methods.md as a file beside the user, named on the command line, stopped by nothing."""
    page = (ROOT / "docs/methods.md").read_text()
    block = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "(Objective)" in block)
    assert len(block.splitlines()) <= 40
    (tmp_path / "mean_of_three.py").write_text(block)
    flags = "--backbone small-convnet --image-size 32 --batch-size 64 --epochs 0.1 --optimizer adamw --device cpu"
    own = ["--objective", "mean_of_three:MeanOfThree", "--support-set-size", "100", "--embedding-dim", "16"]
    command = [str(Path(sys.executable).with_name("nnclr")), "pretrain", "demo-photos", "--out", "run", *flags.split()]
    answer = subprocess.run([*command, *own], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert 'objective = "mean_of_three:MeanOfThree"' in (tmp_path / "run/config.toml").read_text()
    again = subprocess.run([*command, *own], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "it is finished" in again.stdout
    wrong = subprocess.run(
        [*command, *own, "--use-predictor", "False"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (wrong.returncode, "use_predictor=False is no setting of mean_of_three:MeanOfThree" in wrong.stderr) == (
        2,
        True,
    )


def test_every_method_has_its_row():
    page = (ROOT / "docs/methods.md").read_text()
    assert set(re.findall(r"^\| \[`([a-z0-9-]+)`\]", page, re.MULTILINE)) == set(objectives.OBJECTIVES) - own_names()


def test_line_numbers_are_those_of_today():
    page = ROOT / lines.PAGE
    assert lines.renumbered(page.read_text(), page) == page.read_text(), "run python -m benchmarks.lines"
    moved = page.read_text().replace("#L", "#L1", 1)  # control
    assert lines.renumbered(moved, page) == page.read_text() != moved
    with pytest.raises(KeyError):
        lines.renumbered("[`NoSuchName`](../src/nnclr/optim.py#L1)", page)


def test_evaluation_page_lists_every_protocol_and_transfer_set():
    page = (ROOT / "docs/evaluation.md").read_text()
    assert set(re.findall(r"^\| `([a-z][a-z-]+)` \|", page, re.MULTILINE)) == set(evaluation.PROTOCOLS)
    rows = re.findall(r"^\| (.+) \(`(\w+)`\) \| `(.+)` \| (.+) \| (\d+) / (\d+) / (\d+) \|$", page, re.MULTILINE)
    for row, known in zip(rows, TRANSFER_SETS.values(), strict=True):
        sizes = tuple(map(int, row[4:]))
        assert (*row[:4], sizes) == (known.title, known.key, known.folders[0], known.metric, known.sizes)


def own_names():
    """What other tests of this process have trained under MODULE:CLASS."""
    return {name for name in objectives.OBJECTIVES if ":" in name}


if __name__ == "__main__":
    path = ROOT / "docs/configuration.md"
    before, rest = path.read_text().split(START)
    path.write_text(before + START + configuration_table() + END + rest.split(END)[1])
    (ROOT / "docs/presets.md").write_text(presets_page())

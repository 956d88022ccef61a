"""What the documents say is what the package does."""

import ast
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from nnclr import cli, config, errors

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


def test_configuration_page_is_the_dataclass():
    text = (ROOT / "docs/configuration.md").read_text()
    assert text.split(START)[1].split(END)[0] == configuration_table(), "run python -m tests.test_docs"


def test_every_flag_in_the_documents_exists():
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(config.Config)}
    flags |= {
        "--" + field.name.replace("_", "-") for kind in (cli.Demo, cli.Evaluate) for field in dataclasses.fields(kind)
    }
    for page in PAGES:
        for command in re.findall(r"^\s*nnclr (?:pretrain|evaluate|demo).*(?:\\\n.*)*", page.read_text(), re.MULTILINE):
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


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md"])
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
    for block in blocks:
        exec(compile(block, page, "exec"), {})


if __name__ == "__main__":
    path = ROOT / "docs/configuration.md"
    before, rest = path.read_text().split(START)
    path.write_text(before + START + configuration_table() + END + rest.split(END)[1])

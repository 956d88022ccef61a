"""What the documents say is what the package does."""

import re
import shlex
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tyro
import yaml
from benchmarks import lines, pages, site
from pathspec import GitIgnoreSpec

import nnclr
from nnclr import cli, errors, evaluation, objectives, training
from nnclr.config import make_config
from nnclr.data.transfer_sets import TRANSFER_SETS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
WITH_PYTHON = [str(page.relative_to(ROOT)) for page in PAGES if "```python" in page.read_text()]


# ---- written parts -----------------------------------------------------------------------------------------


def test_what_is_written_from_the_code_is_that_of_today():
    """Flags of every command, settings and figures of every method, the configuration, the presets."""
    for path, text in pages.texts().items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)}: run python -m tests.test_docs"
    old = (DOCS / "methods/byol.md").read_text().replace("| `0.996` | `0.996` |", "| `0.9` | `0.9` |")  # control
    assert pages.rewritten(old) == (DOCS / "methods/byol.md").read_text() != old
    with pytest.raises(KeyError):
        pages.rewritten("<!-- flags: no-such-command -->\n<!-- end -->")


def test_no_part_is_forgotten():
    """A marker that is misspelt would be left as it is, and what stands in it would grow old."""
    for page in PAGES:
        text = page.read_text()
        markers = re.findall(r"<!-- (?!end|table: written)", text)
        assert len(markers) == len(pages.BLOCK.findall(text)), page.name
    assert len(pages.BLOCK.findall("<!-- Flags: demo -->\n<!-- end -->")) == 0  # control: this one would be found


@pytest.mark.parametrize("name", [name for name in objectives.OBJECTIVES if ":" not in name])
def test_every_method_has_its_page_and_its_row(name):
    text = (DOCS / f"methods/{name}.md").read_text()
    assert {(kind, of) for _, kind, of, _ in pages.BLOCK.findall(text)} == {
        (kind, name) for kind in ("settings", "facts", "result")
    }
    own = set(objectives.OBJECTIVES[name].settings) - {"labels"}
    table = text.split("## Settings")[1].split("<!-- end -->")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == own
    assert f"](../../src/{objectives.OBJECTIVES[name].__module__.replace('.', '/')}.py)" in text
    rows = re.findall(r"^\| \[`([a-z0-9-]+)`\]\(methods/\1\.md\)", (DOCS / "methods.md").read_text(), re.MULTILINE)
    assert rows.count(name) == 1


def test_every_command_has_its_page(capsys):
    assert cli.main(["no-such-command"]) == 2
    named = re.search(r"there are (.*)\n", capsys.readouterr().err)[1].split(", ")
    assert set(named) == set(pages.verbs())
    for verb in set(named) - {"pretrain"}:  # whose flags are the configuration
        page = DOCS / f"{pages.PAGE_OF.get(verb, verb)}.md"
        assert page.is_file(), verb
        assert f"<!-- flags: {verb} -->" in page.read_text(), page.name


def test_flags_are_those_of_the_command_line(capsys):
    """The tables against `--help`, which tyro makes from the same dataclasses by its own rules."""
    for verb, kind in pages.verbs().items():
        if verb == "pretrain":
            continue
        with pytest.raises(SystemExit):
            tyro.cli(kind, args=["--help"])
        helped = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", capsys.readouterr().out)) - {"--help"}
        shown = set(re.findall(r"^\| (?:`-\w`, )?`(--[a-z-]+)", pages.flags(verb), re.MULTILINE))
        assert shown <= helped, verb
        assert {flag.replace("--no-", "--", 1) for flag in shown} == {flag.replace("--no-", "--", 1) for flag in helped}


def test_line_numbers_are_those_of_today():
    for page in DOCS.rglob("*.md"):
        assert lines.renumbered(page.read_text(), page) == page.read_text(), "run python -m benchmarks.lines"
    page = DOCS / "methods/nnclr.md"
    moved = page.read_text().replace("#L", "#L1", 1)  # control
    assert lines.renumbered(moved, page) == page.read_text() != moved
    with pytest.raises(KeyError):
        lines.renumbered("[`NoSuchName`](../../src/nnclr/optim.py#L1)", page)


def test_exit_codes_page_lists_every_error():
    text = (DOCS / "exit-codes.md").read_text()
    codes = {kind.exit_code for kind in errors.NNCLRError.__subclasses__()}
    assert codes == {2, 80, 81, 82, 83, 84, 85, 86, 87}
    assert all(f"\n| {code} |" in text for code in codes | {0, 1, 130})


def test_evaluation_page_lists_every_protocol_and_transfer_set():
    page = (DOCS / "evaluation.md").read_text()
    table = page.split("## The protocols")[1].split("## ")[0]
    assert set(re.findall(r"^\| `([a-z][a-z-]+)` \|", table, re.MULTILINE)) == set(evaluation.PROTOCOLS)
    rows = re.findall(r"^\| (.+) \(`(\w+)`\) \| `(.+)` \| (.+) \| (\d+) / (\d+) / (\d+) \|$", page, re.MULTILINE)
    for row, known in zip(rows, TRANSFER_SETS.values(), strict=True):
        sizes = tuple(map(int, row[4:]))
        assert (*row[:4], sizes) == (known.title, known.key, known.folders[0], known.metric, known.sizes)


def undocumented(project, page):
    """What pyproject.toml asks for and the page does not say: core with its floors, extras with what they bring."""
    rows = [line[2:].split(" | ", 1) for line in page.splitlines() if line.startswith("| ")]
    said = {name.strip("`"): rest for name, rest in rows}
    for one in project["dependencies"]:
        if one.replace(">=", " >= ") not in said:
            yield one
    for extra, brings in project["optional-dependencies"].items():
        for name in (re.split(r"[>\[]", one)[0] for one in brings):
            if name != "nnclr" and name not in said.get(extra, ""):
                yield f"{extra}: {name}"


def test_dependencies_page_lists_what_is_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (DOCS / "dependencies.md").read_text()
    assert list(undocumented(project, page)) == []
    changed = page.replace("safetensors >= 0.8", "safetensors >= 0.5").replace("| `hub` |", "| `hubs` |")  # control
    assert list(undocumented(project, changed.replace("webdataset", ""))) == [
        "safetensors>=0.8",
        "hub: datasets",
        "dev: webdataset",
    ]


def test_readme_says_how_to_install_before_it_uses_the_command():
    text = (ROOT / "README.md").read_text()
    assert 0 < text.find("`make install`") < text.find("nnclr pretrain")
    assert 0 < text.find("`pip install -e .`") < text.find("nnclr pretrain")
    assert "\ninstall: " in (ROOT / "Makefile").read_text()


def test_api_pages_hold_every_public_name():
    shown = re.findall(r"^::: [\w.]+\.(\w+)$", (DOCS / "api/use.md").read_text(), re.MULTILINE)
    shown += re.findall(r"^::: [\w.]+\.(\w+)$", (DOCS / "api/parts.md").read_text(), re.MULTILINE)
    assert set(nnclr.__all__) <= set(shown)
    assert len(shown) == len(set(shown))
    listed = (DOCS / "api/index.md").read_text()
    assert all(f"[`{name}`]" in listed for name in nnclr.__all__)


# ---- commands and examples ---------------------------------------------------------------------------------


def commands(text):
    """The `nnclr` commands of a page's code blocks, each as a list of words."""
    for block in re.findall(r"^```(?:\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"\s*nnclr [a-z]", line) and not re.search(r"\.\.\.|\[-|, ", line):
                yield shlex.split(line, comments=True)[1:]


def wrong_command(words, monkeypatch):
    """What the command line, or the configuration, would refuse in a command; None where it is well-formed."""
    verb, *arguments = words
    try:
        if verb != "pretrain":
            tyro.cli(pages.verbs()[verb], args=arguments, console_outputs=False)
            return None
        with monkeypatch.context() as patch:
            patch.setattr(training, "pretrain", lambda data, out, **given: make_config(data, out, **given))
            patch.setattr(cli, "_print_dry_run", lambda given: make_config(**{"out": "unused"} | given))
            cli.pretrain(arguments)
    except (SystemExit, KeyError, errors.NNCLRError) as error:
        return repr(error)
    return None


def test_every_command_in_the_documents_is_accepted(monkeypatch, tmp_path, capsys):
    """Flags exist, values have their types, settings belong to the method, presets are there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-recipe.toml").write_text("epochs = 3\n")
    found = [(page.name, words) for page in PAGES for words in commands(page.read_text())]
    assert {words[0] for _, words in found} >= set(pages.verbs())
    for page, words in found:
        assert wrong_command(words, monkeypatch) is None, f"{page}: nnclr {shlex.join(words)}"
    for text in (
        "pretrain PHOTOS --out RUN --batchsize 3",
        "pretrain PHOTOS --out RUN --batch-size many",
        "pretrain PHOTOS --out RUN --objective byol --use-predictor False",
        "pretrain PHOTOS --out RUN --preset no-such-recipe",
        "evaluate RUN PHOTOS --protocol psychic",
        "embed RUN PHOTOS",
        "imagine RUN",
    ):
        assert wrong_command(text.split(), monkeypatch) is not None, text


def test_every_flag_named_in_a_sentence_exists():
    known = {"--dry-run", "--help", "--version"}
    for verb, kind in pages.verbs().items():
        known |= {f"--{name.replace('_', '-')}" for name in kind.__dataclass_fields__}
        known |= set() if verb == "pretrain" else set(re.findall(r"`(--[a-z-]+)`", pages.flags(verb)))
    foreign = {
        "--require-hashes",
        "--seeds",
        "--data",
        "--strict",
        "--max-restarts",
        "--signals-to-handle",
        "--local-addr",
        "--minutes",
        "--seed",
        "--rdzv-conf",
    }  # of other programs
    for page in DOCS.rglob("*.md"):
        for code in re.findall(r"`([^`\n]*--[a-z][^`\n]*)`", page.read_text()):
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", code):
                assert flag in known | foreign, f"{page.name}: {flag}"


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A small folder that stands where the examples expect one; a picture of it is broken, as in most real ones."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / "photos" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "photos" / "a" / "broken.png").write_bytes(b"no picture")
    return tmp_path


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_examples_run(page, photos):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    names = {"__name__": "example"}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_sweep_examples_are_read(tmp_path):
    from nnclr.sweep import read_spec

    for page in ("sweep.md", "methods.md"):
        (tmp_path / "spec.toml").write_text(re.findall(r"```toml\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)[0])
        spec = read_spec(tmp_path / "spec.toml")
        for cell in spec.cells():
            make_config(spec.data, "unused", spec.preset, **spec.settings, **cell)


def test_a_method_of_ones_own_is_one_file(tmp_path, monkeypatch, capsys):
    """The example of docs/methods.md as a file beside the user, named on the command line, stopped by nothing."""
    page = (DOCS / "methods.md").read_text()
    block = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "(Objective)" in block)
    assert len(block.splitlines()) <= 40
    (tmp_path / "mean_of_three.py").write_text(block)
    own = "--objective mean_of_three:MeanOfThree --support-set-size 100 --embedding-dim 16".split()
    flags = "--backbone small-convnet --image-size 32 --batch-size 64 --epochs 0.1 --optimizer adamw --device cpu"
    arguments = ["pretrain", "demo-photos", "--out", "run", *flags.split(), "--evaluate-every-epochs", "0", *own]
    command = [str(Path(sys.executable).with_name("nnclr")), *arguments]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert 'objective = "mean_of_three:MeanOfThree"' in (tmp_path / "run/config.toml").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert cli.main(arguments) == 0
    assert "it is finished" in capsys.readouterr().out
    assert cli.main([*arguments, "--use-predictor", "False"]) == 2
    assert "use_predictor=False is no setting of mean_of_three:MeanOfThree" in capsys.readouterr().err


# ---- links and the site ------------------------------------------------------------------------------------


def anchors(text):
    """The anchors of a page's headings, where a file viewer and the site agree on them."""
    found = set()
    for title in re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    ):
        plain = re.sub(r"[^\w\s-]", "", title).strip().lower()
        if plain.replace(" ", "-") == re.sub(r"[-\s]+", "-", plain):
            found.add(plain.replace(" ", "-"))
    return found


def broken_links(page, text):
    """Links to files that are not there, and to headings that are not in them."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        if "://" in target:
            continue
        path = page.parent / target if target else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path.read_text())):
            yield f"{page.relative_to(ROOT)}: {target}#{anchor}"


def test_every_link_leads_somewhere():
    assert [broken for page in PAGES for broken in broken_links(page, page.read_text())] == []
    page = DOCS / "index.md"
    assert list(broken_links(page, "[a](faq.md) [b](../README.md) [c](faq.md#its-not-there) [d](no.md) [e](#no)")) == [
        "docs/index.md: faq.md#its-not-there",
        "docs/index.md: no.md#",
        "docs/index.md: #no",
    ]


def settings():
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def leaves(nav):
    """The pages of a navigation, in order."""
    for entry in nav:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from leaves(value) if isinstance(value, list) else [value]


def orphans(names, nav, excluded):
    return sorted(
        set(names) - set(leaves(nav)) - set(GitIgnoreSpec.from_lines(excluded.splitlines()).match_files(names))
    )


def test_every_page_is_in_the_navigation():
    names = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    nav, excluded = settings()["nav"], settings()["exclude_docs"]
    assert orphans(names, nav, excluded) == []
    assert orphans([*names, "forgotten.md"], nav, excluded) == ["forgotten.md"]  # control
    assert sorted(set(leaves(nav)) - set(names)) == []
    assert len(list(leaves(nav))) == len(set(leaves(nav)))
    left_out = GitIgnoreSpec.from_lines(excluded.splitlines()).match_files(names)
    assert all(not (DOCS / name).read_text().startswith("# ") for name in left_out)  # parts of other pages


def test_source_links_become_text_on_the_site():
    made = site.without_source_links
    assert made("[`x`](../src/a.py#L1) [p](b.md) ![i](../i.png)", "a.md") == "`x` [p](b.md) ![i](../i.png)"
    assert made("[p](../methods.md) [`x`](../../src/a.py)", "methods/byol.md") == "[p](../methods.md) `x`"
    assert made("[a [b]](../README.md), [c](https://d)", "a.md") == "a [b], [c](https://d)"


class Requests(HTMLParser):
    """What a browser fetches for a page by itself: everything but the targets of <a>."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "srcset", "poster", "data") or (name == "href" and tag != "a") or name == "style":
                self.found.append(value or "")

    def handle_data(self, text):
        self.found += re.findall(r"url\([^)]*\)|@import[^;]*", text)


def foreign_requests(text):
    parser = Requests()
    parser.feed(text)
    return [value for value in parser.found if re.search(r"(?<![\w.])//|https?:", value) and "w3.org" not in value]


def build(config, out):
    """Exit status and messages of a strict build; with --quiet mkdocs would not count its warnings."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(out)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return answer.returncode, answer.stdout + answer.stderr


def test_a_mistake_stops_the_build(tmp_path):
    """The control of the next test: the same settings, on one page."""
    (tmp_path / "docs").mkdir()
    own = f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\nplugins: []\nhooks: []\nnav: [index.md]\n"
    (tmp_path / "mkdocs.yml").write_text(own)
    for text, status in (("# A\n[b](#a)", 0), ("# A\n[b](#c)", 1), ("# A\n[b](c.md)", 1)):
        (tmp_path / "docs/index.md").write_text(text)
        assert build(tmp_path / "mkdocs.yml", tmp_path / "site")[0] == status, text
    (tmp_path / "docs/orphan.md").write_text("# B")
    (tmp_path / "docs/index.md").write_text("# A")
    assert "orphan.md" in build(tmp_path / "mkdocs.yml", tmp_path / "site")[1]


def test_the_site_builds_without_a_warning_and_asks_no_other_host(tmp_path):
    status, said = build(ROOT / "mkdocs.yml", tmp_path)
    assert status == 0, said
    files = list(tmp_path.rglob("*.html"))
    assert len(files) > 40
    for file in files:
        text = file.read_text()
        assert foreign_requests(text) == [], file
        assert 'class="mermaid"' not in text, "its script would come from another host"
    for file in tmp_path.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", file.read_text()), file
    control = '<a href="https://x"></a><script src="//cdn.x/a.js"></script><link href="https://fonts.x/b">'
    assert len(foreign_requests(control + '<style>@import "http://c";</style>')) == 3
    text = (tmp_path / "api/use.html").read_text()  # docstrings, signatures and the comments of fields are there
    assert all(part in text for part in ("Encoder", "every parameter of the protocol", "if the data cannot be opened"))


if __name__ == "__main__":
    for path, text in pages.texts().items():
        path.write_text(text)

"""Every ablation of the paper at a scale that two cores can run.

    python -m benchmarks.ablations
    python -m benchmarks.ablations queue-size predictor

Each SPEC in `benchmarks/ablations/` is run by `nnclr sweep` (finished runs in runs/ablations/ are read, not trained
again); tables, plots and records go to docs/results/ablations/, and its README.md is written from the records there.
"""

import argparse
import json
import shutil
from pathlib import Path

from nnclr.sweep import run_sweep

SPECS = Path("benchmarks/ablations")
RESULTS = Path("docs/results/ablations")
HEAD = """# Ablations

Written by `python -m benchmarks.ablations`. kNN accuracy in % (k = 20, temperature 0.07) on the test images of the
demo's data, after its 6 epochs; mean and 95 % interval by Student's t over the seeds. Every run is the preset `demo`
but for what its table varies, and can be trained by `nnclr sweep SPEC`.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in SPECS.glob("*.toml"))
    parser.add_argument("names", nargs="*", default=names, metavar="NAME", help=f"of {', '.join(names)}; default all")
    for name in parser.parse_args().names:
        out = Path("runs/ablations") / name
        run_sweep(SPECS / f"{name}.toml", out)
        RESULTS.mkdir(parents=True, exist_ok=True)
        for made, ending in (("table.md", "md"), ("plot.png", "png"), ("results.json", "json")):
            shutil.copyfile(out / made, RESULTS / f"{name}.{ending}")
        render(names)


def render(names):
    """Write the page that shows all tables from the files beside it."""
    parts = [HEAD]
    for name in names:
        if (RESULTS / f"{name}.json").exists():
            spec = json.loads((RESULTS / f"{name}.json").read_text())["spec"]
            title = spec.splitlines()[0].removeprefix("# ")
            said, _, table = (RESULTS / f"{name}.md").read_text().partition("\n\n")
            where = said.partition(f"({name}.toml), ")[2].strip()
            link = f"[SPEC](../../../{SPECS}/{name}.toml)"
            parts += [f"## {name}\n\n{title} {link}\n\n{table.strip()}\n\n{where}\n\n![{name}]({name}.png)\n"]
    notes = RESULTS / "notes.md"
    parts += [notes.read_text()] if notes.exists() else []
    (RESULTS / "README.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()

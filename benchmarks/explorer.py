"""How the explorer behaves with 100,000 pictures: start, click to neighbours, bytes, frames.

    python -m benchmarks.explorer                   # measures; minutes, most of them UMAP
    python -m benchmarks.explorer --render          # prints the section of docs/benchmarks.md

The embeddings are synthetic: groups on a sphere in 256 dimensions, written by `write_embeddings`. The start is that of
a process of its own, without and with the kept map; the browser is Chromium without a GPU, so that a frame is drawn by
the processor and a real graphics card is quicker.
"""

import argparse
import http.client
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from nnclr.embeddings import write_embeddings
from nnclr.evaluation.result import versions

RESULT = Path("docs/results/explorer.json")
N, DIMS, GROUPS = 100_000, 256, 60
FLAGS = (
    "--no-sandbox --use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
SERVE = (
    "import sys; from nnclr.explorer import explore; "
    "explore([sys.argv[1]], port=0, open_browser=False, say=lambda line: print(line, flush=True))"
)
# Milliseconds between frames while the map is dragged for three seconds.
PAN = """async () => {
  const times = [], { map } = explorer;
  await new Promise((done) => {
    const step = (now) => {
      times.push(now);
      map.pan(4 * Math.cos(times.length / 9), 4 * Math.sin(times.length / 9));
      if (now - times[0] < 3000) requestAnimationFrame(step); else done();
    };
    requestAnimationFrame(step);
  });
  return times.slice(1).map((time, i) => time - times[i]);
}"""


def synthetic(path, n=N):
    """Groups of unequal size and width on the unit sphere."""
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(GROUPS, 2.0))
    labels = rng.choice(GROUPS, n, p=share)
    centres = rng.normal(size=(GROUPS, DIMS)) / np.sqrt(DIMS)
    width = rng.uniform(0.3, 0.9, GROUPS)[labels, None]
    vectors = centres[labels] + width * rng.normal(size=(n, DIMS)) / np.sqrt(DIMS)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [f"group-{label:02}/{i:06}.jpg" for i, label in enumerate(labels)]
    groups = [f"group-{i:02}" for i in range(GROUPS)]
    write_embeddings(path, vectors.astype(np.float32), np.arange(n), names, labels, groups, {})


def start(path):
    """A server in a process of its own: the process, its port, seconds to the first answer, what it said."""
    started, said = time.perf_counter(), []
    process = subprocess.Popen([sys.executable, "-c", SERVE, path], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        said.append(line.strip())
        print(line.strip(), flush=True)
        if "pictures at http" in line:
            port = int(line.split("://127.0.0.1:")[1].split("/")[0])
            ask(port, "/api/about")
            return process, port, time.perf_counter() - started, said
    raise SystemExit("the explorer did not start")


def stop(process):
    process.terminate()
    process.wait(20)
    process.stdout.close()


def ask(port, target):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", target)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    if answer.status != 200:
        raise SystemExit(f"{target} answered {answer.status}")
    return content


def summary(milliseconds):
    values = sorted(milliseconds)
    return {"median": round(statistics.median(values), 1), "p95": round(values[int(0.95 * (len(values) - 1))], 1)}


def timed(work, times=50):
    found = []
    for i in range(times):
        started = time.perf_counter()
        work(i)
        found.append(1000 * (time.perf_counter() - started))
    return summary(found)


def in_browser(port):
    """Seconds to the drawn map, click to neighbours and frame times; None without Chromium."""
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        binary = None
    if binary is None:
        return None
    found = {}
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=binary, args=FLAGS)
        found["browser"] = f"Chromium {browser.version}, 1280 x 800, no GPU"
        for kind, path in (("WebGL", "/?webgl=1"), ("canvas", "/?canvas=1")):
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            started = time.perf_counter()
            page.goto(f"http://127.0.0.1:{port}{path}")
            page.wait_for_selector("html[data-ready]", timeout=60_000)
            loaded = time.perf_counter() - started
            clicks = [page.evaluate(CLICK, row) for row in range(0, N, N // 30)]
            frames = page.evaluate(PAN)
            found[kind] = {"page_seconds": round(loaded, 2), "click_ms": summary(clicks), "frame_ms": summary(frames)}
            page.close()
        browser.close()
    return found


# From the choice of a point to its neighbours standing in the panel, drawn.
CLICK = """async (row) => {
  const started = performance.now();
  const { state } = explorer;
  location.hash = row;
  while (!(state.query && state.query.row === row)) await new Promise(requestAnimationFrame);
  return performance.now() - started;
}"""


def measure():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "synthetic.npy"
        synthetic(path)
        process, port, first, said = start(path)
        stop(process)
        process, port, second, _ = start(path)
        try:
            rows = np.random.default_rng(1).integers(0, N, 200)
            result = {
                "command": "python -m benchmarks.explorer",
                "pictures": N,
                "dimensions": DIMS,
                "start_seconds": {"map computed": round(first, 1), "map kept": round(second, 1)},
                "said": [line.replace(folder, "") for line in said[:2]],
                "bytes": {name: len(ask(port, target)) for name, target in TARGETS.items()},
                "server_ms": {
                    "neighbours, k = 10": timed(lambda i: ask(port, f"/api/neighbours/{rows[i]}?k=10")),
                    "neighbours, k = 100": timed(lambda i: ask(port, f"/api/neighbours/{rows[i]}?k=100")),
                    "filter by name": timed(lambda i: ask(port, f"/api/filter?text=group-{i:02}"), 20),
                },
                "browser": in_browser(port),
                "machine": {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "versions": versions()},
            }
        finally:
            stop(process)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


TARGETS = {"points": "/api/map/0", "a column": "/api/column/0", "description": "/api/about", "page": "/static/app.js"}


def render():
    """The section of docs/benchmarks.md as Markdown, from the kept result."""
    result = json.loads(RESULT.read_text())
    seconds, server, sizes = result["start_seconds"], result["server_ms"], result["bytes"]
    lines = [
        "## The explorer with 100,000 pictures",
        "",
        f"`{result['command']}`: {result['pictures']:,} synthetic embeddings of {result['dimensions']} numbers, "
        f"{result['machine']['cores']} cores (load {result['machine']['load']} while measured).",
        "",
        "| | |",
        "|---|--:|",
        f"| start to the first answer, map computed by UMAP (once) | {seconds['map computed']} s |",
        f"| start to the first answer, map kept | {seconds['map kept']} s |",
        f"| sent to the page: points; each column | {sizes['points'] // 1000:,} kB; {sizes['a column'] // 1000:,} kB |",
    ]
    lines += [f"| {name}, server: median (95 %) | {_pair(value)} |" for name, value in server.items()]
    browser = result["browser"]
    for kind in ("WebGL", "canvas") if browser else ():
        lines += [
            f"| page opened and drawn, {kind} | {browser[kind]['page_seconds']} s |",
            f"| click to neighbours in the browser, {kind}: median (95 %) | {_pair(browser[kind]['click_ms'])} |",
            f"| frame while the map moves, {kind}: median (95 %) | {_pair(browser[kind]['frame_ms'])} |",
        ]
    note = (
        ""
        if browser is None
        else (f"The browser is {browser['browser']}: the processor draws the frames and imitates WebGL.")
    )
    return "\n".join([*lines, "", note, ""])


def _pair(value):
    return f"{value['median']} ({value['p95']}) ms"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="print the section from the kept result")
    if not parser.parse_args().render:
        measure()
    print(render())

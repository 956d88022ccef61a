"""The page in a real browser: what is drawn, what a click answers, and that nothing leaves the machine."""

import io
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nnclr.embeddings import open_embeddings
from tests.explorer.conftest import draw_folder, serving
from tests.explorer.test_attacks import embedded_folder
from tests.explorer.test_collection import brute_force

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = (
    "--no-sandbox --use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def spread(two):
    """The collection with points far apart, so that a place on the screen is that of one picture."""
    places = np.random.default_rng(2).uniform(-1, 1, (2, len(two), 2)).astype(np.float32)
    projections = [replace(side.projection, points=p) for side, p in zip(two.sides, places, strict=True)]
    moved = [replace(side, projection=p) for side, p in zip(two.sides, projections, strict=True)]
    return replace(two, sides=tuple(moved))


@pytest.fixture(scope="module")
def explorer(spread):
    with serving(spread) as served:
        yield served


@pytest.fixture
def visit(browser):
    """Opens pages; in the end none has logged an error, shown a dialogue or asked another host."""
    pages, wrong = [], []

    def open_page(served, path="/", script=None):
        page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light", reduced_motion="reduce")
        pages.append(page)
        home = f"http://127.0.0.1:{served.port}/"
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda r: None if r.url.startswith((home, "blob:" + home)) else wrong.append(r.url))
        if script:
            page.add_init_script(script)
        page.goto(home + path.lstrip("/"))
        page.wait_for_selector("html[data-ready]")
        page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")  # drawn once
        page.wait_for_timeout(100)
        page.wrong = wrong
        return page

    yield open_page
    for page in pages:
        page.close()
    assert wrong == []


@pytest.fixture(params=["WebGL", "canvas"])
def page(request, visit, explorer):
    opened = visit(explorer, f"/?{request.param.lower()}=1")
    assert opened.inner_text("#status").endswith(request.param)
    return opened


def places(page, rows):
    """Where points are on the page, CSS pixels."""
    box = page.locator("#overlay").bounding_box()
    found = page.evaluate("rows => rows.map((row) => explorer.map.toScreen(row))", list(map(int, rows)))
    return np.array(found) + np.array([box["x"], box["y"]])


def until(page, expression, wanted=True):
    """Wait for a value; the page's policy forbids what playwright's own waiting does."""
    deadline = time.monotonic() + 10
    while (found := page.evaluate(expression)) != wanted:
        assert time.monotonic() < deadline, (expression, found, wanted)
        page.wait_for_timeout(20)


STATUS = "document.querySelector('#status').textContent.split(' pictures')[0]"
QUERY = "document.querySelector('#query .name').textContent"


def apart(page, n):
    """Rows whose point has no other within a thumbnail's width, and lies under nothing."""
    where = places(page, range(n))
    distance = np.hypot(*(where[:, None] - where[None]).transpose(2, 0, 1)) + 1e9 * np.eye(n)
    legend = page.locator("#legend").bounding_box()
    free = (where[:, 0] > legend["x"] + legend["width"] + 8) & (where[:, 1] > 110)
    return np.flatnonzero((distance.min(1) > 50) & free)


def tiles(page, column=0):
    return [int(t.get_attribute("data-row")) for t in page.locator(".versus > div").nth(column).locator(".tile").all()]


@pytest.mark.parametrize("path", ["/?webgl=1", "/?canvas=1"])
def test_each_point_is_drawn_in_the_colour_of_its_class(visit, spread, path):
    with serving(replace(spread, sources=(None,))) as served:  # else pictures would lie on the points
        page = visit(served, path)
        swatches = page.evaluate("[...document.querySelectorAll('#legend .dot')].map((d) => d.style.backgroundColor)")
        rows = apart(page, len(spread))
        where = places(page, rows)
        colours = np.array([[int(value) for value in text[4:-1].split(",")] for text in swatches], float)
        expected = colours[spread.columns[0].codes[rows]]
        assert len(rows) > 12

        def right(shift):
            x, y = (where + shift).round().astype(int).T
            return (np.abs(shot[y, x] - expected).max(1) < 30).mean()

        for _ in range(50):  # a screenshot may be of the frame before, on a machine that is busy
            shot = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"), float)
            if right(0) == 1:
                break
            page.wait_for_timeout(200)
        page.close()
    assert right(0) == 1
    assert right((11, 0)) == 0  # beside the points there is no such colour


def test_a_click_shows_the_neighbours_of_both_encoders(page, embedded, two):
    row = int(apart(page, len(two))[3])
    page.mouse.click(*places(page, [row])[0])
    page.wait_for_selector("#neighbours .tile")
    assert page.inner_text("#query .name") == two.names[row]
    true = []
    for side, path in enumerate(("8.parquet", "4.parquet")):
        vectors = open_embeddings(embedded / path).vectors
        true.append(brute_force(vectors, vectors[row].astype(np.float64), 10, row).tolist())
        assert tiles(page, side) == true[-1]
    common = set(true[0]) & set(true[1])
    assert page.inner_text("#result-title") == f"{len(common)} of 10 in common"
    assert {int(t.get_attribute("data-row")) for t in page.locator(".tile.common").all()} == common
    page.select_option("#k", "20")
    until(page, "document.querySelectorAll('.versus .tile').length", 40)
    assert tiles(page)[:10] == true[0]
    target = tiles(page)[4]
    page.locator(".versus .tile").nth(4).click()  # one goes there
    until(page, QUERY, two.names[target])
    page.go_back()
    until(page, QUERY, two.names[row])


def test_a_picture_of_ones_own_finds_itself(page, two, pictures_folder):
    row = 3
    content = (pictures_folder / two.names[row]).read_bytes()
    page.set_input_files("#file", {"name": "mine.png", "mimeType": "image/png", "buffer": content})
    page.wait_for_selector("#neighbours .tile")
    assert page.inner_text("#query .name") == "mine.png"
    assert tiles(page, 0)[0] == tiles(page, 1)[0] == row
    assert page.locator(".tile .facts").first.inner_text().split()[-1] == "1.000"


def test_what_is_no_picture_is_said(visit, explorer):
    page = visit(explorer)
    page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"<svg onload=alert(1)>"})
    page.wait_for_selector(".notice.error")
    assert "The picture cannot be used (not an image)." in page.inner_text("#notices")
    page.wrong[:] = [text for text in page.wrong if "422" not in text]  # the browser logs the status itself


def test_the_encoder_of_the_map_can_be_switched(page, spread):
    before = places(page, range(len(spread)))
    page.click("#encoders button >> nth=1")
    until(page, "explorer.state.side", 1)
    shown = page.evaluate("[...explorer.map.points]")
    np.testing.assert_array_equal(np.float32(shown).reshape(-1, 2), spread.sides[1].projection.points)
    assert np.abs(places(page, range(len(spread))) - before).max() > 20


def test_legend_and_filter_hide_points_from_the_pointer(page, two):
    label = two.columns[0]
    row = next(int(r) for r in apart(page, len(two)) if label.codes[r] == 0)
    page.locator("#legend-list button").first.click()
    left = int((label.codes != 0).sum())
    until(page, STATUS, f"{left} of {len(two)}")
    page.mouse.click(*places(page, [row])[0])
    page.wait_for_timeout(150)
    assert page.locator("#result").is_hidden()
    page.fill("#filter", "ONERROR")
    until(page, STATUS, f"1 of {len(two)}")
    page.fill("#filter", "")
    page.locator("#legend-list button").first.click()
    until(page, STATUS, str(len(two)))
    page.mouse.click(*places(page, [row])[0])
    page.wait_for_selector("#neighbours .tile")


def test_what_is_lassoed_is_what_lies_inside(page, two):
    where = places(page, range(len(two)))
    centre, radius = np.median(where, 0), 120
    angles = np.linspace(0, 2 * np.pi, 60)
    path = centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
    page.keyboard.down("Shift")
    page.mouse.move(*path[0])
    page.mouse.down()
    for point in path:
        page.mouse.move(*point)
    page.mouse.up()
    page.keyboard.up("Shift")
    selected = set(page.evaluate("[...explorer.state.selected]"))
    distance = np.hypot(*(where - centre).T)
    assert set(np.flatnonzero(distance < radius - 3).tolist()) <= selected
    assert not selected & set(np.flatnonzero(distance > radius + 1).tolist())
    assert 3 < len(selected) < len(two)
    assert page.inner_text("#selection-title") == f"{len(selected)} selected"


def test_a_selection_is_saved_as_list_and_table(page, two):
    page.fill("#filter", "bee/")
    until(page, STATUS, f"14 of {len(two)}")
    page.click("#select-shown")
    wanted = [name for name in two.names if name.startswith("bee/")]
    with page.expect_download() as text:
        page.click("#export-txt")
    assert Path(text.value.path()).read_text().splitlines() == wanted
    with page.expect_download() as table:
        page.click("#export-csv")
    assert table.value.suggested_filename == "selection.csv"
    content = Path(table.value.path()).read_text()
    assert content.startswith("row,id,path,label,cluster by pixels?size=8")
    assert content.count("\n") == 15


def test_hover_shows_name_and_picture(page, two):
    row = int(apart(page, len(two))[5])
    page.mouse.move(*places(page, [row])[0])
    page.wait_for_selector("#hover .name:not(:empty)")
    assert page.inner_text("#hover .name") == two.names[row]
    until(page, "document.querySelector('#hover img').naturalWidth", 24)


def test_the_map_is_used_by_keyboard(page, two):
    page.focus("#overlay")
    scale = page.evaluate("explorer.map.view.scale")
    page.keyboard.press("+")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("explorer.map.view.scale") == pytest.approx(1.5 * scale)
    page.keyboard.press("0")
    assert page.evaluate("explorer.map.view.scale") == pytest.approx(scale)
    page.keyboard.press("Enter")
    page.wait_for_selector("#neighbours .tile")
    first = page.inner_text("#query .name")
    page.locator("#neighbours .tile").first.focus()
    page.keyboard.press("Enter")
    until(page, f"{QUERY} !== {json.dumps(first)}")


@pytest.mark.parametrize(("path", "lacking"), [("/?webgl=1", "true"), ("/", "options.failIfMajorPerformanceCaveat")])
def test_the_canvas_is_used_without_webgl_and_where_it_would_be_imitated(visit, explorer, path, lacking):
    nothing = f"""const get = HTMLCanvasElement.prototype.getContext;
        HTMLCanvasElement.prototype.getContext = function (kind, options) {{
            return kind !== "2d" && {lacking} ? null : get.call(this, kind, options);
        }};"""
    assert visit(explorer, path, nothing).inner_text("#status").endswith("canvas")
    assert visit(explorer, "/?webgl=1").inner_text("#status").endswith("WebGL")


def test_a_changed_file_is_said_on_the_page(visit, tmp_path):
    collection = embedded_folder(draw_folder(tmp_path / "root", per_class=5), tmp_path)
    with serving(collection) as served:
        page = visit(served)
        (tmp_path / "served.parquet").unlink()
        page.focus("#overlay")
        page.keyboard.press("Enter")
        page.wait_for_selector(".notice.error")
        assert "start nnclr explore again" in page.inner_text("#notices")
        page.wrong[:] = [text for text in page.wrong if "409" not in text]
        page.close()


def test_the_page_refuses_a_script_that_is_not_its_own(visit, explorer):
    """The control of the policy: without it a name that became HTML would run."""
    page = visit(explorer)
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=/nothing onerror=\"window.ran = true\">')")
    page.wait_for_timeout(200)
    assert page.evaluate("window.ran") is None
    assert any("Content Security Policy" in text for text in page.wrong)
    page.wrong.clear()

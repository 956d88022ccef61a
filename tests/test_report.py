"""The page about a run: one safe file, whose words and pictures are those of the run, whatever state that is in."""

import json
import os
import re
import statistics
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import nnclr
from nnclr import health, neighbour_sheet, plots, report, run_map
from nnclr.data.source import open_source
from nnclr.encoder import Encoder
from nnclr.errors import InputError
from nnclr.findings import collapses, read_record
from nnclr.models.backbone import create_backbone

VOID = {"meta", "img", "br"}
# What reliability tests call hostile names, and what else could become markup, control or direction.
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</pre></style></svg><script>alert(1)</script>",
    "\" onload='alert(1)' x=\"",
    "&lt;b&gt; =cmd() -rf 日本",
    "a\nb\x00c\x1b[31m\u202etxt.exe",
    "caf\udce9",
)


class Page(HTMLParser):
    """Tags in order, attributes, text; complains about tags that are not closed."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.open, self.text, self.rows = [], [], [], "", {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def values(self, name):
        return [value for _, attribute, value in self.attributes if attribute == name]


def said(path):
    """Topic -> sentence of the summary, and the verdict under an empty topic."""
    text = path.read_text()
    rows = re.findall(r'<tr class="\w+"><td class="mark".*?</td><th scope="row">(.*?)</th><td>(.*?)</td></tr>', text)
    verdict = re.search(r'<p class="verdict \w+"><strong>(.*?)</strong> <span>(.*?)</span>', text)
    return dict(rows) | {"": f"{verdict[1]}. {verdict[2]}"}


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def result(step, value, spread=0.02, **more):
    return {
        "protocol": "knn",
        "metric": "top-1 accuracy",
        "value": value,
        "interval": [value - spread, value + spread],
        "step": step,
        "parameters": {"k": 20, "temperature": 0.07},
        "n_train": 900,
        "n_test": 100,
        "test": "photos",
        "test_fingerprint": "f",
    } | more


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A run that never was: 10 log lines of healthy figures, 1,000 images, 100 steps; its curves are not drawn."""
    monkeypatch.setattr(report, "line_drawing", lambda *_, **__: '<svg role="img"></svg>')
    run = tmp_path / "made-up"
    run.mkdir()
    settings = "objective = 'nnclr'\nbackbone = 'resnet18'\nepochs = 10\nbatch_size = 100\nembedding_dim = 64\n"
    (run / "config.toml").write_text(settings + "support_set_size = 250\ndata = 'photos'\nevaluate_every_epochs = 5\n")
    (run / "environment.json").write_text(json.dumps({"nnclr": "0", "data": {"name": "photos", "images": 1000}}))
    lines = [
        {"step": step, "epoch": step / 10, "images": 100 * step, "loss": 4.6 - step / 50, "loss_chance": 4.605}
        | {"embedding_std": 0.9, "rank_me": 30.0, "distinct_neighbours": 0.8, "neighbour_similarity": 0.9}
        | {"images_per_second": 50.0, "data_share": 0.1, "neighbour_purity": 0.2 + step / 200, "own_id_share": 0.0}
        for step in range(10, 101, 10)
    ]
    write_lines(run / "metrics.jsonl", lines)
    write_lines(run / "evaluations.jsonl", [result(0, 0.3), result(100, 0.6)])
    return run


def changed(run, **values):
    """Set figures of all log lines; a function is called with the step."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {name: value(line["step"]) if callable(value) else value for name, value in values.items()}
    write_lines(run / "metrics.jsonl", lines)


def written(run, **options):
    return report.write_report(run, with_map=False, **options)


@pytest.fixture(scope="module")
def real(tmp_path_factory, pictures):
    """A real run, small."""
    from tests.settings import TINY

    return nnclr.pretrain(pictures, tmp_path_factory.mktemp("real") / "run", **TINY)


def test_the_words_are_those_of_the_files(real):
    """Every figure of the summary, computed here from the JSONL files."""
    metrics = [json.loads(text) for text in (real.path / "metrics.jsonl").read_text().splitlines()]
    knn = [json.loads(text) for text in (real.path / "evaluations.jsonl").read_text().splitlines()]
    first, last = metrics[0], metrics[-1]
    words = said(written(real.path))
    assert words["Loss"].startswith(f"{last['loss']:.3f} at step 20, {first['loss']:.3f} at step 2")
    assert f"{last['loss_chance']:.3f}" in words["Loss"]
    low, high = knn[-1]["interval"]
    began, ended, low, high = (f"{100 * share:.1f} %" for share in (knn[0]["value"], knn[-1]["value"], low, high))
    assert words["kNN accuracy"].startswith(f"{began} untrained, {ended} (95 %: {low} to {high}) at step 20")
    assert f"of {knn[-1]['n_test']} images" in words["kNN accuracy"]
    purity = f"{100 * last['neighbour_purity']:.1f} % of the neighbours"
    assert words["Neighbour purity"].startswith(purity)
    assert f"{100 * first['neighbour_purity']:.1f} % at step 2" in words["Neighbour purity"]
    assert (
        words["Neighbour similarity"]
        == f"{last['neighbour_similarity']:.2f} (cosine), {first['neighbour_similarity']:.2f} at step 2."
    )
    renewed = f"; the support set of 50 entries is renewed every {50 / 24:.3g} steps."
    assert words["Neighbour age"] == f"{last['neighbour_age']:.1f} steps on average{renewed}"
    assert words["Own image"].startswith(f"{100 * last['own_id_share']:.1f} % of the neighbours")
    assert words["Effective rank"].startswith(
        f"{last['rank_me']:.1f} of at most 16 (width and batch), {first['rank_me']:.1f} at step 2"
    )
    assert words["Embedding deviation"].startswith(f"{last['embedding_std']:.2f};")
    rate = statistics.median(line["images_per_second"] for line in metrics)
    assert words["Speed"].startswith(f"{rate:,.0f} images a second")
    share = statistics.fmean(line["data_share"] for line in metrics)
    assert words["Loading"].startswith(f"{100 * share:.1f} % of the step time")
    assert "step 20 of 20, 4 epochs, batch 24, 16 px" in words["Training"]
    assert words["Training"].startswith("nnclr trained small-convnet on 120 images of array")


@pytest.mark.parametrize(
    ("values", "evaluations", "verdict"),
    [
        ({}, [result(0, 0.3), result(100, 0.6)], "It learned. kNN accuracy is above that of the untrained network"),
        ({}, [result(0, 0.3), result(100, 0.31)], "It is not clear yet."),
        ({}, [result(0, 0.3), result(100, 0.29)], "No sign of learning. kNN accuracy is not above"),
        (
            {},
            [result(0, 1.0, interval=[0.8, 1.0]), result(100, 1.0, interval=[0.8, 1.0])],
            "It cannot be told. The untrained network has 100.0 % already, of 100 images: too few or too easy",
        ),
        ({}, [result(0, 1.0), result(100, 0.9, interval=[0.85, 0.95])], "No sign of learning."),
        ({}, [], "It learned. The loss is well below its chance level"),
        ({"loss": 4.59}, [], "No sign of learning. The loss is not clearly below its chance level."),
        ({"loss_chance": None}, [], "It cannot be told."),
        ({"embedding_std": 0.01}, [result(0, 0.3), result(100, 0.6)], "It has collapsed."),
        ({"rank_me": 2.0}, [], "It has collapsed."),
        ({"distinct_neighbours": 0.01}, [], "It has collapsed."),
        ({"embedding_std": lambda step: 0.01 if step < 30 else 0.9}, [], "It learned."),  # before the alarm is awake
    ],
)
def test_the_verdict_follows_the_figures(made_up, values, evaluations, verdict):
    changed(made_up, **values)
    write_lines(made_up / "evaluations.jsonl", evaluations)
    words = said(written(made_up))
    assert words[""].startswith(verdict)
    assert words["Collapse"].startswith("No warning" if "collapsed" not in verdict else "At step 80 ")
    if not evaluations:
        assert words["kNN accuracy"].startswith("Not measured")


def test_one_unlucky_step_does_not_change_the_verdict(made_up):
    """A logged loss is that of one batch; what is judged is the mean of the later half."""
    write_lines(made_up / "evaluations.jsonl", [])
    for usual, last, verdict, rest in (
        (3.0, 4.6, "It learned.", ", 3.320 on average of the last 5 that were logged; guessing would give 4.605."),
        (4.6, 4.2, "No sign of learning.", ", 4.520 on average of the last 5 that were logged. Chance is 4.605: it is"),
    ):
        changed(made_up, loss=lambda step, usual=usual, last=last: last if step == 100 else usual)
        words = said(written(made_up))
        assert words[""].startswith(verdict)
        assert words["Loss"].startswith(f"{last:.3f} at step 100, {usual:.3f} at step 10{rest}")


def test_a_step_is_split_into_waiting_working_and_the_rest(made_up):
    """100 images at 50 a second: two seconds a step, and half a second of evaluations on top of it."""
    changed(made_up, data_share=0.25, aside_share=lambda step: 0.0 if step == 10 else 0.2)
    waiting, working, aside = (dict(points) for points in report._step_times(read_record(made_up)))
    assert waiting == dict.fromkeys(range(10, 101, 10), 500)
    assert working == dict.fromkeys(range(10, 101, 10), 1500)
    assert aside == dict.fromkeys(range(10, 101, 10), 500) | {10: 0}
    assert "What a step waits for" in written(made_up).read_text()


def test_sentences_change_with_what_they_are_about(made_up):
    healthy = said(written(made_up))
    assert healthy["Loss"] == "2.600 at step 100, 4.400 at step 10; guessing would give 4.605."
    assert "The steps took 3 min 20 s." in healthy["Training"]  # 10,000 images at 50 a second
    (made_up / "evaluations.jsonl").unlink()
    write_lines(made_up / "bad_samples.jsonl", [{"id": 3, "image": "a.png", "reason": "truncated"}] * 2)
    write_lines(
        made_up / "metrics.jsonl", [json.loads(t) for t in (made_up / "metrics.jsonl").read_text().splitlines()][:4]
    )
    changed(made_up, loss=4.7, data_share=0.5, own_id_share=0.6, neighbour_purity=None, bad_images=2)
    words = said(written(made_up))
    assert "Chance is 4.605: it is no better than guessing" in words["Loss"]
    assert "50.0 % of the step time" in words["Loading"]
    assert "--num-workers" in words["Loading"]
    assert "60.0 % of the neighbours" in words["Own image"]
    assert "--exclude-own-id" in words["Own image"]
    assert words["Neighbour purity"] == words["kNN accuracy"] == "Not measured: no labels."
    assert words["Images"].startswith("2 cannot be read")
    assert "step 40 of 100" in words["Training"]
    assert "not finished" in words["Training"]
    changed(made_up, neighbour_similarity=None)
    assert "the support set is empty at first" in said(written(made_up))["Neighbours"]
    settings = made_up / "config.toml"
    settings.write_text(settings.read_text().replace("support_set_size = 250\n", ""))
    assert "looks up none" in said(written(made_up))["Neighbours"]


def kept(run, count):
    """Cut a run after so many log lines."""
    path = run / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))


def test_a_run_with_one_logged_line_is_compared_with_nothing(made_up):
    """The first logged step is the last one, and says nothing of where the run began."""
    kept(made_up, 1)
    changed(made_up, loss=4.0)
    write_lines(made_up / "evaluations.jsonl", [result(0, 0.3), result(10, 0.29)])
    page = written(made_up)
    words = said(page)
    assert words["Loss"] == "4.000 at step 10; guessing would give 4.605."
    assert re.fullmatch(r"25\.0 % of the neighbours have their query\S+s label\.", words["Neighbour purity"])
    assert words["Neighbour similarity"] == "0.90 (cosine)."
    assert words["Effective rank"] == "30.0 of at most 64 (width and batch)."
    assert words["Collapse"] == "Too few steps were logged to warn of one: 1 of 8."
    assert "step 10 of 100, 1 epoch, batch" in words["Training"]
    assert words[""].startswith("It is too early to tell. kNN accuracy is not above that of the untrained network, and")
    assert "at first" not in Page(page.read_text()).text
    write_lines(made_up / "evaluations.jsonl", [])
    changed(made_up, loss=4.6, images_per_second=5000)
    words = said(written(made_up))
    assert words[""] == (
        "It is too early to tell. The loss is not clearly below its chance level, and only one step was logged."
    )
    assert "The steps took less than a second." in words["Training"]


def test_a_short_run_is_compared_with_its_first_logged_step(made_up):
    kept(made_up, 2)
    changed(made_up, epoch=lambda step: step / 100)
    write_lines(made_up / "evaluations.jsonl", [result(0, 0.3), result(20, 0.29)])
    page = written(made_up)
    words = said(page)
    assert words["Neighbour purity"].endswith("label, 25.0 % at step 10.")
    assert words[""].endswith("untrained network, after less than one pass over the images.")
    tiles = re.findall(r"<li><span>([^<]*)</span><b>[^<]*</b><span>([^<]*)</span></li>", page.read_text())
    assert dict(tiles)["Neighbour purity"] == "25.0 % at step 10"
    assert dict(tiles)["kNN accuracy"] == "30.0 % untrained"
    changed(made_up, epoch=lambda step: step / 10)
    assert said(written(made_up))[""] == "No sign of learning. kNN accuracy is not above that of the untrained network."


def test_collapse_is_judged_from_as_many_lines_as_a_warning_needs(made_up):
    kept(made_up, 8)
    assert said(written(made_up))["Collapse"] == "No warning in the whole run."
    changed(made_up, rank_me=2.0)
    assert said(written(made_up))["Collapse"].startswith("At step 80 ")  # the first one that there can be
    kept(made_up, 7)
    assert said(written(made_up))["Collapse"] == "Too few steps were logged to warn of one: 7 of 8."


def test_warnings_are_those_that_the_run_gave(made_up):
    """The page repeats the alarm from the logged figures; here it is fed as the loop feeds it."""
    changed(made_up, rank_me=lambda step: 3.0 if step < 90 else 30.0)
    monitor = health.CollapseMonitor()
    warned = [
        monitor.observe(step=step, std=0.9, rank=3.0 if step < 90 else 30.0, dim=64, samples=100, distinct=0.8)
        for step in range(10, 101, 10)
    ]
    assert collapses(read_record(made_up)) == ([text for text in warned if text], False)
    assert said(written(made_up))["Collapse"].endswith("It recovered.")


def test_baselines_stand_beside_what_was_measured_the_same_way(made_up):
    baselines = [
        result(None, 0.7, encoder_name="pixels", parameters={"k": 20, "temperature": 0.07, "image_size": 32}),
        result(None, 0.8, encoder_name="other-k", parameters={"k": 200, "temperature": 0.07}),
        result(None, 0.9, encoder_name="other-images", test_fingerprint="g"),
    ]
    write_lines(made_up / "baselines.jsonl", baselines)
    path = written(made_up)
    assert said(path)["Baseline"] == "70.0 % by pixels, the same way: more than the trained encoder."
    text = path.read_text()
    rows = re.findall(
        r'<tr class="(\w*)"><th scope="row">knn top-1 accuracy(?:<br><small>([\w-]+)</small>)?</th>', text
    )
    assert rows == [("", ""), ("baseline", "pixels"), ("baseline", "other-k"), ("baseline", "other-images")]
    assert text.count("every parameter") == 4
    write_lines(made_up / "baselines.jsonl", [result(None, 0.6, encoder_name="pixels")])
    assert said(written(made_up))["Baseline"] == "60.0 % by pixels, the same way: as much as the trained encoder."


# ---- one safe file -----------------------------------------------------------------------------------------


def complaints(text):
    """What a page must not have."""
    page = Page(text)
    wrong = [
        tag for tag in page.tags if tag in ("script", "iframe", "object", "embed", "link", "base", "form", "audio")
    ]
    anchors = {f"#{name}" for name in page.values("id")}
    links = page.values("src") + page.values("href") + page.values("xlink:href")
    wrong += [link for link in links if link not in anchors and not link.startswith("data:image/webp;base64,")]
    wrong += [name for _, name, _ in page.attributes if name.startswith("on")]
    wrong += re.findall(r"https?://|@import|url\((?!#)", text)
    wrong += [name for name in page.values("id") if page.values("id").count(name) > 1]
    wrong += ["caption"] * (page.tags.count("table") - page.tags.count("caption"))
    wrong += ["alt"] * (page.tags.count("img") - sum(bool(alt) for alt in page.values("alt")))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return wrong + ([] if policy in page.values("content") else ["policy"])


def test_a_page_of_a_real_run_is_one_file(real):
    text = written(real.path).read_text()
    assert complaints(text) == []
    for change, found in (
        ("<script>1</script>", ["script"]),
        ('<img alt="x" src="https://x/y.png">', ["https://x/y.png", "https://"]),
        ('<p id="map"></p>', ["map", "map"]),
        ("<table></table>", ["caption"]),
        ('<img alt="" src="#map">', ["alt"]),
        ('<p onclick="1"></p>', ["onclick"]),
    ):  # controls
        assert complaints(text.replace("<footer>", change + "<footer>")) == found
    assert len(re.findall('role="img"', text)) == 13
    assert text.count("data:image/webp;base64,") == 8 * (1 + 3)  # queries, and their neighbours at three steps
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert f"nnclr report {real.path}" in Page(text).text  # how to get a map


def hostile_run(tmp_path, folder, name, made_up):
    """A run with a text everywhere that a text can be."""
    run = tmp_path / folder / re.sub(r"[/\x00\ud800-\udfff]", "_", name)  # safetensors opens no path that is not UTF-8
    run.mkdir(parents=True)
    text = json.dumps(name.encode("utf-8", "backslashreplace").decode())  # as a run writes it
    (run / "config.toml").write_text(f"objective = {text}\nbackbone = {text}\ndata = {text}\n")
    environment = dict.fromkeys(("nnclr", "commit", "python", "device"), name) | {"command": [name, name]}
    environment["data"] = {"name": name, "images": 1000, name: name}
    (run / "environment.json").write_text(json.dumps(environment))
    lines = [json.loads(text) | {name: 1.0} for text in (made_up / "metrics.jsonl").read_text().splitlines()]
    write_lines(run / "metrics.jsonl", lines)
    texts = {"protocol": name, "metric": name, "test": name, "data": name, "n_test": name, "n_train": [name]}
    texts |= {
        "parameters": {name: name, "k": {name: name}},
        "encoder_name": name,
        "details": {name: [name]},
        "seed": name,
    }
    write_lines(
        run / "evaluations.jsonl", [result(1, 0.5, **texts), result(0, 0.3, test=name), result(2, 0.5, test=name)]
    )
    write_lines(run / "baselines.jsonl", [result(None, 0.5, **texts), result(None, 0.4, encoder_name=name, test=name)])
    write_lines(run / "bad_samples.jsonl", [{"id": 1, "image": name, "reason": name}])
    (run / "neighbours").mkdir()
    (run / "neighbours" / "step-00000001.png").write_bytes(b"")
    encoder = Encoder(create_backbone("small-convnet", 16), 16, provenance={"backbone": "small-convnet"})
    encoder.save_pretrained(run / "encoder")
    return run


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_stay_texts(tmp_path, made_up, monkeypatch, name):
    """The page has the tags of the page of a harmless run, one by one."""
    pictures = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    pages = []
    for folder, text in (("good", "harmless"), ("bad", name)):
        source = nnclr.data.images.array_source(pictures, np.arange(12) % 3, text, (text, "b", "c"))
        monkeypatch.setattr(run_map, "open_source", lambda _, made=source: made)
        pages.append(report.write_report(hostile_run(tmp_path, folder, text, made_up)).read_text())
    assert complaints(pages[1]) == []
    harmless, hostile = Page(pages[0]), Page(pages[1])
    assert hostile.tags == harmless.tags
    assert [(tag, key) for tag, key, _ in hostile.attributes] == [(tag, key) for tag, key, _ in harmless.attributes]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", hostile.text)
    if name.isprintable():
        assert hostile.text.count(name) >= 20  # it is there, as text
    if "<" in name:  # control
        for module in (report, run_map):
            monkeypatch.setattr(module, "escaped", str)
        with pytest.raises(AssertionError):
            assert (
                Page(report.write_report(tmp_path / "bad" / os.listdir(tmp_path / "bad")[0]).read_text()).tags
                == harmless.tags
            )


def test_no_secret_reaches_the_page(made_up, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-1")
    command = ["nnclr", "pretrain", "https://user:canary-2@host/x", "--hf-token", "canary-3", "--api-key=canary-4"]
    environment = {"command": command, "env": {"HF_TOKEN": "canary-5"}, "python": "3.11"}
    (made_up / "environment.json").write_text(json.dumps(environment))
    with open(made_up / "config.toml", "a") as file:
        file.write('test_data = "s3://b?token=canary-6&x=1"\npassword = "canary-7"\n')
    text = written(made_up).read_text()
    assert "canary" not in text
    assert "--hf-token …" in text
    assert "canary" in (made_up / "config.toml").read_text()  # control


def test_a_long_run_gives_a_small_page(made_up, monkeypatch):
    """100,000 log lines, one spike among them: under half a megabyte, and the spike is drawn."""
    monkeypatch.setattr(report, "line_drawing", plots.line_drawing)
    line = {"images_per_second": 50.0, "data_share": 0.1, "loss_chance": 4.6, "embedding_std": 0.9}
    rng = np.random.default_rng(0)
    noise = rng.normal(size=100_000).tolist()
    text = json.dumps(line | {"step": 0}).replace('"step": 0', '"step": %d, "loss": %f, "rank_me": %f') + "\n"
    with open(made_up / "metrics.jsonl", "w") as file:
        for step, value in enumerate(noise):
            loss = 500.0 if step == 54_321 else value
            file.write(text % (step, loss, value))
    write_lines(made_up / "evaluations.jsonl", [result(step, 0.3 + step / 1e6) for step in range(0, 100_000, 20)])
    path = written(made_up)
    assert path.stat().st_size < 500_000
    drawing = re.search(r"<h3>Loss .*?</svg>", path.read_text(), re.DOTALL)[0]
    heights = [float(y) for y in re.findall(r"L \S+ (\S+)", max(re.findall(r'd="(M[^"]*)"', drawing), key=len))]
    assert min(heights) < np.median(heights) - 60  # of about 100 units
    assert "the last 500" in path.read_text()


# ---- damaged runs ------------------------------------------------------------------------------------------


def test_a_damaged_run_still_gives_a_page(made_up):
    whole = said(written(made_up))
    assert "Damaged or missing" not in whole
    lines = (made_up / "metrics.jsonl").read_text()
    damages = {
        "metrics.jsonl": [
            (lines[:-40], "1 line of metrics.jsonl cannot be read", "2.800 at step 90"),
            (re.sub(r'"loss": 2\.[56]\d*', '"loss": NaN', lines), None, "2.800 at step 90"),
            (lines + '[1]\n"x"\n{"step": true}\n{"step": -1}\n\x00\n', "3 lines of metrics.jsonl", "2.600 at step 100"),
            ("", "There are no metrics", "No loss was logged"),
            (None, "There are no metrics", "No loss was logged"),
            ("[" * 100_000, "1 line of metrics.jsonl", "No loss was logged"),
            (
                '{"step": 10, "loss": 1e999, "images_per_second": 0, "images": ' + "9" * 400 + "}",
                None,
                "No loss was logged",
            ),
        ],
    }
    for text, sentence, loss in damages["metrics.jsonl"]:
        (made_up / "metrics.jsonl").unlink(missing_ok=True)
        if text is not None:
            (made_up / "metrics.jsonl").write_text(text)
        page = written(made_up).read_text()
        assert complaints(page) == []
        assert loss in said(made_up / "report.html")["Loss"]
        assert sentence is None or sentence in page
    (made_up / "metrics.jsonl").write_text(lines)
    for name, text, sentence in (
        ("environment.json", None, "environment.json is missing or damaged"),
        ("environment.json", '{"data": 3, "command": {"a": null}}', "resnet18 of photos"),
        ("config.toml", "= broken <b>", "config.toml is damaged"),
        (
            "config.toml",
            "epochs = 'x'\nextend_epochs = 'y'\nbatch_size = 0\nembedding_dim = nan\n",
            "An unknown objective",
        ),
        ("config.toml", "epochs = 1e308\nbatch_size = 1\n", "An unknown objective"),
        ("evaluations.jsonl", '{"protocol": "knn"}\n{"value": 1}\n', "Nothing was evaluated"),
        ("evaluations.jsonl", '{"protocol": "knn", "metric": "m", "value": 7.5, "interval": ["a", 2]}', "750.0 %"),
        ("baselines.jsonl", "\udcff", "1 line of baselines.jsonl"),
    ):
        before = (made_up / name).read_bytes() if (made_up / name).exists() else None
        (made_up / name).unlink(missing_ok=True)
        if text is not None:
            (made_up / name).write_bytes(text.encode("utf-8", "surrogateescape"))
        page = written(made_up).read_text()
        assert complaints(page) == []
        assert sentence in Page(page).text, name
        (made_up / name).unlink(missing_ok=True)
        if before is not None:
            (made_up / name).write_bytes(before)
    assert said(written(made_up)) == whole


def test_damaged_pictures_are_left_out(real, tmp_path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(real.path, run)
    sheets = sorted((run / "neighbours").iterdir())
    assert len(sheets) == 3
    sheets[0].write_bytes(sheets[0].read_bytes()[:500])
    Image.new("RGB", (50, 50)).save(sheets[1])
    text = written(run).read_text()
    assert f"{sheets[0].name} is no readable sheet" in text
    assert f"{sheets[1].name} is no readable sheet" in text
    assert text.count("data:image/webp;base64,") == 8 * 2
    shutil.rmtree(run / "neighbours")
    shutil.rmtree(run / "encoder")
    text = written(run).read_text()
    assert "No pictures of neighbours: there are none." in text
    assert "There is no encoder yet" in text


def test_what_is_no_run_is_refused(tmp_path, made_up):
    (tmp_path / "empty").mkdir()
    for run, out, message in (
        (tmp_path / "empty", None, "is no run folder"),
        (tmp_path / "nowhere", None, "is no run folder"),
        (made_up, tmp_path / "nowhere" / "x.html", "must be a .html file in a folder that exists"),
        (made_up, tmp_path, "must be a .html file in a folder that exists"),
    ):
        with pytest.raises(InputError, match=message):
            report.write_report(run, out)
    assert list((tmp_path / "empty").iterdir()) == []
    before = sorted(made_up.iterdir())
    for _ in range(2):  # an earlier report is replaced
        assert written(made_up, out=tmp_path / "page.html") == tmp_path / "page.html"
    assert sorted(made_up.iterdir()) == before


def test_only_a_report_is_replaced_and_that_is_checked_first(tmp_path, made_up, monkeypatch):
    monkeypatch.setattr(report, "read_record", None)  # what takes long has not begun
    (tmp_path / "link.html").symlink_to(tmp_path / "absent.html")
    for text in ("", "<!doctype html><html><p>Written by nnclr</p></html>", "mine"):
        (tmp_path / "mine.html").write_text(text)
        for name in ("mine.html", "link.html"):
            with pytest.raises(InputError, match=f"--out .*{name} exists and is no report of nnclr; choose another"):
                report.write_report(made_up, tmp_path / name)
        assert (tmp_path / "mine.html").read_text() == text
    monkeypatch.setattr(report.os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="not yours to write in"):
        report.write_report(made_up, tmp_path / "new.html")


# ---- neighbours and map ------------------------------------------------------------------------------------


def test_sheet_shows_what_the_look_up_returned(tmp_path, pictures, tiny, monkeypatch):
    """Rows are the fixed queries; frames tell same label, other label and the image itself apart, also when read."""
    rows = []
    sheet = neighbour_sheet._sheet
    monkeypatch.setattr(neighbour_sheet, "_sheet", lambda source, made: rows.append(made) or sheet(source, made))
    run = nnclr.pretrain(pictures, tmp_path / "run", **tiny)
    assert len(rows) == len(list((run.path / "neighbours").iterdir())) == 3  # the first log, and two evaluations
    queries = [[query for query, _ in made] for made in rows]
    assert queries[0] == queries[1] == queries[2]
    assert len(set(queries[0])) == neighbour_sheet.QUERIES
    for _, neighbours in rows[-1]:
        similarities = [s for _, s in neighbours]
        assert similarities == sorted(similarities, reverse=True)
    labels, source = pictures[1], open_source(pictures)
    wanted, read = [], []
    for made, path in zip(rows, sorted((run.path / "neighbours").iterdir()), strict=True):
        for query, neighbours in made:
            kinds = ["self" if i == query else "same" if labels[i] == labels[query] else "other" for i, _ in neighbours]
            wanted.append({kind: kinds.count(kind) for kind in sorted(set(kinds))})
        read += neighbour_sheet.read_sheet(path)
    assert [dict(sorted(row.frames.items())) for row in read] == wanted
    assert {kind for kinds in wanted for kind in kinds} == {"self", "same", "other"}
    for (query, neighbours), row in zip(rows[-1], read[-len(rows[-1]) :], strict=True):
        assert np.array_equal(np.asarray(row.query), np.asarray(neighbour_sheet._thumbnail(source, query)))
        strip = np.asarray(row.neighbours)
        for column, (i, _) in enumerate(neighbours):  # inside the frame
            tile = strip[4:72, column * 78 + 4 : column * 78 + 72]
            assert (tile[..., 3] == 255).all()
            assert np.array_equal(tile[..., :3], np.asarray(neighbour_sheet._thumbnail(source, i))[2:70, 2:70])
        assert (strip[:, 76] == 0)[:, 3].all()  # between two tiles the page shows through
    text = written(run.path).read_text()
    same = [sum(kinds.get("same", 0) for kinds in wanted[start : start + 8]) for start in (0, 8, 16)]
    assert f"{same[0]} of 48 at step 2, {same[1]} of 48 at step 10, {same[2]} of 48 at step 20" in text


def test_a_sheet_without_labels_has_no_counts(tmp_path, pictures, tiny):
    run = nnclr.pretrain(pictures[0], tmp_path / "run", **tiny | {"epochs": 1, "support_set_size": 24})
    text = written(run.path).read_text()
    assert "there are no labels" in text
    assert "have the query’s label" not in text
    assert said(run.path / "report.html")["Neighbour purity"] == "Not measured: no labels."


def test_the_map_has_every_image_in_its_class_colour(tmp_path, made_up, monkeypatch):
    """Colours, counts and places of a folder of pictures, against a projection that is known."""
    from nnclr.explorer import projection

    folder = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for i in range(20):
        (folder / "abb"[i % 3]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / "abb"[i % 3] / f"{i}.png")
    (folder / "a" / "broken.png").write_bytes(b"no picture")
    Encoder(create_backbone("small-convnet", 16), 16, provenance={"backbone": "small-convnet"}).save_pretrained(
        made_up / "encoder"
    )
    (made_up / "config.toml").write_text(f"data = {json.dumps(str(folder))}\n")
    seen, places = [], rng.uniform(-1, 1, (20, 2)).astype(np.float32)

    def known(vectors, keep, say):
        seen.append(vectors)
        return projection.Projection(places, None, "a known map")

    monkeypatch.setattr(projection, "project", known)
    record = read_record(made_up)
    drawn = run_map.draw_map(record)
    encoder, source = Encoder.from_pretrained(made_up), open_source(folder)
    features = encoder.embed(source)
    good = np.isfinite(features).all(axis=1)
    np.testing.assert_allclose(seen[0], features[good] / np.linalg.norm(features[good], axis=1)[:, None], rtol=1e-5)
    labels = source.labels[good]
    assert [(name, count) for name, _, count in drawn.classes] == [("b", 13), ("a", 7)]
    for name, colour, count in drawn.classes:
        path = re.search(rf'<path stroke="{colour}" d="([^"]*)"', drawn.svg)[1]
        at = np.array(re.findall(r"M(\d+) (\d+)h0", path), float)
        assert len(at) == count
        mine = places[labels == source.class_names.index(name)]
        for column, sign in ((0, 1), (1, -1)):
            slope, offset = np.polyfit(mine[:, column], at[:, column], 1)
            assert slope * sign > 0
            np.testing.assert_allclose(at[:, column], slope * mine[:, column] + offset, atol=1.1)
    assert drawn.text == f"20 images of {folder} (they have changed since), by a known map."
    told = []
    page = report.write_report(made_up, say=told.append).read_text()
    assert [line.split(";")[0] for line in told] == ["drawing the map of at most 2,000 images"]
    assert complaints(page) == []
    assert drawn.svg in page
    (folder / "a").rename(tmp_path / "gone")
    (folder / "b").rename(tmp_path / "gone too")
    assert "There is no map: " in report.write_report(made_up).read_text()


def test_large_data_are_sampled(made_up, monkeypatch):
    monkeypatch.setattr(run_map, "MOST_IMAGES", 14)  # few enough for principal components
    pictures = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    source = nnclr.data.images.array_source(pictures, np.arange(60) % 30, "many")
    monkeypatch.setattr(run_map, "open_source", lambda _: source)
    Encoder(create_backbone("small-convnet", 16), 16, provenance={"backbone": "small-convnet"}).save_pretrained(
        made_up / "encoder"
    )
    drawn = run_map.draw_map(read_record(made_up))
    assert drawn.text.startswith("14 of 60 images of many")
    assert drawn.svg.count("h0") == 14
    assert len(drawn.classes) <= run_map.MOST_CLASSES
    monkeypatch.setattr(run_map, "MOST_CLASSES", 3)
    few = run_map.draw_map(read_record(made_up))
    assert few.svg.count("h0") == 14  # the others are there, in grey
    assert len(few.classes) == 3


def test_curves_are_drawn_of_what_can_be_read(made_up, curves):
    """A line that something else wrote must not make a failure of a finished run."""
    for name in ("metrics", "evaluations"):
        with open(made_up / f"{name}.jsonl", "a") as file:
            file.write('{"mine": 1}\n{"step": "x", "loss": "low"}\n{"step": 3, "protocol": "knn"}\n')
    assert plots.draw_curves(made_up).read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_there_are_no_curves(tmp_path, pictures, tiny, monkeypatch, curves):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = nnclr.pretrain(pictures, tmp_path / "run", **tiny | {"epochs": 1})
    assert plots.draw_curves(run.path) is None
    assert not (run.path / "curves.png").exists()
    assert "The curves need matplotlib" in (run.path / "report.html").read_text()
    assert json.loads((run.path / "environment.json").read_text())["data"]["images"] == 120
    assert Path(run.path / "neighbours").is_dir()

"""The emoji benchmark set, built from public icon packages: 10,714 pictures of 64 x 64, 1,641 concepts, 9 artists.

    pip install resvg-py==0.5.0 'pyarrow>=17'
    python -m benchmarks.emoji emoji64.parquet
    python -m benchmarks.emoji emoji64.parquet --cache DIR
    python -m benchmarks.emoji rebuilt.parquet --compare emoji64.parquet

The packages come by `npm pack` (32 MB, from the registry that npm is set to) into DIR, or a folder that is deleted at
the end; each must have the SHA-256 that stands below. Building takes about a minute of one core.

An icon is taken when its name is the English label of an emoji, so variants (skin tones, poses, "-1") fall away; so do
flags, hidden icons and pictures equal to an earlier one. It is drawn on white. A concept is the label, the concepts of
train and test are disjoint, and the order of the rows is shuffled.
The pictures are the work of Google (noto, noto-v1), Mozilla (fxemoji), Microsoft (fluent), Twitter (twemoji), Emoji One
and Streamline, under the licences in the column `license`; CC-BY-4.0 asks whoever shares them on to name the artist.
"""

import argparse
import hashlib
import importlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from nnclr.errors import InputError

LABELS = ("emojibase-data@17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
# artist: version of the package @iconify-json/ARTIST, license, SHA-256 of the package's archive
ARTISTS = {
    "emojione": ("1.2.3", "CC-BY-4.0", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    "fluent-emoji": ("1.2.7", "MIT", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"),
    "fluent-emoji-flat": ("1.2.6", "MIT", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    "fluent-emoji-high-contrast": ("1.2.6", "MIT", "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0"),
    "fxemoji": ("1.2.2", "Apache-2.0", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
    "noto": ("1.2.9", "Apache-2.0", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "noto-v1": ("1.2.5", "Apache-2.0", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "streamline-emojis": ("1.2.4", "CC-BY-4.0", "5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc"),
    "twemoji": ("1.2.5", "CC-BY-4.0", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
}
SIZE = 64
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    f'width="{SIZE}" height="{SIZE}" viewBox="{{}} {{}} {{}} {{}}">{{}}</svg>'
)
COLUMNS = ("image", "concept", "artist", "family", "group", "subgroup", "license", "split")
# digest() of the set, made with resvg-py 0.5.0 and numpy 2.4.6
PUBLISHED = "c2ceccf30b952d241bdbc9bd09d5293721ad6454c1baf476b214d92f9641c82d"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.parquet", help="the file to write; must not exist")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep the packages here, and take those that are")
    parser.add_argument("--compare", type=Path, metavar="EXISTING.parquet", help="print what differs from this file")
    options = parser.parse_args()
    # What would fail at the end is refused before anything is fetched.
    for module in ("resvg_py", "pyarrow"):
        need(module)
    if options.out.exists():
        raise InputError(f"{options.out} is there already; delete it or name another file")
    if not options.out.parent.is_dir():
        raise InputError(f"{options.out.parent} is no folder; make it first")
    existing = load(options.compare) if options.compare else None
    with tempfile.TemporaryDirectory() as scratch:
        rows = build(options.cache or Path(scratch))
    save(rows, options.out)
    same = "" if digest(rows) == PUBLISHED else "NOT "
    print(f"{options.out}: {len(rows):,} pictures, {same}the published set (its order, labels and every pixel)")
    if existing:
        compare(rows, existing)


def need(module):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"the emoji set needs {module}; pip install resvg-py==0.5.0 'pyarrow>=17'") from error


def build(cache):
    """All rows of the set, in its order."""
    labels = emoji_labels(fetch(*LABELS, cache))
    rows, seen = [], set()
    for artist, (version, license, sha256) in sorted(ARTISTS.items()):
        print(f"drawing {artist} {version}", flush=True)
        icons = member(fetch(f"@iconify-json/{artist}@{version}", sha256, cache), "icons.json")
        for concept, icon in sorted(icons["icons"].items()):
            if concept not in labels or icon.get("hidden"):
                continue
            picture = draw({"left": 0, "top": 0, **icons, **icon})
            if picture.tobytes() in seen:
                continue
            seen.add(picture.tobytes())
            image = {"bytes": webp(picture), "path": f"{artist}/{concept}.webp"}
            family = "fluent" if artist.startswith("fluent") else artist
            group, subgroup = labels[concept]
            values = (image, concept, artist, family, group, subgroup, license)
            rows.append(dict(zip(COLUMNS, values, strict=False)))  # split follows below
    # A fifth of the concepts, drawn by chance, is for testing; then the same generator gives the order of the rows.
    chance = np.random.default_rng(0)
    concepts = sorted({row["concept"] for row in rows})
    test = {concepts[i] for i in chance.permutation(len(concepts))[: len(concepts) // 5]}
    for row in rows:
        row["split"] = "test" if row["concept"] in test else "train"
    return [rows[i] for i in chance.permutation(len(rows))]


def fetch(package, sha256, cache):
    """Path of the package's archive in the folder, brought by npm if it is not there, with the hash checked."""
    archive = cache / (package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
    if not archive.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise InputError(f"{package} is fetched by npm; install Node.js, or put {archive.name} into --cache DIR")
        cache.mkdir(parents=True, exist_ok=True)
        command = [npm, "pack", package, "--pack-destination", str(cache)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not archive.exists():
            reason = done.stderr.partition("\n")[0]
            raise InputError(f"`npm pack {package}` failed; see that npm reaches a registry: {reason}")
    if hashlib.sha256(archive.read_bytes()).hexdigest() != sha256:
        raise InputError(f"{archive} is not the package {package}: its SHA-256 differs; delete it and run this again")
    return archive


def member(archive, name):
    with tarfile.open(archive) as tar:
        return json.load(tar.extractfile(f"package/{name}"))


def emoji_labels(archive):
    """Label, as icons are named, to (group, subgroup): "four o'clock" is four-oclock. Neither parts nor flags."""
    groups = member(archive, "meta/groups.json")
    labels = {}
    for emoji in member(archive, "en/data.json"):
        group, subgroup = (groups[kind].get(str(emoji.get(kind[:-1]))) for kind in ("groups", "subgroups"))
        if group not in (None, "component", "flags"):
            # Letters outside ASCII part words too, so that the label of the pinata, spelt in Spanish, names no icon.
            name = emoji["label"].lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "")
            labels[re.sub("[^a-z0-9]+", "-", name).strip("-")] = (group, subgroup)
    return labels


def draw(icon):
    svg = SVG.format(*(icon[key] for key in ("left", "top", "width", "height", "body")))
    png = need("resvg_py").svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    picture = Image.new("RGBA", (SIZE, SIZE), "white")
    picture.alpha_composite(Image.open(io.BytesIO(png)).convert("RGBA"))
    return picture.convert("RGB")


def webp(picture):
    file = io.BytesIO()
    picture.save(file, "WEBP", lossless=True, method=6)
    return file.getvalue()


def pixels(row):
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"), dtype=np.int16)


def save(rows, path):
    pa, pq = need("pyarrow"), need("pyarrow.parquet")
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), *((name, pa.string()) for name in COLUMNS[1:])])
    # Small groups of rows, and no compression: the pictures are compressed, and readers can map the file.
    pq.write_table(pa.Table.from_pylist(rows, schema), path, compression="none", row_group_size=1000)


def load(path):
    try:
        return need("pyarrow.parquet").read_table(path).select(COLUMNS).to_pylist()
    except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are children of these
        raise InputError(f"--compare {path} is no emoji set: {error}") from error


def digest(rows):
    """SHA-256 of order, paths, labels and pixels; not of the WebP bytes, which another libwebp may pack otherwise."""
    state = hashlib.sha256()
    for row in rows:
        state.update("\t".join([row["image"]["path"], *(row[name] for name in COLUMNS[1:])]).encode())
        state.update(pixels(row).astype(np.uint8).tobytes())
    return state.hexdigest()


def compare(built, existing):
    """Print what differs between two sets; a row is known by its artist and concept."""
    one, two = ({(row["artist"], row["concept"]): row for row in rows} for rows in (built, existing))
    common = [key for key in two if key in one]
    print(
        f"rows: {len(common):,} in common, {len(one.keys() - two):,} only built, {len(two.keys() - one):,} only there"
    )
    print(f"order of the rows: {'the same' if list(one) == list(two) else 'another'}")
    if not common:
        return
    for name in COLUMNS[3:]:
        print(f"{name}: {sum(one[key][name] == two[key][name] for key in common):,} agree")
    paths, packed = (sum(one[key]["image"][k] == two[key]["image"][k] for key in common) for k in ("path", "bytes"))
    errors = np.array([np.abs(pixels(one[key]) - pixels(two[key])).mean() for key in common])
    print(f"path: {paths:,} agree; bytes: {packed:,} agree")
    print(f"pixels: {(errors == 0).sum():,} pictures are equal; mean absolute difference {errors.mean():.4f} of 255")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"emoji: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

"""The picture of the README: the first and the last neighbour sheet of a run, side by side.

python -m benchmarks.picture runs/demo docs/images/demo-neighbours.png
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw


def main(run, out):
    sheets = sorted((Path(run) / "neighbours").glob("step-*.png"))
    early, late = (Image.open(path) for path in (sheets[0], sheets[-1]))
    title = 24
    picture = Image.new("RGB", (early.width + late.width, early.height + title), "white")
    draw = ImageDraw.Draw(picture)
    for x, path, sheet in ((0, sheets[0], early), (early.width, sheets[-1], late)):
        draw.text((x + 6, 6), f"after {int(path.stem[5:])} steps", fill="black", font_size=14)
        picture.paste(sheet, (x, title))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(128).save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

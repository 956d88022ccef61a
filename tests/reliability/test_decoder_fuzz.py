"""Damaged pictures of every format and mode: pixels or a `BadImage`, in bounded time and memory, and never a crash.

300 in the suite, and NNCLR_FUZZ=50000 for a longer run. A mutation follows from its number.
"""

import io
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from nnclr.data import decode
from tests.data.test_decode import encoded, photo
from tests.reliability.bad_inputs import zeros_png

INPUTS = int(os.environ.get("NNCLR_FUZZ", "300"))
LIMIT = max(150, INPUTS // 20)  # seconds for the whole of it, see conftest
MOST_SECONDS = 2.0
MOST_BYTES = 600 << 20  # of addresses beyond what the process has with its libraries
REASONS = {"not_an_image", "truncated", "too_large", "unsupported_mode"}


def seeds():
    """Twelve small pictures, each of another format or mode."""
    picture, rng = photo(40, 30), np.random.default_rng(0)
    deep = Image.fromarray(rng.integers(0, 65536, (12, 9), dtype=np.uint16))
    floats = Image.fromarray(rng.normal(size=(12, 9)).astype(np.float32))
    return {
        "JPEG": encoded(picture, "JPEG"),
        "progressive JPEG": encoded(picture, "JPEG", progressive=True),
        "CMYK JPEG": encoded(picture.convert("CMYK"), "JPEG"),
        "PNG": encoded(picture),
        "palette PNG": encoded(picture.quantize(16), transparency=0),
        "16-bit PNG": encoded(deep),
        "WebP": encoded(picture, "WEBP"),
        "lossless WebP with alpha": encoded(picture.convert("RGBA"), "WEBP", lossless=True),
        "GIF": encoded(picture, "GIF", save_all=True, append_images=[photo(40, 30).rotate(180)]),
        "BMP": encoded(picture.convert("1"), "BMP"),
        "packed TIFF": encoded(picture.convert("RGBA"), "TIFF", compression="tiff_lzw"),
        "float TIFF": encoded(floats, "TIFF"),
    }


def mutated(files, number):
    """A file with some bits flipped, cut, or spliced with another file."""
    rng = random.Random(number)
    data = bytearray(files[number % len(files)])
    for _ in range(rng.randrange(1, 5)):
        how, at = rng.randrange(4), rng.randrange(len(data)) if data else 0
        if how == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1 and data:
            data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x00", b"\x80"])
        elif how == 2:
            del data[at:]
        else:
            other = rng.choice(files)
            start = rng.randrange(len(other))
            data[at : at + rng.choice([0, 60])] = other[start : start + rng.choice([20, len(other)])]
    return bytes(data)


def told(function, data):
    """What becomes of a file: `pixels`, a reason, or another error, and the seconds it took."""
    began = time.perf_counter()
    try:
        pixels = function(data)
        assert pixels.dtype == np.uint8
        assert pixels.shape[2:] == (3,)
        outcome = "pixels"
    except decode.BadImage as error:
        outcome = error.reason
    except Exception as error:  # noqa: BLE001 - any other is what is looked for
        outcome = f"{type(error).__name__}: {error}"
    return outcome, time.perf_counter() - began


def plain(data):
    """The control: what a loader without our decoder does."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def fuzz():
    """Outcomes and seconds of all inputs under a limit of memory; run in a process of its own."""
    used = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES,) * 2)
    files = list(seeds().values())
    ours = [told(decode.decode, mutated(files, number)) for number in range(INPUTS)]
    theirs = [told(plain, mutated(files, number))[0] for number in range(min(INPUTS, 300))]
    bomb = Path(sys.argv[1]).read_bytes()
    return {"ours": ours, "theirs": theirs, "bomb": [told(decode.decode, bomb)[0], told(plain, bomb)[0]]}


def test_only_bad_image_is_raised(tmp_path, count):
    (tmp_path / "bomb.png").write_bytes(zeros_png(9300, 4))  # below the limit at which Pillow warns
    code = "import json; from tests.reliability import test_decoder_fuzz; print(json.dumps(test_decoder_fuzz.fuzz()))"
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "bomb.png")]
    root = Path(__file__).parents[2]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert answer.returncode == 0, f"code {answer.returncode}: {answer.stderr[-2000:]}"
    found = json.loads(answer.stdout)
    outcomes, seconds = zip(*found["ours"], strict=True)
    fine = sum(outcome in REASONS | {"pixels"} for outcome in outcomes)
    count("B2", "damaged pictures that give pixels or a BadImage", fine, INPUTS)
    assert len(seeds()) == 12
    assert {outcome for outcome in outcomes if outcome not in REASONS} <= {"pixels"}
    assert max(seconds) <= MOST_SECONDS
    share = outcomes.count("pixels") / INPUTS
    assert 0.1 < share < 0.9  # the mutations are neither harmless nor hopeless
    assert len(set(outcomes)) >= 3
    others = [outcome for outcome in found["theirs"] if outcome not in REASONS | {"pixels"}]
    assert len(others) > 30  # the control: errors that no loader expects
    assert len({outcome.partition(":")[0] for outcome in others}) >= 2
    assert found["bomb"][0] == "too_large"
    assert found["bomb"][1].startswith("MemoryError")  # the limit of memory is one

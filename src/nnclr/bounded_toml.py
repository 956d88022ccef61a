"""TOML of a run folder, a recipe or a sweep, which may be anybody's: read within bounds of memory and time."""

import tomllib
from typing import Any

_MOST_BYTES = 1 << 16  # ours have 2 KiB
_MOST_DOTS = 200  # in a line; the standard library's time for a dotted key grows with the square of its parts


def parse_toml(content: bytes) -> dict[str, Any]:
    """The values of a TOML file; a name that comes twice is an error, and values are data of TOML's types alone.

    Raises:
        ValueError: if it is no TOML, no UTF-8, or longer or deeper than any config.
    """
    if len(content) > _MOST_BYTES:
        raise ValueError(f"it has {len(content)} bytes, and a config at most {_MOST_BYTES}")
    if any(line.count(b".") > _MOST_DOTS for line in content.splitlines()):
        raise ValueError(f"a line of it has more than {_MOST_DOTS} dots")
    try:
        return tomllib.loads(content.decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None

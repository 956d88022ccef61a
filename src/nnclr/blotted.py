"""Texts that are kept or shown, without the secrets that people write into addresses and commands."""

import re
from collections.abc import Sequence

_HIDDEN = "…"


def without_secrets(text: str) -> str:
    """Text with passwords in addresses, and the values of what is called token or the like, blotted out."""
    text = re.sub(r"(://)[^\s/@'\"]+@", rf"\1{_HIDDEN}@", text)
    # Bounded, since the time of an open end before the word would grow with the square of a hostile text.
    name = r"(?:token|password|passwd|secret|api[_-]?key)[\w-]{0,64}"
    value = r"[^\s'\",&]+"
    text = re.sub(rf"(?i)({name}['\"]?\s{{0,9}}[=:]\s{{0,9}}['\"]?){value}", rf"\1{_HIDDEN}", text)
    flag = rf"(?<![\w-])--?[\w-]{{0,64}}{name}['\"]?,?\s{{1,9}}['\"]?"
    return re.sub(rf"(?i)({flag}){value}", rf"\1{_HIDDEN}", text)


def command_without_secrets(words: Sequence[str]) -> list[str]:
    """The words of a command line, likewise, also where the secret is a word of its own."""
    return without_secrets("\n".join(word.replace("\n", " ") for word in words)).split("\n")

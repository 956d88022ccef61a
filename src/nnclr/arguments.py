"""The words after a verb as its options; the first mistake in them is answered in one plain sentence.

tyro reads the words and prints the help. What it says of a mistake is a framed box in Python's terms, so that where
it refuses, the words are gone through once more here to say which one is wrong.
"""

import contextlib
import dataclasses
import io
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from nnclr.errors import InputError
from nnclr.suggestion import did_you_mean

Options = TypeVar("Options")
_KINDS = {int: "a whole number", float: "a number"}
_TRUTH = ("true", "false")
_NUMBERS = ("-inf", "-infinity", "-nan")  # that look like flags
_registry = tyro.constructors.ConstructorRegistry()


def parse(kind: type[Options], words: Sequence[str], verb: str, **settings: Any) -> Options:
    """The options that the words stand for.

    Args:
        kind: a dataclass whose fields are the options.
        words: what stands behind the verb on the command line.
        verb: for the help and for messages.
        **settings: further arguments of `tyro.cli`.

    Raises:
        InputError: naming the first word that is wrong, or what is missing.
        SystemExit: after --help was printed.
    """
    made = options_of(kind, settings.get("default"))
    words = without_truth_values(made, words)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # where tyro draws its box
            options: Options = tyro.cli(kind, args=words, prog=f"nnclr {verb}", registry=_registry, **settings)
            return options
    except SystemExit as left:
        if not left.code:
            raise
    wrong = mistake(made, words, verb) or f"nnclr {verb} does not understand these arguments"
    raise InputError(wrong if wrong.endswith("?") else f"{wrong}; see nnclr {verb} --help")


@_registry.primitive_rule
def _or_none(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """A value that may be left out: the help shows the value alone, where tyro writes `{None}|STR`."""
    if NoneType not in get_args(info.type) or tyro.conf.DisallowNone in info.markers:
        return None
    markers = info.markers | {tyro.conf.DisallowNone}
    value = tyro.constructors.ConstructorRegistry.get_primitive_spec(dataclasses.replace(info, markers=markers))
    if isinstance(value, tyro.constructors.UnsupportedTypeAnnotationError):
        return None
    choices = value.choices and ("None", *(choice for choice in value.choices if choice != "None"))
    made, shown = value.instance_from_str, value.metavar
    return dataclasses.replace(
        value,
        # A fixed number of values or one None would let the parser take the word behind them, too.
        nargs=max(value.nargs) if isinstance(value.nargs, tuple) else value.nargs,
        metavar=shown[1:-1] if shown.startswith(("{[", "{FLOAT ")) else shown,
        choices=choices,
        instance_from_str=lambda words: None if words == ["None"] else made(words),
    )


@dataclasses.dataclass(frozen=True)
class Option:
    """What one field takes on the command line."""

    names: tuple[str, ...]  # its flags, or the word that stands for it in the usage
    positional: bool
    needed: bool
    several: bool  # any number of values,
    count: int | None  # or so many
    switch: bool  # no value
    kind: Any  # of a value: str, int or float
    choices: tuple[str, ...]  # empty: anything of that kind
    may_be_none: bool

    def refusal(self, values: Sequence[str]) -> str | None:
        """The first value that is wrong, and why."""
        if self.may_be_none and values == ["None"]:
            return None
        for value in values:
            if self.choices and value not in self.choices:
                return f"{value} is not one of {', '.join(self.choices)}"
            try:
                self.choices or self.kind(value)
            except ValueError:
                return f"{value} must be {_KINDS[self.kind]}"
        return None


def options_of(kind: Any, default: Any = None) -> tuple[Option, ...]:
    """The options of a dataclass as tyro understands them; the defaults are those of an instance, if there is one."""
    return tuple(_options(kind, default))


def _options(kind: Any, default: Any) -> Iterator[Option]:
    annotated, plain = get_type_hints(kind, include_extras=True), get_type_hints(kind)
    for field in dataclasses.fields(kind):
        extras, inner = getattr(annotated[field.name], "__metadata__", ()), plain[field.name]
        said = next((extra for extra in extras if hasattr(extra, "metavar")), None)
        may_be_none = NoneType in get_args(inner)
        if get_origin(inner) in (Union, UnionType):
            inner = next(part for part in get_args(inner) if part is not NoneType)
        several = get_origin(inner) is tuple
        count = len(get_args(inner)) if several and Ellipsis not in get_args(inner) else None
        inner = get_args(inner)[0] if several else inner
        choices = get_args(inner) if get_origin(inner) is Literal else ()
        name = (said and said.name) or field.name.replace("_", "-")
        positional, switch = tyro.conf.Positional in extras, inner is bool
        names = [(said and said.metavar) or name.upper()] if positional else [f"--{name}"]
        names += [*((said and said.aliases) or ()), *([f"--no-{name}"] if switch else ())]
        value = field.default if default is None else getattr(default, field.name)
        needed = value in (dataclasses.MISSING, tyro.MISSING) and not (positional and several)
        yield Option(tuple(names), positional, needed, several, count, switch, inner, choices, may_be_none)


def without_truth_values(options: Sequence[Option], words: Sequence[str]) -> list[str]:
    """The words with `--switch` for `--switch True` and `--no-switch` for `--switch False`, as config files put it."""
    switches = {name for option in options if option.switch for name in option.names if not name.startswith("--no-")}
    rest, plain = deque(words), []
    while rest:
        word = rest.popleft()
        name, *values = _split(word, {})
        if name in switches and not values and rest and rest[0].lower() in _TRUTH:
            values = [rest.popleft()]
        if name in switches and values and values[0].lower() in _TRUTH:
            word = name if values[0].lower() == "true" else f"--no-{name[2:]}"
        plain.append(word)
        if word == "--":
            break
    return [*plain, *rest]


def mistake(options: Sequence[Option], words: Sequence[str], verb: str) -> str | None:
    """The first mistake in the words behind a verb, or None; see `parse`."""
    flags = {name: option for option in options if not option.positional for name in option.names}
    places = deque(option for option in options if option.positional)
    missing = [option for option in options if option.needed]
    rest, ended = deque(words), False
    while rest:
        word = rest.popleft()
        if word == "--" and not ended:
            ended = True
            continue
        values: list[str] = []
        if _is_flag(word) and not ended:
            name, *values = _split(word, flags)
            if name not in flags:
                return f"{name} is no flag of nnclr {verb}{did_you_mean(name, flags)}"
            option = flags[name]
        elif places:
            option = places.popleft()
            name = option.names[0]
            rest.appendleft(word)
        else:
            return f"'{word}' is one word too many for nnclr {verb}"
        missing = [other for other in missing if other is not option]
        if option.switch:
            if values:
                return f"{name} takes no value"
            continue
        reserved = sum(place.needed for place in places)  # words that a list of values leaves to what must follow
        while rest and (not values or option.several) and (ended or not _is_flag(rest[0])):
            if option.several and (len(rest) <= reserved or len(values) == option.count):
                break
            values.append(rest.popleft())
        if not values and not option.several:
            return f"{name} lacks its value"
        if option.count is not None and len(values) != option.count:
            return f"{name} takes {option.count} values, not {len(values)}"
        if option.positional and len(option.choices) == 1 and values[0] not in option.choices:
            return f"nnclr {verb} must be followed by the word {option.choices[0]}, not by {values[0]}"
        if refusal := option.refusal(values):
            return f"{name} {refusal}"
    return f"nnclr {verb} needs {' and '.join(option.names[0] for option in missing)}" if missing else None


def _is_flag(word: str) -> bool:
    """Whether a word is meant as a flag; -5 is a number."""
    return word == "--" or (word.startswith("-") and word.lstrip("-")[:1].isalpha() and word.lower() not in _NUMBERS)


def _split(word: str, flags: Mapping[str, Any]) -> list[str]:
    """A flag as the help writes it, and its value where that is in the same word: --k=5, -k5."""
    if word[:2] in flags and len(word) > 2:
        return [word[:2], word[2:].removeprefix("=")]
    name, *value = word.split("=", 1)
    return [name.replace("_", "-"), *value]

"""What somebody may have meant by a setting that does not exist."""

import difflib
from collections.abc import Iterable

_ELSEWHERE = {  # what timm, lightly, solo-learn and others call it
    "arch": "backbone",
    "bs": "batch_size",
    "lr": "learning_rate",
    "max_epochs": "epochs",
    "memory_bank_size": "support_set_size",
    "method": "objective",
    "model": "backbone",
    "output": "out",
    "queue_size": "support_set_size",
    "tau": "temperature",
    "wd": "weight_decay",
    "workers": "num_workers",
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, where X is one of those known: by what others call it, or by its letters; else nothing.

    Args:
        name: as it was given; of flags with their dashes.
        known: settings, or flags with their dashes.
    """
    plain = {one.lstrip("-").replace("-", "_"): one for one in known}
    asked = name.lstrip("-").replace("-", "_")
    near = [_ELSEWHERE[asked]] if _ELSEWHERE.get(asked) in plain else difflib.get_close_matches(asked, plain, 1, 0.5)
    return f"; did you mean {plain[near[0]]}?" if near else ""

"""Features and labels to numbers: the evaluation protocols, one result record for all."""

import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nnclr.evaluation.protocols as _protocols
from nnclr.data.ahead import threads_for
from nnclr.encoder import Encoder
from nnclr.errors import InputError
from nnclr.evaluation.finetune import finetune as _finetune
from nnclr.evaluation.label_curve import label_curve as _label_curve
from nnclr.evaluation.linear import linear as _linear
from nnclr.evaluation.result import Result, versions
from nnclr.evaluation.task import Outcome, Task
from nnclr.evaluation.transfer import transfer as _transfer
from nnclr.exact import repeatable_convolutions
from nnclr.pretrained import open_encoder

# Under other names here, so that `nnclr.evaluation.knn` and its like remain the modules.
PROTOCOLS: dict[str, Callable[..., Outcome]] = {
    "knn": _protocols.knn,
    "linear": _linear,
    "logistic": _protocols.logistic,
    "finetune": _finetune,
    "transfer": _transfer,
    "label-free": _protocols.label_free,
    "retrieval": _protocols.retrieval,
    "few-shot": _protocols.few_shot,
    "label-curve": _label_curve,
}


_WHOLE = {"k", "epochs", "shots", "budgets", "repeats"}
_NUMBERS = {"temperature", "learning_rates", "strengths", "fraction"}
_LISTS = {"learning_rates", "strengths", "shots", "budgets"}
_ONE_OR_MORE = {"k", "temperature"}


def evaluate(
    encoder: Encoder | str | Path,
    data: Any,
    test: Any = None,
    *,
    protocol: str = "knn",
    num_workers: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
    **parameters: Any,
) -> Result:
    """Measure an encoder on labelled images.

    In a job of several ranks all of them call it together: they share the embedding, and each gets the result.

    Args:
        encoder: an `Encoder`, or anything that `nnclr.open_encoder` takes: a run or encoder folder, `timm:NAME`,
            `torchvision:NAME`, `random:BACKBONE`, `pixels`.
        data: images that the protocol may learn from, in any form that `nnclr pretrain` takes; for `transfer` the
            folder that holds the data sets.
        test: labelled images to be scored; else the data's own test split, else a tenth of each class.
        protocol: one of `PROTOCOLS`; each function there says what its parameters are.
        num_workers: threads that decode; None for one a core, up to eight.
        seed: of splits, orders and resampling.
        say: is told how far it is, a line now and then.
        **parameters: of the protocol, for example `k` and `temperature` of knn.

    Returns:
        A `Result`; evaluating twice gives the same value. The network is in evaluation mode and float32 whatever the
        state of the module, which is left as it was.

    Raises:
        InputError: if the protocol or a parameter of it is unknown, there are no labels, or the classes differ.
        DataError: if no image can be read.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"no protocol is called '{protocol}'; there are {', '.join(PROTOCOLS)}")
    check_parameters(protocol, parameters)
    if (num_workers is not None and num_workers < 0) or seed < 0:
        raise InputError(f"num_workers={num_workers} and seed={seed} must be at least 0")
    began = time.perf_counter()
    encoder = open_encoder(encoder)
    workers = threads_for(None) if num_workers is None else num_workers
    task = Task(encoder, data, test, workers, seed, say or (lambda text: None))
    with repeatable_convolutions():
        outcome = PROTOCOLS[protocol](task, **parameters)
    return Result(
        metric=outcome.metric,
        value=outcome.value,
        protocol=protocol,
        parameters=outcome.parameters,
        data=outcome.train.name,
        test=outcome.test.name,
        data_fingerprint=outcome.train.fingerprint,
        test_fingerprint=outcome.test.fingerprint,
        n_train=outcome.n_train,
        n_test=outcome.n_test,
        encoder=encoder.fingerprint,
        encoder_name=encoder.name or type(encoder.module).__name__,
        preprocessing=encoder.preprocessing,
        step=encoder.provenance.get("step"),
        seed=seed,
        seconds=time.perf_counter() - began,
        versions=versions(),
        interval=outcome.interval,
        interval_method=outcome.interval_method,
        details=outcome.details,
    )


def check_parameters(protocol: str, parameters: dict[str, Any]) -> None:
    """Raise the InputError for a parameter that the protocol does not have, or whose value cannot be used."""
    known = [name for name in inspect.signature(PROTOCOLS[protocol]).parameters if name != "task"]
    unknown = sorted(parameters.keys() - set(known))
    if unknown:
        there = f"it takes {', '.join(known)}" if known else "it takes none"
        raise InputError(f"{unknown[0]} is no parameter of {protocol}; {there}")
    for name, value in parameters.items():
        if name not in _WHOLE | _NUMBERS or value is None:
            continue
        number = "a whole number above 0" if name in _WHOLE else "a number above 0"
        if name in _ONE_OR_MORE:
            number += ", or several"
        listed = isinstance(value, (list, tuple))
        if listed and name not in _LISTS | _ONE_OR_MORE:
            raise InputError(f"{name} must be {number}, not a list")
        if name in _LISTS and not (listed and value):
            raise InputError(f"{name} must be a list, each entry {number}")
        if listed and not value:
            raise InputError(f"{name} is an empty list; it must be {number}")
        kinds: tuple[type, ...] = (int,) if name in _WHOLE else (int, float)
        for one in value if listed else (value,):
            if type(one) not in kinds or not 0 < one < float("inf"):
                kind = "" if isinstance(one, (int, float, str)) else f" of type {type(one).__name__}"
                raise InputError(f"{name}={one}{kind} must be {number}")

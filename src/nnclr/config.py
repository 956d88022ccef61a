"""The configuration of a pre-training run: one frozen dataclass, TOML in and out.

Every field is a flag of `nnclr pretrain` (underscores become dashes), a keyword of `nnclr.pretrain` and a
key of a preset or of a run folder's `config.toml`. Defaults of the method are the paper's.
"""

import dataclasses
import difflib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin, get_type_hints

import tyro

from nnclr.blotted import without_secrets
from nnclr.bounded_toml import parse_toml
from nnclr.errors import InputError
from nnclr.objectives import OBJECTIVES, Objective, find_objective
from nnclr.suggestion import did_you_mean

# Fields that may differ when a run is resumed: they change where things are, what is looked at and how
# often, but no bit of the weights. The images themselves are compared by fingerprint instead of by name.
RESUME_MAY_CHANGE = frozenset(
    "data out preset test_data device num_workers checkpoint_every_steps log_every_steps "
    "evaluate_every_epochs knn_k knn_temperature log_to extend_epochs shard_support_set recompute fsdp".split()
)


@dataclass(frozen=True)
class Config:
    """Everything a pre-training run depends on; `check` says in words what is wrong with it."""

    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]
    """Images: a folder at any depth, FILE.parquet[?split=train&label=COLUMN], torchvision:NAME, or demo-photos."""
    out: str
    """Run folder; a run that is already there is resumed."""
    preset: str | None = None
    """Recipe to start from; every flag given beside it wins over it."""
    test_data: str | None = None
    """Labelled images for the online kNN; else the data's own test split, else a hold-out of the data."""
    objective: str = "nnclr"
    """Training objective by name (docs/methods.md lists them), or MODULE:CLASS for one of your own."""
    backbone: str = "resnet50"
    """Any timm or torchvision architecture (resnet18, timm/vit_small_patch16_224, ...) or small-convnet."""
    image_size: int = 224
    """Pixels of a view; up to 64 a ResNet gets a 3x3 stem and the augmentation its small-image form."""
    epochs: float = 100.0
    """Length of the run, in passes over the data."""
    extend_epochs: float = 0.0
    """Epochs added to a run; the cosine is laid anew over the whole, so the learning rate rises again."""
    batch_size: int = 256
    """Images a step, over all devices; the paper's best run has 4096."""
    grad_cache: int | None = None
    """Images whose activations are kept at a time: the exact loss of the whole batch in less memory, a third slower."""
    recompute: bool = False
    """Keep what goes into each block of the backbone, and compute its activations again in the backward."""
    fsdp: bool = False
    """Keep a share of the backbone, its averages and moments on each process (FSDP), for large transformers."""
    sync_bn_group: int | None = None
    """Processes that share the statistics of batch norms on CUDA; default all of the job."""
    augmentation: Literal["byol", "simclr", "simsiam", "crop-only", "multi-crop"] = "byol"
    """Augmentation policy: byol is the paper's; multi-crop adds small views; the next fields change it in all views."""
    crop_min_scale: float | None = None
    """Smallest share of the image's area that a crop covers; default the policy's, and 0.2 up to 64 pixels."""
    flip: float | None = None
    """Probability of a left-right flip; default the policy's, as for the next fields."""
    jitter: float | None = None
    """Probability of colour jitter."""
    jitter_strengths: tuple[float, float, float, float] | None = None
    """Colour jitter: brightness, contrast, saturation times 1 +- these, hue +- the last, in turns, at most 0.5."""
    grayscale: float | None = None
    """Probability of a grey picture."""
    blur: float | None = None
    """Probability of Gaussian blur."""
    solarize: float | None = None
    """Probability of solarising (inverting what is bright)."""
    crop_max_ratio: float | None = None
    """Largest width over height of a crop, and height over width; default the policy's, 4/3."""
    blur_max_sigma: float | None = None
    """Largest standard deviation of the blur in pixels, at least 0.1; default the policy's, 2."""
    solarize_threshold: float | None = None
    """Values from this on are inverted by solarising; default the policy's, 0.5."""
    small_views: int = 6
    """Small views beside the two large ones (multi-crop)."""
    small_view_size: int | None = None
    """Pixels of a small view (multi-crop); default 96 / 224 of the image size."""
    small_crop_min_scale: float = 0.05
    """Smallest share of the image's area that a small view covers (multi-crop)."""
    small_crop_max_scale: float = 0.14
    """Largest share of the image's area that a small view covers (multi-crop)."""
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"
    """Optimiser; biases and normalisation layers take neither weight decay nor LARS scaling."""
    learning_rate: float = 0.3
    """Peak learning rate per 256 images: the run uses learning_rate * batch_size / 256."""
    momentum: float = 0.9
    """Momentum of LARS and SGD."""
    weight_decay: float = 1e-6
    """Weight decay."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up before the cosine decay to 0; default the paper's 10, but at most a tenth of the run."""
    clip_grad_norm: float | None = None
    """Largest gradient norm; longer gradients are scaled down to it."""
    temperature: float = 0.1
    """Temperature of the softmax."""
    support_set_size: int | None = None
    """Embeddings in the support set; default the paper's 98304, at most half of the images, at least a batch."""
    shard_support_set: bool = False
    """Keep a share of the support set on each process instead of all of it on each: for sets of millions."""
    embedding_dim: int = 256
    """Width of the embeddings that are contrasted."""
    projector_hidden_dim: int = 2048
    """Hidden width of the projection head."""
    predictor_hidden_dim: int = 4096
    """Hidden width of the prediction head."""
    neighbour: Literal["nearest", "kth", "random", "soft", "oracle"] = "nearest"
    """Positive of nnclr: nearest; kth nearest; random one of the k nearest; soft mean of these; oracle (same label)."""
    neighbour_k: int | None = None
    """Neighbours k of kth, random and soft, of msf, snclr or all4one; default the objective's own, 1 for nnclr."""
    exclude_own_id: bool = False
    """Never take an older embedding of the image itself as its neighbour."""
    enqueue_both_views: bool = False
    """Write both views to the support set, not only view 1."""
    replacement: Literal["fifo", "random"] = "fifo"
    """Entries that a full support set gives up: the oldest, or random ones."""
    use_predictor: bool = True
    """Prediction head of nnclr; without it the embeddings themselves are contrasted."""
    transpose_loss: bool = False
    """Add the softmax over the columns of nnclr's similarity matrix (the paper's symmetric loss)."""
    decoupled_loss: bool = False
    """Leave the positive out of the softmax's denominator (DCL)."""
    ema_momentum: float | None = None
    """Momentum of averaged (EMA) weights for look-up or targets; default the objective's own, none for nnclr."""
    off_diagonal_weight: float = 0.0051
    """Weight of the correlations between features (barlow-twins)."""
    prototypes: int = 3000
    """Number of clusters (swav)."""
    swav_queue_size: int = 3840
    """Earlier embeddings that help swav to balance small batches; 0 for none."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 autocast or fp32; auto is bf16 where the device computes in it. Look-up and loss are fp32."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    num_workers: int | None = None
    """Threads that decode images that are too large to stay on the device; 0 decodes each batch when it is due."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    checkpoint_every_steps: int = 500
    """Steps between checkpoints; there is always one at the end and at a stop."""
    log_every_steps: int = 20
    """Steps between lines of metrics.jsonl."""
    evaluate_every_epochs: float = 5.0
    """Epochs between online evaluations (kNN with labels, neighbour picture); 0 for none."""
    knn_k: int = 20
    """Neighbours that vote in the online kNN."""
    knn_temperature: float = 0.07
    """Temperature of the votes in the online kNN."""
    log_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Tools that get every line of metrics.jsonl and evaluations.jsonl as well, several with spaces between them."""

    def check(self) -> Self:
        """Return the config itself.

        Raises:
            InputError: naming the first field whose value cannot be used, and what it may be.
        """
        hints = get_type_hints(Config)
        for field in dataclasses.fields(self):
            choices = _choices(hints[field.name])
            value = getattr(self, field.name)
            for chosen in value if isinstance(value, tuple) else (value,):
                if choices and chosen not in choices:
                    raise InputError(f"{field.name}={chosen!r} is not one of {', '.join(choices)}")
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            low, strict = _LOWEST.get(field.name, (0, False))
            if not (value > low if strict else value >= low) or value == float("inf"):
                bound = "above" if strict else "at least"
                raise InputError(f"{field.name}={value} must be a finite number {bound} {low}")
        if self.seed >= 2**63:
            raise InputError(f"seed={self.seed} must be below 2**63")
        if self.momentum >= 1:
            raise InputError(f"momentum={self.momentum} must be below 1")
        if self.warmup_epochs is not None and self.warmup_epochs > self.epochs:
            raise InputError(f"warmup_epochs={self.warmup_epochs} is longer than the run of epochs={self.epochs}")
        if self.small_crop_min_scale > self.small_crop_max_scale:
            raise InputError(
                f"small_crop_min_scale={self.small_crop_min_scale} is above "
                f"small_crop_max_scale={self.small_crop_max_scale}"
            )
        if self.fsdp and self.optimizer != "adamw":
            raise InputError(f"fsdp=True needs optimizer=adamw: that of {self.optimizer} does not work on shares")
        if self.fsdp and self.grad_cache is not None:
            raise InputError("fsdp=True and grad_cache exclude each other; recompute goes with both")
        if self.grad_cache is not None and self.grad_cache > self.batch_size:
            raise InputError(f"grad_cache={self.grad_cache} is above batch_size={self.batch_size}; leave it out")
        if self.neighbour in ("kth", "random", "soft") and self.neighbour_k is None:
            raise InputError(f"neighbour={self.neighbour} needs a neighbour_k: how many neighbours it is about")
        strengths = self.jitter_strengths
        if strengths is not None and not (
            len(strengths) == 4
            and all(type(value) in (int, float) and 0 <= value < float("inf") for value in strengths)
            and strengths[3] <= _MOST_HUE
        ):
            raise InputError(
                f"jitter_strengths={strengths} must be four numbers from 0 on, for brightness, contrast, saturation "
                f"and hue, the last at most {_MOST_HUE}"
            )
        for name, most in _HIGHEST.items():
            value = getattr(self, name)
            if value is not None and value > most:
                raise InputError(f"{name}={value} must be at most {most:g}")
        return self


# The lowest value of a number, and whether it is excluded; 0 included for those that are not named.
_LOWEST: dict[str, tuple[float, bool]] = {
    "image_size": (8, False),
    "epochs": (0, True),
    "batch_size": (2, False),
    "grad_cache": (1, False),
    "sync_bn_group": (1, False),
    "small_view_size": (8, False),
    "small_crop_min_scale": (0, True),
    "crop_max_ratio": (1, False),
    "blur_max_sigma": (0.1, False),
    "small_crop_max_scale": (0, True),
    "crop_min_scale": (0, True),
    "learning_rate": (0, True),
    "clip_grad_norm": (0, True),
    "temperature": (0, True),
    "support_set_size": (1, False),
    "embedding_dim": (1, False),
    "projector_hidden_dim": (1, False),
    "predictor_hidden_dim": (1, False),
    "checkpoint_every_steps": (1, False),
    "log_every_steps": (1, False),
    "neighbour_k": (1, False),
    "prototypes": (2, False),
    "knn_k": (1, False),
    "knn_temperature": (0, True),
}

# The highest value of a share or a probability.
_HIGHEST = dict.fromkeys(
    "crop_min_scale small_crop_min_scale small_crop_max_scale flip jitter grayscale blur solarize "
    "solarize_threshold ema_momentum".split(),
    1.0,
)
_MOST_HUE = 0.5


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values of a field that takes one, or several, of a few; else nothing."""
    inner = get_args(hint)[0] if get_origin(hint) is tuple else hint
    return get_args(inner) if get_origin(inner) is Literal else ()


def _typed(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Check names and types; whole numbers are accepted where a float is meant.

    Raises:
        InputError: for an unknown name (with the nearest good one) or a value of another type.
    """
    hints = get_type_hints(Config)
    typed = {}
    for name, value in values.items():
        if name not in hints:
            raise InputError(f"{where}: no setting is called '{name}'{did_you_mean(name, hints)}")
        kind = get_origin(hints[name])
        allowed = {str if kind is Literal else tuple} if _choices(hints[name]) else set(get_args(hints[name]))
        allowed = {get_origin(one) or one for one in allowed or {hints[name]}}
        if float in allowed and type(value) is int:
            value = float(value)
        if tuple in allowed and type(value) is list:
            value = tuple(value)
        if type(value) not in allowed:
            expected = next(kind for kind in allowed if kind in _NAMES)
            raise InputError(f"{where}: {name}={value!r} must be {_NAMES[expected]}")
        typed[name] = value
    return typed


_NAMES = {float: "a number", int: "a whole number", str: "text", bool: "true or false", tuple: "a list"}


def make_config(data: str, out: str, preset: str | None = None, **fields: Any) -> Config:
    """A checked Config from keywords laid over a preset laid over the defaults.

    Where another objective than the preset's is asked for, what the preset says to its own one is dropped.

    Raises:
        InputError: for an unknown preset, an unknown field, a value that cannot be used, or a setting of another
            objective.
    """
    values = load_preset(preset) if preset is not None else {}
    fields = _typed(fields, "settings")
    theirs = values.get("objective", Config.objective)
    name = fields.get("objective", theirs)
    unused = own_fields() - set(_objective(name).settings)
    if name != theirs:  # what the preset says to its own objective
        values = {key: value for key, value in values.items() if key not in unused}
    if {"epochs", "warmup_epochs"} & fields.keys() == {"epochs"} and "warmup_epochs" in values:
        # The preset's warm-up is that of its own length; a short try of it warms up for a tenth.
        values["warmup_epochs"] = min(values["warmup_epochs"], 0.1 * fields["epochs"])
    for key in sorted(unused):
        given = {**values, **fields}.get(key, getattr(Config, key))
        if given != getattr(Config, key):
            raise InputError(f"{key}={given!r} is no setting of {name}; leave it out")
    for condition, keys in _WITHOUT_EFFECT.items():
        switch, needed = condition
        if fields.get(switch, values.get(switch, getattr(Config, switch))) not in needed:
            for key in keys:
                if fields.get(key, getattr(Config, key)) != getattr(Config, key):
                    raise InputError(f"{key}={fields[key]!r} has no effect without {switch}={' or '.join(needed)}")
    return Config(**values | fields | {"data": data, "out": out, "preset": preset}).check()


# (field, values) -> fields that do nothing where it has another value.
_WITHOUT_EFFECT = {
    ("augmentation", ("multi-crop",)): (
        "small_views",
        "small_view_size",
        "small_crop_min_scale",
        "small_crop_max_scale",
    ),
    ("optimizer", ("lars", "sgd")): ("momentum",),
}


def own_fields() -> set[str]:
    """Fields that belong to objectives: each takes those that its `settings` names."""
    return {field for kind in OBJECTIVES.values() for field in kind.settings} - {"labels"}


def _objective(name: str) -> type[Objective]:
    try:
        kind = find_objective(name)
    except ValueError as error:
        raise InputError(str(error)) from error
    settings: Any = kind.settings  # of a class of one's own
    if isinstance(settings, str):
        raise InputError(f"the objective {name} has settings={settings!r}, a text; make it a tuple of names")
    unknown = set(kind.settings) - {field.name for field in dataclasses.fields(Config)} - {"labels"}
    if unknown:
        raise InputError(f"the objective {name} has a setting '{min(unknown)}' that is no field of the configuration")
    return kind


def presets() -> list[str]:
    """Names of the shipped recipes."""
    folder = resources.files("nnclr") / "presets"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_preset(name: str) -> dict[str, Any]:
    """The fields that a shipped recipe, or a TOML file of your own, sets.

    Raises:
        InputError: if there is no such recipe, or it names an unknown field.
    """
    if name in presets():
        return _parse((resources.files("nnclr") / "presets" / f"{name}.toml").read_bytes(), f"preset {name}")
    if name.endswith(".toml") and Path(name).is_file():
        values = _parse(Path(name).read_bytes(), name)
        if "preset" in values and "out" not in values:  # in the config.toml of a run it is history
            raise InputError(
                f"{name}: a recipe cannot build on preset={values['preset']!r}; copy the lines of that one"
            )
        return values
    near = difflib.get_close_matches(name, presets(), n=1, cutoff=0.3)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(f"no preset is called '{name}'; {hint}there are {', '.join(presets())}, or name a .toml file")


def _parse(text: bytes, where: str) -> dict[str, Any]:
    try:
        values = parse_toml(text)
    except ValueError as error:
        raise InputError(f"{where} is not valid TOML: {error}") from error
    return _typed(values, where)


def to_toml(config: Config) -> str:
    """The config as TOML, one line a field; fields that are None, and secrets in addresses of data, are left out."""
    values = dataclasses.asdict(config)
    for name in ("data", "test_data"):  # which a resumed run is given anew
        values[name] = values[name] and without_secrets(values[name])
    lines = [f"{name} = {_toml(value)}" for name, value in values.items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml(value: str | bool | int | float | tuple[str | float, ...]) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = value.encode("utf-8", "backslashreplace").decode()
        return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON in ASCII has halves of characters
    return repr(value)


def from_toml(text: bytes, where: str) -> Config:
    """The config that `to_toml` wrote.

    Raises:
        InputError: if the text is no valid config.
    """
    values = _parse(text, where)
    missing = {"data", "out"} - values.keys()
    if missing:
        raise InputError(f"{where} lacks {', '.join(sorted(missing))}")
    return Config(**values).check()


def differences(old: Config, new: Config) -> list[str]:
    """One line for each field that differs and that a resumed run must not change."""
    return [
        "{}: {} there, {} now".format(field.name, *_short(getattr(old, field.name), getattr(new, field.name)))
        for field in dataclasses.fields(Config)
        if field.name not in RESUME_MAY_CHANGE and getattr(old, field.name) != getattr(new, field.name)
    ]


def _short(old: Any, new: Any) -> tuple[str, str]:
    """Two values as they were written, 0.3 and not 0.30000000000000004, if that tells them apart."""
    one, two = (repr(float(f"{value:.10g}") if isinstance(value, float) else value) for value in (old, new))
    return (one, two) if one != two else (repr(old), repr(new))

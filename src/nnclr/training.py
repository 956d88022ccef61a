"""Pre-training: the loop, top to bottom on one page, and what it needs to start, stop and start again."""

import dataclasses
import os
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnclr import checkpoint, distributed, memory, run_folder, tracking
from nnclr.config import Config, differences, from_toml, make_config, to_toml
from nnclr.counter import step_seed
from nnclr.data.augment import View, policy
from nnclr.data.images import Source
from nnclr.data.loader import Loader, Plan, create_loader
from nnclr.data.source import open_source, refuse_inside, test_split
from nnclr.device import choose_device, choose_precision, view_dtype
from nnclr.errors import InputError, NoCheckpointError, Stopped, StorageError, place_outside
from nnclr.evaluation.online import OnlineKNN
from nnclr.exact import repeatable_convolutions
from nnclr.interrupt import StopRequest
from nnclr.models.backbone import class_scores, create_backbone, feature_dim
from nnclr.models.blocks import repeated_blocks
from nnclr.models.cuda_graphs import AllViews, in_few_launches
from nnclr.models.ema import average_of, averaged_features, momentum_at, update_average
from nnclr.models.recompute import check_recompute, in_little_memory
from nnclr.objectives import Objective, default_of, find_objective, name_of
from nnclr.optim import clip, create_optimizer, guarded_step, learning_rate
from nnclr.recorder import Recorder
from nnclr.run_folder import Run
from nnclr.skipped_steps import StepCheck, Undo
from nnclr.train_state import TrainState, frozen_copy

PAPER_SUPPORT_SET = 98_304


def pretrain(
    data: Any,
    out: str | Path,
    *,
    preset: str | None = None,
    test_data: Any = None,
    backbone: str | nn.Module | None = None,
    objective: str | type[Objective] | None = None,
    quiet: bool = False,
    **fields: Any,
) -> Run:
    """Train a backbone without labels, or go on with the run that is in `out`.

    Args:
        data: a folder, a list of folders or of pictures, `FILE.parquet`, `torchvision:NAME`, an array of images
            (n, h, w, 3) uint8, a pair (images, labels), a `Source`, or any other form of docs/data.md.
        out: run folder.
        preset: name of a recipe.
        test_data: labelled images for the online kNN, in the same forms.
        backbone: a name, or a module that maps (n, 3, s, s) to (n, d).
        objective: a name, or a class of your own in the shape of `nnclr.Objective`.
        quiet: print nothing but the answer to a signal.
        **fields: any field of `Config`.

    Returns:
        The finished run.

    Raises:
        InputError: if something is wrong with the arguments; nothing was written.
        NNCLRError: see `nnclr.errors` for what can end a run.
    """
    if backbone is not None:
        own = isinstance(backbone, nn.Module)
        fields["backbone"] = f"module:{type(backbone).__name__}" if own else backbone
    if isinstance(objective, type):
        fields["objective"] = name_of(objective)
    elif objective is not None:
        fields["objective"] = objective
    refuse_inside(data, out)
    source = open_source(data)
    test = test_split(data) if test_data is None else open_source(test_data)
    config = make_config(
        str(data) if isinstance(data, (str, Path)) else source.name,
        str(out),
        preset,
        **fields,
        test_data=None if test is None else str(test_data) if isinstance(test_data, (str, Path)) else test.name,
    )
    return train(config, source, test, backbone if isinstance(backbone, nn.Module) else None, quiet)


def check_settings(data: str, out: str, preset: str | None, source: Source, **fields: Any) -> Config:
    """The resolved config of these settings; backbone and objective are built once, on the CPU, and dropped.

    Raises:
        InputError: that with which `pretrain` would refuse them.
    """
    config = resolve(make_config(data, out, preset, **fields), source)
    build(config, torch.device("cpu"), labels=source.labels)
    return config


def train(
    config: Config,
    source: Source,
    test: Source | None = None,
    module: nn.Module | None = None,
    quiet: bool = False,
) -> Run:
    """The loop, on every rank. One step: batch, features, objective, backward, optimiser, update of the support set."""
    config = resolve(config, source)
    # Signals are answered until the job has left: a request that comes then must not make a failure of a finished run.
    with ExitStack() as answers, distributed.process_group(config.device), ExitStack() as stack:
        stack.enter_context(repeatable_convolutions())
        check_ranks(config, source)
        run, device, plan = Path(config.out), torch.device(config.device), make_plan(config, len(source))
        distributed.from_main(lambda: check_existing(run, config, source))
        total = round((config.epochs + config.extend_epochs) * plan.steps_per_epoch)
        knn = OnlineKNN.create(source, test, config.knn_k, config.knn_temperature, config.seed, config.num_workers or 0)
        if config.fsdp and plan.ranks == 1 and not quiet:
            warnings.warn("fsdp=True shares nothing out in one process; start several by torchrun", stacklevel=2)
        state = build(config, device, module, source.labels)
        objective, optimizer, average = state.objective, state.optimizer, state.average
        little = partial(in_little_memory, images=config.grad_cache, recompute=config.recompute)
        backbone = little(state.backbone)
        if state.undivided is None:
            backbone = distributed.replicate(backbone)
        averaged = None if average is None else little(average)
        contrast = distributed.replicate(objective)
        base_momentum = objective.momentum
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
        if module is not None and not quiet and distributed.rank() == 0 and (said := class_scores(module)):
            warnings.warn(said, stacklevel=2)
        distributed.from_main(lambda: claim(run, stack))
        stack.enter_context(run_folder.bad_samples_listed(run, source))
        dtype = view_dtype(config.precision, device, named=module is None)
        loader = create_loader(source, plan, device, config.num_workers or 0, dtype)
        restored = restore(run, state, config, source)
        distributed.barrier()  # some may have read their images faster
        alone, sizes = plan.ranks == 1 and state.step < total, [view.size for view in plan.views]
        if alone and not quiet and (short := memory.shortage(config, state, sizes)):
            warnings.warn(short, stacklevel=2)
        check, undo, stop = StepCheck(run, state, device), Undo(state), answers.enter_context(stop_request(run))
        distributed.from_main(lambda: begin(run, config, source, state, state.step >= total, stack))
        every_view, launches = AllViews(backbone, config.precision == "bf16"), ""
        if alone and module is None and backbone is state.backbone:  # which does nothing but launch kernels
            every_view, launches = in_few_launches(every_view, sizes, config.batch_size, dtype)
        recorder = create_recorder(run, config, source, knn, state, loader, plan, total, quiet)
        try:
            recorder.start(restored, launches)
            for batch in loader.batches(state.step, total, lambda: plan.ranks == 1 and stop.asked is not None):
                rate = learning_rate(
                    state.step,
                    peak=config.learning_rate * config.batch_size / 256,
                    warmup_steps=(config.warmup_epochs or 0.0) * plan.steps_per_epoch,
                    total_steps=total,
                )
                for group in optimizer.param_groups:
                    group["lr"] = rate

                undo.remember()
                if plan.ranks > 1:
                    torch.manual_seed(step_seed(config.seed, state.step, plan.rank))  # of dropout: each rank its own
                with autocast:
                    views = [view.contiguous(memory_format=torch.channels_last) for view in batch.views]
                    features = list(every_view(*views))
                    targets = None if averaged is None else averaged_features(averaged, views)
                    out = contrast(features, targets, batch.ids)  # reads the support set
                optimizer.zero_grad()
                out.loss.backward()  # the gradient is the mean over ranks
                grad_norm, finite = check.post(batch, out, parameters, stop.asked is not None)
                asked = check.read()
                if config.clip_grad_norm is not None:
                    clip(parameters, config.clip_grad_norm, grad_norm)
                guarded_step(optimizer, finite)
                with undo.unless(finite):  # a step that is not finite leaves no trace
                    if average is not None and base_momentum is not None:
                        objective.momentum = momentum_at(
                            state.step, base=base_momentum, to_one=objective.momentum_to_one, total_steps=total
                        )
                        update_average(average, state.backbone, objective.momentum)
                    objective.update(out)  # writes the support set
                state.step += 1

                asked |= plan.ranks == 1 and stop.asked is not None  # nobody has to agree
                if asked or recorder.is_due():
                    asked |= check.read(settle=True)  # whether the step was skipped is known where it is written down
                recorder.after_step(batch, out, rate, grad_norm)
                if asked:
                    break
            else:  # the batches end early where a stop is asked for while they wait for images
                if asked := state.step < total:
                    check.read(settle=True)
            if asked:
                recorder.stop()
                signal = stop.asked or "a signal to another process"
                raise distributed.told(
                    Stopped(
                        f"stopped by {signal} at step {state.step} of {total}; the checkpoint is complete, run the "
                        "same command again to go on"
                    )
                )
            recorder.finish()
            stop.over()
        except OSError as error:  # images that cannot be read never come here
            raise StorageError(f"{run} cannot be written: {error}; make room and run the same command again") from error
        finally:
            recorder.close()
    return Run(run)


# ---- before the first step: nothing here writes ------------------------------------------------------------


def resolve(config: Config, source: Source) -> Config:
    """Replace every `auto` and default that depends on the machine or the data by its value.

    Raises:
        InputError: if device, precision or batch size cannot be had, or a library of `log_to` is not installed.
    """
    if config.batch_size > len(source):
        raise InputError(
            f"batch_size={config.batch_size} is larger than the data: {source.name} holds {len(source)} "
            f"images; use a smaller --batch-size, such as {2 ** (len(source).bit_length() - 1)}"
        )
    epochs, steps = config.epochs + config.extend_epochs, len(source) // config.batch_size
    if round(epochs * steps) == 0:
        raise InputError(f"epochs={epochs:g} of {steps} steps each are less than a step; use a larger --epochs")
    tracking.require(config.log_to)
    kind = find_objective(config.objective)
    open_ = [name for name in kind.settings if name != "labels" and getattr(config, name) is None]
    defaults = {name: default_of(kind, name) for name in open_}
    if "support_set_size" in defaults:
        defaults["support_set_size"] = max(config.batch_size, min(PAPER_SUPPORT_SET, len(source) // 2))
    views = make_views(config)
    if len(views) > 2 and not kind.multi_crop:
        raise InputError(f"{config.objective} takes 2 views, not the {len(views)} of {config.augmentation}")
    device = choose_device(config.device)
    return dataclasses.replace(
        config,
        device=device,
        precision=choose_precision(config.precision, torch.device(device)),
        num_workers=min(8, os.cpu_count() or 1) if config.num_workers is None else config.num_workers,
        crop_min_scale=views[0].crop_scale[0],
        warmup_epochs=min(10.0, 0.1 * config.epochs) if config.warmup_epochs is None else config.warmup_epochs,
        **defaults,
    )


def check_existing(run: Path, config: Config, source: Source) -> None:
    """Compare with the run that is already in the folder.

    Raises:
        InputError: if that run has another config, or other images where a default depends on their number, or the
            folder holds something else.
    """
    if not run.exists():
        return
    if not run.is_dir():
        raise InputError(f"--out {run} is a file; name a folder for the run")
    if not (run / "config.toml").is_file():
        if any(run.iterdir()) and not (run / ".lock").exists():
            raise InputError(f"--out {run} is not empty and holds no run; choose a new folder")
        return
    differing = differences(from_toml((run / "config.toml").read_bytes(), str(run / "config.toml")), config)
    if differing:
        trained_on = run_folder.recorded_data(run)
        if trained_on.get("fingerprint") not in (None, source.fingerprint):
            raise other_images(run, trained_on.get("images"), trained_on.get("name"), source)
        raise other_config(run, differing)


def other_config(run: Path, differing: list[str]) -> InputError:
    """What to raise where a run was started with other settings."""
    longer = "; --extend-epochs lengthens a run" if any(text.startswith("epochs:") for text in differing) else ""
    return InputError(
        f"{run} holds a run with another config ({'; '.join(differing)}): use the same values to resume it, "
        f"or another --out{longer}"
    )


def other_images(run: Path, images: Any, data: Any, source: Source) -> InputError:
    """What to raise where a run was started with other images than those of the source."""
    return InputError(
        f"{run} was trained on {images} images of {data}; {source.name} now holds {len(source)} images with other "
        "names, sizes or labels: put the data back, or choose another --out"
    )


def make_views(config: Config) -> tuple[View, ...]:
    """How the views are made."""
    names = "flip jitter grayscale blur solarize solarize_threshold".split()
    strengths = dict(
        zip(("brightness", "contrast", "saturation", "hue"), config.jitter_strengths or (None,) * 4, strict=True)
    )
    ratio, sigma = config.crop_max_ratio, config.blur_max_sigma
    return policy(
        config.augmentation,
        config.image_size,
        config.crop_min_scale,
        config.small_views,
        config.small_view_size,
        (config.small_crop_min_scale, config.small_crop_max_scale),
        crop_ratio=None if ratio is None else (1 / ratio, ratio),
        blur_sigma=None if sigma is None else (0.1, sigma),
        **strengths,
        **{name: getattr(config, name) for name in names},
    )


def make_plan(config: Config, images: int) -> Plan:
    """Order and augmentation of the whole run, and this rank's share of it."""
    return Plan(
        images, config.batch_size, make_views(config), config.seed, distributed.rank(), distributed.world_size()
    )


def check_ranks(config: Config, source: Source) -> None:
    """Whether all ranks were started alike and can share a batch.

    Raises:
        InputError: on all ranks, if not.
    """
    alike = dataclasses.replace(config, num_workers=0)  # which depends on the machine
    distributed.agree({"configuration": to_toml(alike), "set of images": source.fingerprint})
    ranks = distributed.world_size()
    if config.batch_size % ranks:
        words = f"batch_size={config.batch_size} cannot be divided among {ranks} processes; use a multiple of {ranks}"
        raise distributed.told(InputError(words))
    if config.batch_size == ranks > 1 and (config.device == "cpu" or config.sync_bn_group == 1):
        words = f"batch_size={config.batch_size} gives each of {ranks} processes one image, too few for batch norms"
        raise distributed.told(InputError(f"{words}; use at least {2 * ranks}"))


def build(
    config: Config, device: torch.device, module: nn.Module | None = None, labels: np.ndarray | None = None
) -> TrainState:
    """Backbone, objective and optimiser at step 0, initialised from the seed.

    Raises:
        InputError: if the backbone is unknown or cannot take the images, or settings of the objective do not go
            together.
    """
    torch.manual_seed(config.seed)
    sizes = {view.size for view in make_views(config)} | {config.image_size}
    backbone = create_backbone(config.backbone, config.image_size, len(sizes) > 1) if module is None else module
    width = max(feature_dim(backbone, size) for size in sizes)
    if config.recompute:
        check_recompute(backbone, config.image_size)
    kind = find_objective(config.objective)
    settings = {name: getattr(config, name) for name in kind.settings if name != "labels"}
    if "labels" in kind.settings:
        settings["labels"] = None if labels is None else torch.from_numpy(labels)
    try:
        objective = kind(width, **{name: value for name, value in settings.items() if value is not None})
    except (TypeError, ValueError) as error:  # a constructor of one's own may not take what its settings name
        raise InputError(f"{error}{place_outside(error, config.objective)}") from error
    backbone = backbone.to(device).to(memory_format=torch.channels_last).train()
    objective = distributed.shared_batch_norm(objective.to(device).train(), config.sync_bn_group)
    backbone = distributed.shared_batch_norm(backbone, config.sync_bn_group)
    shared_out, undivided = config.fsdp and distributed.world_size() > 1, None
    if shared_out:  # a network of your own may have other weights in each process, which soon has a part of them only
        distributed.take_from_main((*backbone.parameters(), *backbone.buffers()))
    average = None if objective.momentum is None else average_of(backbone)
    if shared_out:
        undivided = frozen_copy(backbone, {}, "")
        for network in [backbone] if average is None else [backbone, average]:
            share_out(network, config)
    optimizer = create_optimizer(
        config.optimizer, (backbone, objective), weight_decay=config.weight_decay, momentum=config.momentum
    )
    return TrainState(backbone, objective, optimizer, average, undivided)


def share_out(network: nn.Module, config: Config) -> None:
    """Leave this rank its part of a network, and try that it computes.

    Raises:
        InputError: if it cannot be shared out, such as one with tied weights.
    """
    ids = [id(p) for _, p in network.named_parameters(remove_duplicate=False)]
    if len(set(ids)) < len(ids):  # torch 2.10 takes them without a word
        raise InputError("fsdp=True cannot share out this backbone: two of its layers have the same weights")
    network.to(memory_format=torch.contiguous_format)  # the parts are cut from contiguous memory
    dtype = torch.bfloat16 if config.precision == "bf16" else None
    distributed.shard(network, repeated_blocks(network), dtype)
    try:
        with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=dtype is not None):
            feature_dim(network, config.image_size)
    except InputError as error:
        raise InputError(f"fsdp=True cannot share out this backbone: {error}") from error


def claim(run: Path, stack: ExitStack) -> None:
    """Make the run folder this job's own until the stack is left.

    Raises:
        StorageError: if it cannot be made.
        FolderInUseError: if another job trains in it.
    """
    run_folder.create(run)
    stack.enter_context(checkpoint.lock(run))


def restore(run: Path, state: TrainState, config: Config, source: Source) -> list[str] | None:
    """Give every rank the newest good checkpoint, which rank 0 reads; None for a fresh run, else what was skipped.

    Raises:
        InputError: if config or images are not those that the run was started with.
        NoCheckpointError: if no checkpoint can be used.
    """
    tensors: dict[str, Tensor] = {}

    def load() -> dict[str, Any] | None:
        folder = run / "checkpoints"
        checkpoint.clean(run)
        found, skipped = checkpoint.load_latest(folder)
        if found is None:
            return None
        missing = {"config", "data", "images", "data_fingerprint", "notes"} - found.state.keys()
        if missing:
            raise NoCheckpointError(f"{found.path} does not say its {min(missing)}: it is none of a run; remove it")
        differing = differences(from_toml(found.state["config"].encode(), str(found.path)), config)
        if differing:  # where config.toml was lost
            raise other_config(run, differing)
        if found.state["data_fingerprint"] != source.fingerprint:
            raise other_images(run, found.state["images"], found.state["data"], source)
        tensors.update(found.tensors)
        return {"step": found.step, "notes": found.state["notes"], "skipped": skipped}

    found = distributed.from_main(load)
    if found is None:  # a network of your own may have other weights in each process
        distributed.take_from_main(state.trained())
        return None
    state.restore(distributed.broadcast_tensors(tensors))
    state.step, state.notes = found["step"], found["notes"]
    skipped: list[str] = found["skipped"]
    state.notes["skipped_checkpoints"] = state.notes.get("skipped_checkpoints", 0) + len(skipped)
    return skipped


def stop_request(run: Path) -> StopRequest:
    """Signals are answered once in a job; a start that was asked to stop counts as no failed one, however it ends."""
    doing = "finishing the step and writing a checkpoint" if distributed.rank() == 0 else ""
    return StopRequest(doing, lambda: run_folder.forget_attempts(run))


def begin(run: Path, config: Config, source: Source, state: TrainState, finished: bool, stack: ExitStack) -> None:
    """What is left to do on rank 0 before steps are taken: find room, keep the record, and count this start.

    A finished run keeps the record of where it was trained.

    Raises:
        StorageError: if there is no room for checkpoints.
        NoProgressError: if too many starts never came to the next checkpoint.
    """
    if finished and (run / "config.toml").is_file():
        return
    checkpoint.require_room(run, state.nbytes())
    run_folder.write_record(run, to_toml(config), config.device, source)
    stack.enter_context(run_folder.attempt(run, lambda: state.step))


def create_recorder(
    run: Path,
    config: Config,
    source: Source,
    knn: OnlineKNN | None,
    state: TrainState,
    loader: Loader,
    plan: Plan,
    total: int,
    quiet: bool,
) -> Recorder:
    """What writes and prints along the way."""
    return Recorder(
        run,
        source,
        state,
        loader,
        plan,
        total=total,
        config=to_toml(config),
        data=config.data,
        objective=config.objective,
        backbone=config.backbone,
        image_size=config.image_size,
        device=config.device,
        precision=config.precision,
        knn=knn,
        log_every=config.log_every_steps,
        evaluate_every=config.evaluate_every_epochs * plan.steps_per_epoch,
        checkpoint_every=config.checkpoint_every_steps,
        log_to=config.log_to,
        quiet=quiet,
    )

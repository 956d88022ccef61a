"""What the training loop writes and prints: the console, metrics, evaluations, checkpoints, pictures and the report."""

import copy
import json
import math
import os
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

import nnclr
from nnclr import checkpoint, distributed, health, neighbour_sheet, plots, replicas, report, run_folder
from nnclr.blotted import without_secrets
from nnclr.data.images import Source
from nnclr.data.loader import Batch, Loader, Plan, StreamLoader, most_bad
from nnclr.encoder import Encoder
from nnclr.errors import InputError, StorageError
from nnclr.evaluation.online import OnlineKNN
from nnclr.evaluation.result import append
from nnclr.objectives import Output
from nnclr.progress import ESTIMATE_AFTER, Reporter, Window, duration, metrics_line, slow_data
from nnclr.skipped_steps import skipped_steps, was_skipped
from nnclr.support_set import SupportSet
from nnclr.tracking import Tracker
from nnclr.train_state import TrainState, frozen_copy

_RESERVED = set(  # names in metrics.jsonl that are the loop's
    "step epoch images loss learning_rate grad_norm embedding_std rank_me alignment uniformity neighbour_purity "
    "bad_images skipped_checkpoints skipped_steps refused_embeddings images_per_second data_share aside_share".split()
)


class Recorder:
    """Everything the loop writes and prints; it reads the training state and changes nothing of it but the notes.

    With several ranks each calls every method, since figures are those of all ranks together; rank 0 alone writes.

    Args:
        run: the run folder.
        source: the images.
        state: what is trained.
        loader: for the images that it could not read.
        plan: order of the images.
        total: steps of the whole run.
        config: the resolved config as TOML, kept in checkpoints.
        data: as it was asked for.
        objective: its name.
        backbone: its name.
        image_size: pixels.
        device: where the labels are kept.
        precision: for the console.
        knn: the online evaluation; None without labels.
        log_every: steps between lines of metrics.jsonl.
        evaluate_every: steps between evaluations, 0 for none.
        checkpoint_every: steps between checkpoints.
        log_to: further tools that get the lines; see `nnclr.tracking`.
        quiet: print nothing.
    """

    def __init__(
        self,
        run: Path,
        source: Source,
        state: TrainState,
        loader: Loader,
        plan: Plan,
        *,
        total: int,
        config: str,
        data: str,
        objective: str,
        backbone: str,
        image_size: int,
        device: str,
        precision: str,
        knn: OnlineKNN | None,
        log_every: int,
        evaluate_every: float,
        checkpoint_every: int,
        log_to: Sequence[str] = (),
        quiet: bool = False,
    ) -> None:
        self.run, self.source, self.state, self.loader, self.plan = run, source, state, loader, plan
        self.total, self.config, self.data = total, config, data
        self.objective, self.backbone, self.image_size = objective, backbone, image_size
        self.where = f"{device} {precision}"
        self.log_every, self.evaluate_every, self.checkpoint_every = log_every, evaluate_every, checkpoint_every
        self.log_to, self.knn = log_to, knn
        self.main = distributed.rank() == 0
        self.reporter = Reporter(total, quiet or not self.main)
        self.labels = None if source.labels is None else torch.from_numpy(source.labels).to(device)
        self.monitor, self.jumps = health.CollapseMonitor(), health.jump_monitors()
        self.monitor.load_state_dict(state.notes.get("collapse", {}))
        for name, monitor in self.jumps.items():
            monitor.load_state_dict(state.notes.get("jumps", {}).get(name, {}))
        self.skips_said = skipped_steps(state.notes)
        self.window = Window()
        self.tracker: Tracker | None = None
        self.writer = checkpoint.BackgroundWriter()
        self.finished = False
        self.resumed_from: int | None = None
        self.lines_logged, self.estimated, self.slow_data_said = 0, False, False

    def start(self, skipped: list[str] | None, launches: str = "") -> None:
        """Say what is about to happen, also how kernels are launched; evaluate the untrained network of a fresh run."""
        source, objective, say = self.source, self.state.objective, self.reporter.say
        classes = "" if source.class_names is None else f", {len(source.class_names)} classes (only to measure)"
        classes = f", no labels: {source.unlabelled}" if source.unlabelled else classes
        first = {reason: f" ({', '.join(names)})" for reason, names in source.skipped_first.items()}
        left_out = "".join(f", {n} x {reason} left out{first.get(reason, '')}" for reason, n in source.skipped.items())
        say(f"{source.name}: {len(source)} images{classes}{left_out}")
        heads = sum(p.numel() for p in objective.parameters())
        size = sum(p.numel() for p in self.state.backbone.parameters())
        say(
            f"{self.objective}, {self.backbone} {size / 1e6:.1f} M + heads {heads / 1e6:.1f} M parameters, "
            f"{self.image_size} px, batch {self.plan.batch_size}, {self.total} steps, {self.where}, "
            f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
        )
        if launches:
            say(launches)
        if (used := objective.pictured_look_up()) is not None:
            share = used[1].size / len(source)
            say(f"support set {used[1].size}: {100 * share:.0f} % of the images")
            if share > 1:
                say(
                    "warning: the support set is larger than the data, so it holds older embeddings of the very "
                    "same images; own_id_share in metrics.jsonl tells how often those are the neighbours"
                )
        if self.knn is not None and self.evaluate_every:
            say(
                f"online kNN: {len(self.knn.queries)} images, each by the labels of its "
                f"{self.knn.voters} nearest among {len(self.knn.bank)} others"
            )
        self.resumed_from = None if skipped is None else self.state.step
        begun = -1 if skipped is None else self.state.step
        distributed.from_main(lambda: run_folder.forget_later_lines(self.run, begun))
        most = 0 if skipped is None else most_bad(len(source))
        known = distributed.from_main(lambda: run_folder.read_bad_samples(self.run, most))
        self.loader.bad.update({int(i): why for i, why in known.items()})
        if self.state.step < self.total and self.main:
            self.tracker = Tracker(self.log_to, self.run, begun, tomllib.loads(self.config), say)
        if skipped is None:
            if self.evaluate_every:
                self._evaluate()
            return
        for line in skipped:
            say(f"warning: {line}")
        far = f"{self.state.step} of {self.total}"
        if self.state.step > self.total:
            far = f"{self.state.step}, past the {self.total} of this command"
        finished = ": it is finished" if self.state.step >= self.total else ""
        say(f"resumed {self.run} at step {far}{finished}")

    def is_due(self) -> bool:
        """Whether anything of this step is written down."""
        return any(self._due())

    def _due(self) -> tuple[bool, bool, bool]:
        """Whether this step is logged, evaluated and saved."""
        step, every, last = self.state.step, self.evaluate_every, self.state.step == self.total
        evaluated = bool(every) and (math.floor(step / every) > math.floor((step - 1) / every) or last)
        return step % self.log_every == 0 or last, evaluated, step % self.checkpoint_every == 0 or last

    def after_step(self, batch: Batch, out: Output, rate: float, grad_norm: Tensor) -> None:
        """Log, evaluate and save where this step is due for it."""
        self.writer.check()
        step = self.state.step
        logged, evaluated, saved = self._due()
        self.window.add(batch.seconds)
        self.reporter.step(step, f"{self.window.rate(self.plan.batch_size):.0f} img/s")
        self._say_skipped()
        if not (logged or self.lines_logged or self.estimated) and self.window.seconds() > ESTIMATE_AFTER:
            self._estimate()
        if logged:
            self._log(batch, out, rate, grad_norm)
        if evaluated:
            self._evaluate()
        if saved and step < self.total:
            self.save()
            distributed.barrier()  # rank 0 may wait for a slow disk

    def _estimate(self) -> None:
        """Before the first line of figures, where that takes long: how long all of it will."""
        step, each = self.state.step, self.window.seconds() / self.window.steps
        first = min(-(-step // self.log_every) * self.log_every, self.total)
        self.reporter.say(
            f"{each:.1f} s a step: {duration(each * (self.total - step))} left, first figures at step {first} "
            f"in {duration(each * (first - step))}"
        )
        self.estimated = True

    def save(self) -> None:
        """A checkpoint, and the encoder of this step: copied now, written in the background, the checkpoint first.

        So `encoder/` is never newer than the checkpoints. The copy takes as much memory as the training state until
        it is written, on CUDA until the process ends, since PyTorch keeps pinned memory; the next save, `finish` and
        `close` wait for that, and raise what went wrong.
        """
        began, state = time.perf_counter(), self.state
        replicas.assert_replicas_equal(state.replicated())
        shards = state.whole_shards()
        bad = {int(i): why for found in distributed.from_all(dict(self.loader.bad)) for i, why in found.items()}
        self.loader.bad.update(bad)
        if not self.main:
            return
        self.writer.wait()  # two copies at a time would be one too many
        state.notes["collapse"] = self.monitor.state_dict()
        state.notes["jumps"] = {name: monitor.state_dict() for name, monitor in self.jumps.items()}
        facts = {
            "data": without_secrets(self.data),
            "images": len(self.source),
            "data_fingerprint": self.source.fingerprint,
            "config": self.config,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "notes": copy.deepcopy(state.notes),
        }
        step, tensors, keep = state.step, state.tensors() | shards, self.resumed_from
        form = state.backbone if state.undivided is None else state.undivided
        encoder = self._encoder(frozen_copy(form, tensors, "backbone."))

        def write() -> None:
            try:
                checkpoint.save(self.run / "checkpoints", step, tensors, facts, keep)
                encoder.save_pretrained(self.run / "encoder")
                run_folder.write_bad_samples(self.run, bad, self.source)
            except OSError as error:
                raise StorageError(f"{self.run} cannot be written: {error}; make room and start it again") from error

        self.writer.submit(write)
        self.window.exclude(time.perf_counter() - began)

    def stop(self) -> None:
        """A complete checkpoint before any rank leaves: a launcher ends the others as soon as one does."""
        self.save()
        self.writer.wait()
        distributed.barrier()

    def finish(self) -> None:
        """The last checkpoint, the curves and the report; nothing is lost if this is interrupted and repeated."""
        self.save()
        self.writer.wait()
        self.finished = True
        if not self.main:
            return
        plots.draw_curves(self.run)
        page = report.write_report(self.run, with_map=False)  # the map is what takes long
        if self.loader.bad:
            listed = self.run / "bad_samples.jsonl"
            bad = len(self.loader.bad)
            were = "one image cannot be read and was" if bad == 1 else f"{bad} images cannot be read and were"
            self.reporter.say(f"warning: {were} skipped: {listed}")
        if skipped := self.state.notes.get("skipped_checkpoints", 0):
            were = "one damaged checkpoint was" if skipped == 1 else f"{skipped} damaged checkpoints were"
            self.reporter.say(f"warning: {were} skipped on the way; the disk may be failing")
        if count := skipped_steps(self.state.notes):
            where = self.run / "nonfinite"
            self.reporter.say(f"warning: {count} of {self.total} steps were skipped, not being finite: see {where}")
        self.reporter.say(f"finished: report in {page}, encoder in {self.run / 'encoder'}")

    def close(self) -> None:
        """Give the terminal back, wait for the last write, and let the other tools finish.

        Raises:
            StorageError: if that write failed.
        """
        self.reporter.close()
        try:
            self.writer.close()
        finally:
            if self.tracker is not None:
                self.tracker.close(self.finished)

    def encoder(self, averaged: bool = False) -> Encoder:
        """The backbone as it is now, or its average; all ranks call it together."""
        return self._encoder(self.state.network(averaged))

    def _encoder(self, module: nn.Module) -> Encoder:
        provenance = {
            "backbone": self.backbone,
            "objective": self.objective,
            "step": self.state.step,
            "epochs": self.state.step / self.plan.steps_per_epoch,
            "data": self.source.name,
            "data_fingerprint": self.source.fingerprint,
            "nnclr": nnclr.__version__,
        }
        return Encoder(module, self.image_size, provenance=provenance)

    def _log(self, batch: Batch, out: Output, rate: float, grad_norm: Tensor) -> None:
        step, batch_size = self.state.step, self.plan.batch_size
        bad = len({i for found in distributed.from_all([*self.loader.bad]) for i in found})
        values = {
            **({} if was_skipped(self.state.notes, step - 1) else self._measures(batch, out, grad_norm)),
            "learning_rate": rate,
            "bad_images": bad,
            "skipped_checkpoints": self.state.notes.get("skipped_checkpoints", 0),
            "skipped_steps": skipped_steps(self.state.notes),
            **self._refused(),
            "images_per_second": self.window.rate(batch_size),
            "data_share": self.window.data_share(),
            "aside_share": self.window.aside_share(),
        }
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        images = step * batch_size
        line = {"step": step, "epoch": step / self.plan.steps_per_epoch, "images": images, **values}
        if self.main:
            with open(self.run / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        if self.tracker is not None:
            self.tracker.metrics(line)
        seconds_left = (self.total - step) * batch_size / max(values["images_per_second"], 1e-9)
        self.reporter.say(metrics_line(step, self.total, values, seconds_left))
        self._warn(step, values, out.embeddings[0].shape[1])
        self._say_if_data_is_slow(values["data_share"])
        self.window = Window()
        if step == self.log_every and self.evaluate_every:
            self._draw_neighbours()

    def _measures(self, batch: Batch, out: Output, grad_norm: Tensor) -> dict[str, float]:
        """What a step says of the training; of one that was skipped nothing can be measured."""
        z1, z2 = (distributed.gather(z) for z in out.embeddings[:2])
        if reserved := sorted(_RESERVED & out.metrics.keys()):
            raise InputError(f"the metric '{reserved[0]}' of the objective is one of the loop's; give it another name")
        measured: dict[str, Tensor | float] = {"loss": out.loss.detach(), **out.metrics, "neighbour_purity": math.nan}
        if self.labels is not None and out.neighbours:
            measured["neighbour_purity"] = health.neighbour_purity(out.neighbours, batch.ids, self.labels)
        return {
            **distributed.mean({name: float(value) for name, value in measured.items()}),
            "grad_norm": float(grad_norm),
            "embedding_std": float(health.embedding_std(z1)),
            "rank_me": float(health.rank_me(z1)),
            "alignment": float(health.alignment(z1, z2)),
            "uniformity": float(health.uniformity(z1)),
        }

    def _refused(self) -> dict[str, int]:
        """Embeddings that the support set did not take, if there is one."""
        sets = [of for of in self.state.objective.modules() if isinstance(of, SupportSet)]
        return {"refused_embeddings": sum(int(of.refused) for of in sets)} if sets else {}

    def _warn(self, step: int, values: dict[str, float], width: int) -> None:
        """Say what the figures of a line mean where they are bad."""
        if not {"embedding_std", "rank_me"} <= values.keys():
            return
        warnings = [
            self.monitor.observe(
                step=step,
                std=values["embedding_std"],
                rank=values["rank_me"],
                dim=width,
                samples=self.plan.batch_size,
                distinct=values.get("distinct_neighbours"),
            ),
            *(monitor.observe(step, values[name]) for name, monitor in self.jumps.items() if name in values),
        ]
        for warning in warnings:
            if warning is not None:
                self.reporter.say(f"warning: {warning}")

    def _say_skipped(self) -> None:
        count = skipped_steps(self.state.notes)
        if count > self.skips_said:
            self.skips_said = count
            self.reporter.say(
                f"warning: a step was skipped, because its loss or gradient was not finite; {count} so far, see "
                f"{self.run / 'nonfinite'}"
            )

    def _say_if_data_is_slow(self, share: float) -> None:
        """Once in a run; the first line is left out, because the first batches cannot be made ahead."""
        if self.lines_logged and not self.slow_data_said and isinstance(self.loader, StreamLoader):
            cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            text = slow_data(share, self.loader.num_workers, max(cores, 1))
            if text is not None:
                self.reporter.say(text)
                self.slow_data_said = True
        self.lines_logged += 1

    def _evaluate(self) -> None:
        began = time.perf_counter()
        distributed.take_from_main(self.state.backbone.buffers())  # one encoder; training does not read them
        if self.knn is not None:
            result = self.knn.measure(self.encoder())
            if self.main:
                append(result, self.run / "evaluations.jsonl")
            if self.tracker is not None:
                self.tracker.evaluation(asdict(result))
            self.reporter.say(f"step {self.state.step:>5}/{self.total}  kNN {100 * result.value:.1f} %")
        self._draw_neighbours()
        distributed.barrier()  # rank 0 writes and draws, perhaps for longer than a collective waits
        self.window.exclude(time.perf_counter() - began)

    def _draw_neighbours(self) -> None:
        used = self.state.objective.pictured_look_up()
        if used is not None and len(used[1]) > 0:
            path = self.run / "neighbours" / f"step-{self.state.step:08d}.png"
            neighbour_sheet.draw_neighbours(path, self.encoder(averaged=True), *used, self.source, self.loader.bad)

"""A soak: random faults at random times against a training run, and what must hold after each of them.

    python tools/soak.py --minutes 30 --seed 0 --out docs/results

One small run after the other is trained, every third by two processes. A fault comes at a random time (exponential, 15
seconds in the mean), the run is started again, and so on until it is finished; then its last checkpoint must be that of
the run that nothing happened to, bit for bit. After every fault: the exit code and the words of the message are those
documented for it, the metrics are whole and finite, the undamaged checkpoints pass their manifests, and no process is
left. Every fault is a line of soak.jsonl; soak.md says in a page what happened. It ends with 1 if anything was wrong.

Linux only. Filling the disk needs the right to mount a file system in memory; without it that fault is left out.
"""

import argparse
import datetime
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nnclr import checkpoint
from nnclr.data.source import open_source
from nnclr.run_folder import read_lines

MEAN_SECONDS = 15.0
IMAGES, SIZE = 480, 64
FLAGS = (
    "--backbone small-convnet --image-size 32 --batch-size 32 --epochs 40 --embedding-dim 32 --support-set-size 200 "
    "--projector-hidden-dim 64 --predictor-hidden-dim 64 --precision fp32 --device cpu --num-workers 2 "
    "--log-every-steps 5 --checkpoint-every-steps 20 --evaluate-every-epochs 8"
).split()
STEPS = IMAGES // 32 * 40
SPACE = 48 << 20  # bytes of the file system that is filled: room for checkpoints, little more

# Fault -> exit codes that are documented for it; None: nobody is left to give one. What it says must hold these words.
EXPECTED = {
    "SIGKILL": ({-signal.SIGKILL}, ""),
    "SIGTERM": ({80}, "stopped by SIGTERM"),
    "SIGINT": ({80}, "stopped by SIGINT"),
    "SIGUSR1": ({80}, "stopped by SIGUSR1"),
    "two SIGINT": ({130, 80}, ""),
    "frozen for 5 s": ({None}, ""),  # it goes on
    "second process in the folder": ({84}, "is in use by process"),
    "newest checkpoint damaged": ({-signal.SIGKILL}, "skipped:"),
    "older checkpoint damaged": ({-signal.SIGKILL}, ""),
    "newest checkpoint deleted": ({-signal.SIGKILL}, ""),
    "newest checkpoint cut": ({-signal.SIGKILL}, "skipped:"),
    "time stamps reversed": ({-signal.SIGKILL}, ""),
    "few file descriptors": ({-signal.SIGKILL}, ""),
    "metrics line cut": ({-signal.SIGKILL}, ""),
    "image damaged": ({-signal.SIGKILL}, ""),  # what is listed is compared at the end of the run
    "disk full": ({83}, "No space left on device"),
    "one process killed": ({85}, "rank 1"),
    "one process frozen": ({85}, "rank 1 gave no sign"),
    "SIGTERM to one process": ({80}, "stopped by"),
}
OF_SEVERAL = ("one process killed", "one process frozen", "SIGTERM to one process", "SIGKILL")
OF_ONE = tuple(name for name in EXPECTED if name not in OF_SEVERAL[:3])
LATER = ("newest checkpoint damaged", "newest checkpoint cut")  # said by the next process


@dataclass
class Event:
    """One fault and what came of it."""

    at: float  # seconds since the soak began
    run: int
    processes: int
    fault: str
    step: int  # last logged before it
    codes: list[int | None]
    said: str  # last line of standard error
    recovery: float | None  # seconds from the next start to its first new line of metrics; None if the run was over
    wrong: list[str]


class Job:
    """The processes of one start of the run."""

    def __init__(self, data: Path, run: Path, processes: int, few_descriptors: bool = False) -> None:
        self.run, self.began = run, time.monotonic()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        plain = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.logs: list[Path] = []
        for rank in range(processes):
            of_job = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            of_job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            names = {name: str(value) for name, value in of_job.items()} if processes > 1 else {}
            log = run.parent / f"{run.name}-rank{rank}.log"  # a file: a stopped process would hold a pipe open
            command = [sys.executable, "-m", "nnclr", "pretrain", str(data), "--out", str(run), *FLAGS]
            limit = ["prlimit", "--nofile=64:64"] if few_descriptors else []
            environment = plain | names | {"OMP_NUM_THREADS": "1"}
            with open(log, "wb") as file:
                self.processes.append(
                    subprocess.Popen(
                        [*limit, *command], env=environment, stdout=file, stderr=file, start_new_session=True
                    )
                )
            self.logs.append(log)

    def wait(self, seconds: float) -> bool:
        """Whether all processes ended within that time."""
        until = time.monotonic() + seconds
        while any(process.poll() is None for process in self.processes):
            if time.monotonic() >= until:
                return False
            time.sleep(0.02)
        return True

    def codes(self) -> list[int | None]:
        """Exit codes, None of a process that runs."""
        return [process.poll() for process in self.processes]

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send it to one process or all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.poll() is None:
                process.send_signal(number)

    def said(self) -> str:
        """Everything that they printed."""
        return "\n".join(log.read_text(errors="replace") for log in self.logs)

    def first_step(self, seconds: float) -> float | None:
        """Seconds from the start to the first line of metrics that is new; None if the job ended without."""
        until, begun = time.monotonic() + seconds, None
        while time.monotonic() < until:
            if begun is None:
                said = self.said()
                resumed = re.search(r"at step (\d+) of", said)
                # Lines of a killed process are forgotten before either is printed.
                begun = int(resumed[1]) if resumed else 0 if "  kNN " in said else None
            if begun is not None and last_step(self.run) > begun:
                return time.monotonic() - self.began
            if all(process.poll() is not None for process in self.processes):
                return None
            time.sleep(0.02)
        return None

    def left_over(self) -> list[str]:
        """Processes of this job that are still there, killed here."""
        found = []
        for process in self.processes:
            answer = subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True, text=True, check=False)
            found += answer.stdout.split()
        for pid in found:
            os.kill(int(pid), signal.SIGKILL)
        return found


def last_step(run: Path) -> int:
    """Of metrics.jsonl, -1 without."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return -1
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError):
            continue  # cut
    return -1


def write_images(folder: Path) -> None:
    """JPEG files of the demo's patches, enlarged; their sizes differ, so that they are read anew in every epoch."""
    source = open_source("demo-photos")
    for i in range(IMAGES):
        number = i * (len(source) // IMAGES)
        label = folder / f"{source.labels[number]:02d}"
        label.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(source.fetch(number))).resize((SIZE + i % 9, SIZE)).save(
            label / f"{i}.jpg", quality=90
        )


def checkpoints(run: Path) -> list[Path]:
    """Newest first."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def digest(run: Path) -> str:
    """Of the last checkpoint's tensors."""
    manifest = json.loads((checkpoints(run)[0] / "manifest.json").read_text())
    return f"{manifest['step']} {manifest['files']['tensors.safetensors']['sha256']}"


def problems(run: Path, damaged: set[Path]) -> list[str]:
    """What is wrong with a run folder beside what was done to it."""
    wrong = []
    for path in checkpoints(run):
        reason = checkpoint.problem(path)
        if reason is not None and path not in damaged:
            wrong.append(f"{path.name}: {reason}")
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    steps = []
    for number, text in enumerate(lines):
        try:
            line = json.loads(text)
        except ValueError:
            if number < len(lines) - 1:  # the last may be cut by a kill
                wrong.append(f"line {number + 1} of metrics.jsonl is cut")
            continue
        steps.append(line["step"])
        if not math.isfinite(line["loss"]):
            wrong.append(f"loss of step {line['step']} is not finite")
    if any(later <= earlier for earlier, later in pairwise(steps)):
        wrong.append("steps of metrics.jsonl are not in order")
    return wrong


def flip_a_byte(path: Path, chance: random.Random) -> None:
    """One bit, anywhere."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def judge(event: Event, job: Job, damaged: set[Path]) -> None:
    """Exit codes, words, files and processes right after a fault."""
    codes, words = EXPECTED[event.fault]
    event.codes = event.codes or job.codes()
    given = set(event.codes[:1] if event.fault.startswith("one process") else event.codes)
    if not given <= codes and given != {0}:  # 0: it was finished just before
        event.wrong.append(f"exit codes {event.codes}")
    elif event.fault not in LATER and words not in event.said and given != {0}:
        event.wrong.append(f"said {event.said!r} and not {words!r}")
    if None not in job.codes():
        event.wrong += [f"process {pid} was left" for pid in job.left_over()]
    event.wrong += problems(job.run, damaged)


def judge_later(event: Event, job: Job) -> None:
    """What the next process says of the damage, and that it got to work."""
    if event.recovery is None and not job.wait(0):
        event.wrong.append("no step within five minutes after it")
    words = EXPECTED[event.fault][1]
    if event.fault in LATER and words not in job.said():
        event.wrong.append(f"the next process did not say {words!r}")


class Soak:
    """The state of a soak: folders, the clock, the events."""

    def __init__(self, folder: Path, record: Path, minutes: float, seed: int, can_mount: bool) -> None:
        self.folder, self.chance, self.can_mount = folder, random.Random(seed), can_mount
        self.began, self.end = time.monotonic(), time.monotonic() + 60 * minutes
        self.events: list[Event] = []
        self.finished: list[dict[str, object]] = []
        self.reference: dict[int, str] = {}
        self.data, self.record = folder / "images", record

    def write(self, event: Event) -> None:
        """A line, so that what was seen is not lost with this process."""
        with open(self.record, "a") as file:
            file.write(json.dumps(asdict(event)) + "\n")

    def prepare(self) -> None:
        """The images, and the runs that nothing happens to."""
        write_images(self.data)
        for processes in (1, 2):
            run = self.folder / f"reference-{processes}"
            job = Job(self.data, run, processes)
            if not job.wait(600) or set(job.codes()) != {0}:
                raise SystemExit(f"the reference run of {processes} failed:\n{job.said()}")
            self.reference[processes] = digest(run)
            print(f"reference of {processes}: {self.reference[processes][:20]}, {time.monotonic() - job.began:.0f} s")

    def go(self) -> None:
        """Runs until the time is over; the last one is finished."""
        number = 0
        while time.monotonic() < self.end:
            number += 1
            self.one_run(number, 2 if number % 3 == 0 else 1)

    def one_run(self, number: int, processes: int) -> None:
        """One run from its start to its end, with the faults on the way."""
        folder = self.folder / f"run-{number}"
        folder.mkdir()
        if self.can_mount:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SPACE}", "tmpfs", folder], check=True)
        run = folder / "run"
        damaged: set[Path] = set()
        spoilt: dict[Path, bytes] = {}
        before: Event | None = None
        try:
            while True:
                few = before is not None and before.fault == "few file descriptors"
                job = Job(self.data, run, processes, few)
                recovery = job.first_step(300)
                if before is not None:
                    before.recovery = recovery
                    judge_later(before, job)
                before = self.until_it_ends(number, job, damaged, spoilt)
                if before is None:
                    break
            self.judge_end(number, job, spoilt)
        finally:
            for path, content in spoilt.items():
                path.write_bytes(content)
            if self.can_mount:
                subprocess.run(["umount", "-l", folder], check=False)
            shutil.rmtree(folder, ignore_errors=True)

    def until_it_ends(self, number: int, job: Job, damaged: set[Path], spoilt: dict[Path, bytes]) -> Event | None:
        """The fault that ended the job, or None if it came to its own end."""
        run, several = job.run, len(job.processes) > 1
        while not job.wait(self.chance.expovariate(1 / MEAN_SECONDS)):
            if time.monotonic() > self.end:
                job.wait(600)
                break
            fault = self.chance.choice(OF_SEVERAL if several else OF_ONE)
            if (fault == "disk full" and not self.can_mount) or len(checkpoints(run)) < 2:
                fault = "SIGKILL"
            now = round(time.monotonic() - self.began, 1)
            event = Event(now, number, len(job.processes), fault, last_step(run), [], "", None, [])
            goes_on = self.inject(event, job, damaged, spoilt)
            judge(event, job, damaged)
            self.events.append(event)
            self.write(event)
            print(f"{now:7.0f} s  run {number}, step {event.step}: {fault} -> {event.codes}", *event.wrong, flush=True)
            if not goes_on:
                return event
        return None

    def inject(self, event: Event, job: Job, damaged: set[Path], spoilt: dict[Path, bytes]) -> bool:
        """Do it; whether the job goes on after it."""
        name, run = event.fault, job.run
        if name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            job.signal(getattr(signal, name))
        elif name == "two SIGINT":
            job.signal(signal.SIGINT)
            time.sleep(0.4)  # sooner it would count as the first one, sent twice
            job.signal(signal.SIGINT)
        elif name == "frozen for 5 s":
            job.signal(signal.SIGSTOP)
            time.sleep(5)
            job.signal(signal.SIGCONT)
            return True
        elif name == "second process in the folder":
            own = [log.rename(log.with_suffix(".first")) for log in job.logs]  # it goes on writing there
            second = Job(self.data, run, 1)
            second.wait(60)
            event.codes, event.said = second.codes(), last_line(second.said())
            job.logs = own
            return True
        elif name == "disk full":
            ballast = run.parent / "ballast"
            free = shutil.disk_usage(run.parent).free
            with open(ballast, "wb") as file:
                file.write(bytes(max(free - 4096, 0)))
            job.wait(60)
            ballast.unlink()
        elif name == "one process killed":
            job.signal(signal.SIGKILL, 1)
        elif name == "one process frozen":
            job.signal(signal.SIGSTOP, 1)
            until = time.monotonic() + 60
            while job.processes[0].poll() is None and time.monotonic() < until:
                time.sleep(0.1)
            job.signal(signal.SIGKILL, 1)
        elif name == "SIGTERM to one process":
            job.signal(signal.SIGTERM, 1)
        else:
            job.signal(signal.SIGKILL)
        job.wait(60)
        event.codes = job.codes()
        event.said = last_line(job.said())
        self.damage(name, run, damaged, spoilt)
        return False

    def damage(self, name: str, run: Path, damaged: set[Path], spoilt: dict[Path, bytes]) -> None:
        """What is done to files after the kill."""
        found = checkpoints(run)  # few where some were deleted before; then this is a kill alone
        newest, older = found[:2] if len(found) > 1 else (run, run)
        if name == "newest checkpoint damaged":
            flip_a_byte(newest / "tensors.safetensors", self.chance)
            damaged.add(newest)
        elif name == "older checkpoint damaged":
            flip_a_byte(older / "tensors.safetensors", self.chance)
            damaged.add(older)
        elif name == "newest checkpoint deleted":
            shutil.rmtree(newest)
        elif name == "newest checkpoint cut":
            path = newest / "tensors.safetensors"
            os.truncate(path, self.chance.randrange(path.stat().st_size))
            damaged.add(newest)
        elif name == "time stamps reversed":
            for age, path in enumerate((newest, older)):
                os.utime(path, (1e9 + 86_400 * age, 1e9 + 86_400 * age))
        elif name == "metrics line cut":
            path = run / "metrics.jsonl"
            os.truncate(path, path.stat().st_size - 7)
        elif name == "image damaged":
            path = self.chance.choice(sorted(path for path in self.data.rglob("*.jpg") if path not in spoilt))
            spoilt[path] = path.read_bytes()
            path.write_bytes(bytes(len(spoilt[path])))  # of the same size: the set of images is the same

    def judge_end(self, number: int, job: Job, spoilt: dict[Path, bytes]) -> None:
        """A finished run is the reference, or has counted the images that were damaged."""
        run, processes, altered = job.run, len(job.processes), bool(spoilt)
        wrong = [] if set(job.codes()) == {0} else [f"ended with {job.codes()}: {last_line(job.said())}"]
        if not wrong and not altered and digest(run) != self.reference[processes]:
            wrong.append("the last checkpoint is not that of the run that nothing happened to")
        if not wrong and altered:
            listed, _ = read_lines(run / "bad_samples.jsonl")
            names = {Path(line["image"]).name for line in listed}
            early = [e for e in self.events if (e.run, e.fault) == (number, "image damaged") and e.step < STEPS - 30]
            if not names <= {path.name for path in spoilt} or len(names) < len(early):
                wrong.append(f"{len(names)} bad images listed, {len(spoilt)} damaged")
        if not wrong and sum(checkpoint.problem(path) is None for path in checkpoints(run)) < 2:
            wrong.append("fewer than two good checkpoints at the end")
        self.finished.append({"run": number, "processes": processes, "altered": altered, "wrong": wrong})
        told = wrong or ["images were damaged" if altered else "as the reference"]
        print(f"{time.monotonic() - self.began:7.0f} s  run {number} finished:", *told, flush=True)


def last_line(text: str) -> str:
    """What the command said at its end."""
    lines = [line for line in text.splitlines() if line.startswith("nnclr: ")] or text.splitlines() or [""]
    return lines[-1][:300]


def report(soak: Soak, seconds: float, seed: int) -> str:
    """The page."""
    bad = [event for event in soak.events if event.wrong]
    ends = [run for run in soak.finished if run["wrong"]]
    same = [run for run in soak.finished if not run["wrong"] and not run["altered"]]
    recovery = [event.recovery for event in soak.events if event.recovery is not None]
    lines = [
        "# Soak\n",
        f"`python tools/soak.py --minutes {seconds / 60:.0f} --seed {seed}` on "
        f"{datetime.datetime.now(datetime.UTC).date()}: {platform.system()}, {platform.machine()}, {os.cpu_count()} "
        f"cores, Python {platform.python_version()}, torch {torch.__version__}; {seconds / 60:.0f} minutes.\n",
        f"- {len(soak.events)} faults, one in {seconds / max(len(soak.events), 1):.0f} s; {len(bad)} not as "
        "documented.",
        f"- {len(soak.finished)} runs of {STEPS} steps finished, every third by two processes; {len(same)} of "
        f"{sum(not run['altered'] for run in soak.finished)} without damaged images ended bit for bit as the run that "
        f"nothing happened to; {len(ends)} ended wrong.",
        f"- From a start to the first new line of metrics: {statistics.median(recovery):.1f} s in the middle, "
        f"{max(recovery):.1f} s at most."
        if recovery
        else "- No run was started again.",
        "",
        "| fault | times | as documented | exit codes |",
        "|---|---|---|---|",
    ]
    for fault in EXPECTED:
        events = [event for event in soak.events if event.fault == fault]
        if events:
            codes = sorted({str(code) for event in events for code in event.codes})
            fine = sum(not event.wrong for event in events)
            lines.append(f"| {fault} | {len(events)} | {fine} | {', '.join(codes)} |")
    for event in bad:
        lines.append(f"\nRun {event.run}, {event.fault} at step {event.step}: {'; '.join(event.wrong)}")
    for run in ends:
        lines.append(f"\nRun {run['run']}: {'; '.join(run['wrong'])}")
    return "\n".join(lines) + "\n"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        (folder / "mounted").mkdir()
        mount = ["mount", "-t", "tmpfs", "tmpfs", folder / "mounted"]
        can_mount = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        subprocess.run(["umount", folder / "mounted"], capture_output=True, check=False)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "soak.jsonl").unlink(missing_ok=True)
        soak = Soak(folder, options.out / "soak.jsonl", options.minutes, options.seed, can_mount)
        soak.prepare()
        soak.began, soak.end = time.monotonic(), time.monotonic() + 60 * options.minutes
        soak.go()
    seconds = time.monotonic() - soak.began
    (options.out / "soak.jsonl").write_text("".join(json.dumps(asdict(event)) + "\n" for event in soak.events))
    (options.out / "soak.md").write_text(report(soak, seconds, options.seed))
    print((options.out / "soak.md").read_text())
    return int(any(event.wrong for event in soak.events) or any(run["wrong"] for run in soak.finished))


if __name__ == "__main__":
    sys.exit(main())

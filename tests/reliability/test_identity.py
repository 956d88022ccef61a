"""A resumed run is the uninterrupted run, bit for bit, wherever it was stopped; a control for each piece of state."""

import shutil

from nnclr import checkpoint, train_state
from tests.reliability.runs import final, same, stop_after, train

HERE = "tests.reliability.test_identity"
STOPPED = 7  # steps taken before the stop; an epoch has 5


def streamed(folder, changes, stop=None):
    """In a child: the run with images that are decoded by threads instead of lying in memory."""
    from nnclr.data import loader

    loader._RESIDENT_BYTES = {"cpu": 0}
    if stop is None:
        train(folder, changes)
    else:
        stop_after(folder, stop, changes)


# Settings, where the run is stopped (once or twice), and what is other after each stop.
CASES = {
    "in the middle of an epoch": ({"optimizer": "adamw", "learning_rate": 0.01}, [7], {}),
    "at the end of an epoch": ({}, [10], {}),
    "in the warm-up": ({"warmup_epochs": 2}, [4], {}),
    "with a support set that is not full": ({"support_set_size": 401}, [7], {}),
    "with a support set that has wrapped around": ({"support_set_size": 50, "ema_momentum": 0.9}, [13], {}),
    "with other numbers of threads": ({"num_workers": 2}, [4, 12], {"num_workers": [0, 1]}),
}


def parts_and_whole(warm, folder, settings, stops, changed):
    """The final states of a run that was stopped and started again, and of one that was not."""
    of_threads = "num_workers" in settings
    run = f"{HERE}:streamed" if of_threads else "tests.reliability.runs:train"
    whole, parts, log = str(folder / "whole"), str(folder / "parts"), folder / "log"
    folder.mkdir()
    assert warm.run(run, whole, settings, log=log) == 0, log.read_text()
    for number, step in enumerate([*stops, None]):
        now = settings | {name: values[number - 1] for name, values in changed.items() if number}
        if step is None:
            assert warm.run(run, parts, now, log=log) == 0, log.read_text()
            break
        stopped = (parts, now, step) if of_threads else (parts, step, now)
        function = run if of_threads else "tests.reliability.runs:stop_after"
        assert warm.run(function, *stopped, log=log) == 80, log.read_text()
        assert checkpoint.load_latest(folder / "parts/checkpoints")[0].step == step
    return final(parts), final(whole)


def test_resumed_run_is_the_uninterrupted_one(warm, tmp_path, count):
    alike = {case: same(*parts_and_whole(warm, tmp_path / case, *how)) for case, how in CASES.items()}
    count("A9", "places to resume from that lead to the same bits", sum(alike.values()), len(alike))
    assert all(alike.values()), alike


FORGOTTEN = {
    "averaged projector": lambda name: name.startswith("objective.average_projector") and name.endswith("weight"),
    "averaged backbone": lambda name: name.startswith("average.") and name.endswith("weight"),
    "support set": lambda name: name.startswith("objective.support_set.vectors"),
    "support set pointer": lambda name: name == "objective.support_set.enqueued",
    "support set ages": lambda name: name == "objective.support_set.born",
    "support set ids": lambda name: name == "objective.support_set.ids",
    "momentum": lambda name: name.startswith("optimizer."),
    "batch norm": lambda name: "running_mean" in name,
    "generator": lambda name: name == "rng.cpu",
    "backbone": lambda name: name.startswith("backbone.") and name.endswith("weight"),
    "heads": lambda name: name.startswith("objective.projector") and name.endswith("weight"),
    "step": lambda name: False,
    "nothing": lambda name: False,
}
EVERYTHING = {"support_set_size": 401, "ema_momentum": 0.9}  # entries from before the stop are there at the end


def forgetful(folder, piece, changes):
    """In a child: the run goes on without a piece of its state."""
    restore, load = train_state.TrainState.restore, checkpoint.load_latest

    def forget(self, tensors):
        fresh, known = self.tensors(), {}
        for name, tensor in tensors.items():
            if not FORGOTTEN[piece](name):
                known[name] = tensor
            elif name in fresh:  # a momentum is not there before the first step
                known[name] = fresh[name]
        restore(self, known)

    def one_step_back(folder):
        found, skipped = load(folder)
        found.step -= 1
        return found, skipped

    train_state.TrainState.restore = forget
    if piece == "step":
        checkpoint.load_latest = one_step_back
    train(folder, changes)


def test_control_each_forgotten_piece_of_state_is_noticed(warm, tmp_path, count):
    whole, stopped, log = tmp_path / "whole", tmp_path / "stopped", tmp_path / "log"
    assert warm.run("tests.reliability.runs:train", str(whole), EVERYTHING, log=log) == 0, log.read_text()
    assert warm.run("tests.reliability.runs:stop_after", str(stopped), STOPPED, EVERYTHING) == 80
    expected, noticed = final(whole), {}
    for piece in FORGOTTEN:
        run = tmp_path / piece
        shutil.copytree(stopped, run)
        assert warm.run(f"{HERE}:forgetful", str(run), piece, EVERYTHING, log=log) == 0, log.read_text()
        noticed[piece] = not same(final(run), expected)
    assert noticed.pop("nothing") is False
    count("A9", "controls that drop one piece of state and fail", sum(noticed.values()), len(noticed))
    assert all(noticed.values()), noticed

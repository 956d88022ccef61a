"""Mistakes on the command line: each is one plain sentence that names what is wrong, as tyro itself sees it."""

import contextlib
import dataclasses
import io
import random
import string

import pytest
import tyro

from nnclr import arguments, cli, options
from nnclr.arguments import mistake, options_of, parse
from nnclr.config import Config

VERBS = {kind.__name__.lower(): kind for kind in vars(options).values() if dataclasses.is_dataclass(kind)}
OF_PRETRAIN = {
    "default": Config(data=tyro.MISSING, out=tyro.MISSING),
    "config": (tyro.conf.AvoidSubcommands,),
}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("pretrain x --out y --epoch 3", "--epoch is no flag of nnclr pretrain; did you mean --epochs?"),
        ("pretrain no-such-folder --dry_run", "no-such-folder does not exist"),
        ("pretrain x --lr 3", "--lr is no flag of nnclr pretrain; did you mean --learning-rate?"),
        ("pretrain x --queue-size 3", "--queue-size is no flag of nnclr pretrain; did you mean --support-set-size?"),
        ("explore x --lr 3", "--lr is no flag of nnclr explore; see nnclr explore --help"),
        ("pretrain x --dry_rum", "--dry-rum is no flag of nnclr pretrain; did you mean --dry-run?"),
        ("pretrain x", "nnclr pretrain needs --out; see nnclr pretrain --help"),
        ("pretrain", "nnclr pretrain needs DATA and --out; see nnclr pretrain --help"),
        ("pretrain x --out y --epochs many", "--epochs many must be a number; see nnclr pretrain --help"),
        ("pretrain x --out y --batch-size 1.5", "--batch-size 1.5 must be a whole number; see nnclr pretrain --help"),
        ("pretrain x --out y --warmup-epochs x", "--warmup-epochs x must be a number; see nnclr pretrain --help"),
        (
            "pretrain x --out y --exclude-own-id maybe",
            "'maybe' is one word too many for nnclr pretrain; see nnclr pretrain --help",
        ),
        ("pretrain x --out y --exclude-own-id=maybe", "--exclude-own-id takes no value; see nnclr pretrain --help"),
        (
            "pretrain x --out y --log-to paper",
            "--log-to paper is not one of tensorboard, wandb, mlflow; see nnclr pretrain --help",
        ),
        ("search", "nnclr search needs EMBEDDINGS; see nnclr search --help"),
        ("search e.npy --duplikates 0.9", "--duplikates is no flag of nnclr search; did you mean --duplicates?"),
        ("search e.npy --xyzzy", "--xyzzy is no flag of nnclr search; see nnclr search --help"),
        ("search e.npy -k", "-k lacks its value; see nnclr search --help"),
        ("search e.npy -kfive", "-k five must be a whole number; see nnclr search --help"),
        ("evaluate a b --baselines=yes", "--baselines takes no value; see nnclr evaluate --help"),
        ("evaluate --k 5 many RUN DATA", "--k many must be a whole number; see nnclr evaluate --help"),
        ("evaluate RUN DATA --k 5 20 --protocl x", "--protocl is no flag of nnclr evaluate; did you mean --protocol?"),
        ("evaluate RUN DATA --by magic", "--by magic is not one of logistic, finetune; see nnclr evaluate --help"),
        ("evaluate RUN DATA --device --seed 1", "--device lacks its value; see nnclr evaluate --help"),
        ("embed a b c --out x.npy", "'c' is one word too many for nnclr embed; see nnclr embed --help"),
        ("info a -- --b", "'--b' is one word too many for nnclr info; see nnclr info --help"),
        ("export RUN --out x --fromat timm", "--fromat is no flag of nnclr export; did you mean --format?"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, command, said):
    assert cli.main(command.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"nnclr: {said}\n")


@pytest.mark.parametrize(
    ("words", "excluded", "predictor"),
    [
        ("", False, True),
        ("--exclude-own-id", True, True),
        ("--exclude_own_id=True --no-use-predictor", True, False),
        ("--use-predictor False --exclude-own-id true", True, False),
        ("--no-exclude-own-id --use-predictor", False, True),
        ("--exclude-own-id False --use-predictor=true", False, True),
    ],
)
def test_a_switch_needs_no_value_and_takes_one(words, excluded, predictor):
    config = parse(Config, ["x", "--out", "True", *words.split()], "pretrain", **OF_PRETRAIN)
    assert (config.exclude_own_id, config.use_predictor, config.out) == (excluded, predictor, "True")
    folder = parse(options.Pack, ["--", "--exclude-own-id", "True"], "pack")
    assert (folder.data, folder.out) == ("--exclude-own-id", "True")  # behind -- words are words


def test_help_is_tyros_own(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["search", "--help"])
    assert not left.value.code
    helped = capsys.readouterr()
    with pytest.raises(SystemExit):
        tyro.cli(
            options.Search,
            args=["--help"],
            prog="nnclr search",
            description=options.Search.__doc__,
            registry=arguments._registry,
        )
    assert helped == capsys.readouterr()


def value(rng, option):
    good = rng.random() < 0.85
    if option.choices:
        return rng.choice(option.choices) if good else "odd"
    if option.kind is int:
        return rng.choice(["1", "-2", "30"]) if good else rng.choice(["x", "1.5"])
    if option.kind is float:
        return rng.choice(["1", "-2.5", "1e-3", "-inf"]) if good else "x"
    return rng.choice(["a", "b.npy", "None", "-", "5", "é x"])


def command(rng, made):
    """A command line that is right or has a mistake, in any order."""
    parts = []
    for option in made:
        several = [value(rng, option) for _ in range(rng.choice([1, 1, 2]) if option.several else 1)]
        if option.positional:
            parts += [several] if rng.random() < 0.9 else []
        elif rng.random() < (0.9 if option.needed else 2 / len(made)):
            flag = rng.choice(option.names)
            flag = flag.replace("-", "_").replace("__", "--", 1) if flag[1] == "-" and rng.random() < 0.1 else flag
            part = [flag] if option.switch or rng.random() < 0.05 else [flag, *several]
            if len(part) == 2 and not option.several and rng.random() < 0.2:
                part = ["=".join(part)]
            parts.append(part)
    if rng.random() < 0.2:
        parts.append(["--" + "".join(rng.choices(string.ascii_lowercase, k=3)) if rng.random() < 0.7 else "extra"])
    rng.shuffle(parts)
    return [word for part in parts for word in part]


@pytest.mark.parametrize("verb", ["pretrain", *VERBS])
def test_a_mistake_is_found_where_tyro_finds_one(verb):
    kind, settings = (Config, OF_PRETRAIN) if verb == "pretrain" else (VERBS[verb], {})
    made = options_of(kind, settings.get("default"))
    rng, refused = random.Random(verb), 0
    for _ in range(60):
        words = command(rng, made)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                tyro.cli(kind, args=words, **settings)
            right = True
        except SystemExit:
            right, refused = False, refused + 1
        wrong = mistake(made, words, verb)
        assert (wrong is None) == right, (words, wrong)
    assert 3 < refused < 57


@pytest.mark.parametrize("verb", ["pretrain", *VERBS])
def test_the_help_shows_no_none_and_the_word_is_still_taken(verb, capsys):
    kind, settings = (Config, OF_PRETRAIN) if verb == "pretrain" else (VERBS[verb], {})
    with pytest.raises(SystemExit):
        parse(kind, ["--help"], verb, **settings)
    shown = capsys.readouterr().out
    assert "None}" not in shown
    assert "{None" not in shown
    assert "{[" not in shown
    if verb == "evaluate":
        for words, name, expected in (
            ("--k None", "k", None),
            ("--k 3 5", "k", (3, 5)),
            ("--by None", "by", None),
            ("--by logistic", "by", "logistic"),
            ("--fraction 0.5", "fraction", 0.5),
            ("--out None", "out", None),
        ):
            assert getattr(parse(kind, ["RUN", "DATA", *words.split()], verb), name) == expected

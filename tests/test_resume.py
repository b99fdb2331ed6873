"""A run that was killed and resumed ends as the run that nobody disturbed: in bits."""

import errno
import json
import pathlib
import shutil
import signal

import datasets
import pytest
import torch
import torture
from tensorboard.backend.event_processing import plugin_event_accumulator

KILL, INT, TERM = signal.SIGKILL, signal.SIGINT, signal.SIGTERM
HUP = signal.SIGHUP
MODULE = "IMDBSentimentClassifier"
EPOCHS = 3
STEPS = 30  # an epoch: 234 reviews in batches of 8
POINTS = [
    (f"{MODULE}.training_step", 10, INT, 600.0),  # a step that logs
    # Where, the how manieth call, the signal, seconds between checkpoints.
    (f"{MODULE}.training_step", STEPS + 9, TERM, 600.0),
    (f"{MODULE}.training_step", STEPS + 9, KILL, 0.0),
    (f"{MODULE}.training_step", STEPS, INT, 600.0),
    (f"{MODULE}.validation_step", 1, KILL, 0.0),
    (f"{MODULE}.validation_step", 2, HUP, 600.0),
    (f"{MODULE}.test_step", 2, INT, 600.0),
    (f"{MODULE}.test_step", 1, TERM, 600.0),
    (f"{MODULE}.export", 1, TERM, 600.0),
]


@pytest.fixture(scope="module")
def arguments(bert, reviews):
    """Flags of the tiny run, all different from their defaults."""
    return [
        f"--dataset={reviews}",
        f"--model={bert}",
        "--percent=100",
        "--seq_length=40",
        "--batch_size=8",
        "--lr=0.003",
        "--warmup=0.3",  # with which so small a BERT learns from seeds 0 to 3
        "--seed=1",
        "--precision=32-true",
        f"--epochs={EPOCHS}",
    ]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    torture.start(folder, arguments, 600.0).join()
    metrics, weights, state = torture.outcome(folder)
    assert metrics["best_epoch"] > 0 and metrics["test_acc"] > 0.7  # it learns
    return metrics, weights, state, curves(folder)


def curves(folder):
    """Returns what each tag holds, speed's values left out, if no step is double."""
    run = folder / "logs" / "imdb" / "version_0"
    # As TensorBoard reads it, but for 0, which stands for all: it draws 10 of texts.
    everything = {"tensors": 0}
    log = plugin_event_accumulator.EventAccumulator(str(run), everything).Reload()
    points = {}
    for tag in log.Tags()["tensors"]:
        events = log.Tensors(tag)
        steps = [event.step for event in events]
        assert steps == sorted({*steps}), tag
        values = [event.tensor_proto.SerializeToString() for event in events]
        points[tag] = steps if tag == "speed" else [*zip(steps, values, strict=True)]
    return points


@pytest.mark.parametrize("point", POINTS, ids=lambda p: f"{p[0]}-{p[1]}-{p[2].name}")
def test_resumed_run_equals_the_undisturbed_one(point, arguments, whole, tmp_path):
    where, nth, signum, save_every = point
    process = torture.start(tmp_path, arguments, save_every, (where, nth, signum))
    process.join()
    assert process.exitcode == (-signum if signum == KILL else 128 + signum)
    said = (tmp_path / "output.txt").read_text()
    assert "Traceback" not in said
    if signum != KILL:
        last_line = said.rstrip().splitlines()[-1]
        saves = where.endswith(("training_step", "validation_step"))
        told = "all is saved in" if saves else "--resume goes on from"
        assert last_line.startswith(f"Stopped; {told} logs/imdb/version_0/checkpoints/")
        assert "--resume goes on" in last_line
    assert torture.finish(tmp_path, arguments) == 0
    assert torture.outcome(tmp_path) == whole[:3]
    assert curves(tmp_path) == whole[3]
    # Every step was taken once, but that before a killed validation, which comes again.
    again = where == f"{MODULE}.validation_step" and signum == KILL
    assert len((tmp_path / "steps.txt").read_text()) == EPOCHS * STEPS + again


def test_ctrl_c_loses_no_step(arguments, whole, tmp_path):
    blow = (f"{MODULE}.training_step", 5, INT)
    torture.start(tmp_path, arguments, 600.0, blow).join()
    last = tmp_path / "logs" / "imdb" / "version_0" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 5


def test_kill_while_saving_leaves_the_earlier_checkpoint(arguments, tmp_path):
    torture.start(tmp_path, arguments, 0.0, ("os.replace", 7, KILL)).join()
    last = tmp_path / "logs" / "imdb" / "version_0" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 6


def test_full_disk_is_told_in_one_line(arguments, tmp_path):
    blow = ("os.replace", 1, 0, errno.ENOSPC)
    process = torture.start(tmp_path, arguments, 600.0, blow)
    process.join()
    said = (tmp_path / "output.txt").read_text()
    assert process.exitcode == 1
    assert "cannot save" in said and "Traceback" not in said


def test_a_run_that_was_moved_goes_on_and_remembers_its_best_epoch(
    arguments, whole, tmp_path
):
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    blow = (f"{MODULE}.training_step", 2 * STEPS + 5, INT)
    torture.start(before, arguments, 600.0, blow).join()
    before.rename(after)
    assert torture.finish(after, arguments) == 0
    assert torture.outcome(after) == whole[:3]


def test_curves_of_a_run_that_lost_steps_do_not_double_back(arguments, whole, tmp_path):
    """As kill -9 leaves it: more is logged than last.ckpt holds."""
    last = pathlib.Path("logs", "imdb", "version_0", "checkpoints", "last.ckpt")
    for name, step in (("early", 5), ("late", 24)):  # the second logs 9, 19
        folder = tmp_path / name
        folder.mkdir()
        blow = (f"{MODULE}.training_step", step, INT)
        torture.start(folder, arguments, 600.0, blow).join()
    shutil.copy(tmp_path / "early" / last, tmp_path / "late" / last)
    assert torture.finish(tmp_path / "late", arguments) == 0
    assert curves(tmp_path / "late") == whole[3]


def test_a_run_is_not_resumed_on_other_reviews(arguments, reviews, tmp_path):
    data = shutil.copytree(reviews, tmp_path / "data")
    own = [f"--dataset={data}", *arguments[1:]]
    torture.start(tmp_path, own, 600.0, (f"{MODULE}.training_step", 5, INT)).join()
    train = datasets.Dataset.from_parquet(str(data / "train.parquet"))
    shorter = [text[1:] for text in train["text"]]  # labels as they were
    other = train.remove_columns("text").add_column("text", shorter)
    other.to_parquet(data / "train.parquet")
    assert torture.finish(tmp_path, own) == 1
    said = (tmp_path / "output.txt").read_text()
    assert said.rstrip().endswith("than the run's")
    assert "Traceback" not in said


def test_paths_that_lead_to_the_same_are_the_same(
    bert, reviews, arguments, whole, tmp_path
):
    """Begun on relative paths; resumed elsewhere, then on moved model and data."""
    home = tmp_path / "home"
    home.mkdir()
    shutil.copytree(reviews, home / "data")
    shutil.copytree(bert, home / "bert")
    logdir = [f"--logdir={home}/logs"]
    own = ["--dataset=data", "--model=bert/", *arguments[2:]]
    torture.start(home, own, 600.0, (f"{MODULE}.training_step", 5, INT)).join()
    stop = (f"{MODULE}.training_step", 5, INT)
    (tmp_path / "data").mkdir()  # not the run's
    torture.start(tmp_path, ["--resume", *logdir], 600.0, stop).join()
    again = ["--resume", "--dataset=data/", "--model=./bert"]
    torture.start(home, again, 600.0, stop).join()
    (home / "data").rename(tmp_path / "moved")
    (home / "bert").rename(tmp_path / "bert")
    moved = ["--resume", f"--dataset={tmp_path}/moved", f"--model={tmp_path}/bert"]
    torture.start(home, moved, 600.0).join()
    said = (home / "output.txt").read_text() + (tmp_path / "output.txt").read_text()
    assert "Traceback" not in said and said.count("Stopped; all is saved") == 3
    assert torture.outcome(home) == whole[:3]


def test_a_model_of_another_shape_is_not_resumed_with(bert, arguments, tmp_path):
    torture.start(
        tmp_path, arguments, 600.0, (f"{MODULE}.training_step", 5, INT)
    ).join()
    other = shutil.copytree(bert, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["hidden_dropout_prob"] = 0.3  # which no word-piece and no weight tells
    (other / "config.json").write_text(json.dumps(config))
    process = torture.start(tmp_path, ["--resume", f"--model={other}"], 600.0)
    process.join()
    said = (tmp_path / "output.txt").read_text()
    assert process.exitcode == 1 and said.rstrip().endswith("than the run's")

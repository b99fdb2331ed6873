"""A run that was killed and resumed ends as the run that nobody disturbed: in bits."""

import errno
import pathlib
import signal

import pytest
import torch
import torture

KILL, INT, TERM = signal.SIGKILL, signal.SIGINT, signal.SIGTERM
MODULE = "IMDBSentimentClassifier"
STEPS = 30  # an epoch: 234 reviews in batches of 8
POINTS = [
    # Where, the how manieth call, the signal, seconds between checkpoints.
    (f"{MODULE}.training_step", STEPS + 9, TERM, 600.0),
    (f"{MODULE}.training_step", STEPS + 9, KILL, 0.0),
    (f"{MODULE}.training_step", STEPS, INT, 600.0),
    (f"{MODULE}.validation_step", 1, KILL, 0.0),
    (f"{MODULE}.validation_step", 2, TERM, 600.0),
    (f"{MODULE}.test_step", 2, INT, 600.0),
    (f"{MODULE}.export", 1, TERM, 600.0),
]


@pytest.fixture(scope="module")
def arguments(bert: pathlib.Path, reviews: pathlib.Path) -> list[str]:
    """Flags of the tiny run, all different from their defaults."""
    return [
        f"--dataset={reviews}",
        f"--model={bert}",
        "--percent=100",
        "--seq_length=40",
        "--batch_size=8",
        "--lr=0.002",
        "--precision=32-true",
        "--epochs=2",
    ]


@pytest.fixture(scope="module")
def whole(
    arguments: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    torture.start(folder, arguments, 600.0).join()
    return torture.outcome(folder)


@pytest.mark.parametrize("point", POINTS, ids=lambda p: f"{p[0]}-{p[1]}-{p[2].name}")
def test_resumed_run_equals_the_undisturbed_one(
    point: tuple, arguments: list[str], whole: tuple, tmp_path: pathlib.Path
) -> None:
    where, nth, signum, save_every = point
    process = torture.start(tmp_path, arguments, save_every, (where, nth, signum))
    process.join()
    assert process.exitcode == (-KILL if signum == KILL else 128 + signum)
    said = (tmp_path / "output.txt").read_text()
    assert "Traceback" not in said
    if signum != KILL and where != f"{MODULE}.export":
        last_line = said.rstrip().splitlines()[-1]
        assert last_line.startswith("Stopped; ") and "saved in" in last_line
        assert "to go on from there: python" in last_line
        assert last_line.endswith("--resume")
    assert torture.finish(tmp_path, arguments) == 0
    assert torture.outcome(tmp_path) == whole


def test_ctrl_c_loses_no_step(
    arguments: list[str], whole: tuple, tmp_path: pathlib.Path
) -> None:
    blow = (f"{MODULE}.training_step", 5, INT)
    torture.start(tmp_path, arguments, 600.0, blow).join()
    assert "Stopped; step 5 is done and saved" in (tmp_path / "output.txt").read_text()
    last = tmp_path / "logs" / "imdb" / "version_0" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 5


def test_kill_while_saving_leaves_the_earlier_checkpoint(
    arguments: list[str], tmp_path: pathlib.Path
) -> None:
    torture.start(tmp_path, arguments, 0.0, ("os.fsync", 7, KILL)).join()
    last = tmp_path / "logs" / "imdb" / "version_0" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 6


def test_full_disk_is_told_in_one_line(
    arguments: list[str], tmp_path: pathlib.Path
) -> None:
    blow = ("os.fsync", 1, 0, errno.ENOSPC)
    process = torture.start(tmp_path, arguments, 600.0, blow)
    process.join()
    said = (tmp_path / "output.txt").read_text()
    assert process.exitcode == 1
    assert "no space left" in said and "Traceback" not in said
    assert not list(tmp_path.rglob("*.partial"))


def test_a_moved_run_is_refused_as_its_best_epoch_would_be_forgotten(
    arguments: list[str], tmp_path: pathlib.Path
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    blow = (f"{MODULE}.training_step", 5, INT)
    torture.start(before, arguments, 600.0, blow).join()
    before.rename(after)
    assert torture.finish(after, arguments) == 1
    said = (after / "output.txt").read_text()
    assert f"move it back to {before}" in said and "Traceback" not in said

"""Kills tiny runs of `main.py` at random moments, resumes them, and compares the bits.

    python tests/measure/torture.py --trials=20

A trial kills a run by SIGKILL, SIGINT or SIGTERM at a random moment, and what goes on
from it once or twice more, then lets it end. Its exported weights and its metrics must
equal those of the run that nobody disturbed. Prints how many trials did.
"""

import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["main"])
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


def run(
    folder: str, arguments: list[str], save_every: float, blow: Any = None
) -> None:
    """Runs `main.main` in the folder; `blow` is (where, nth call, signal) to die at."""
    import torch

    import main

    os.chdir(folder)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)  # nohup, say, has one ignored
    with open("output.txt", "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    main.SAVE_EVERY = save_every
    step = main.IMDBSentimentClassifier.training_step

    def counted(*args: Any) -> Any:
        with open("steps.txt", "a") as steps:
            steps.write(".")
        return step(*args)

    main.IMDBSentimentClassifier.training_step = counted
    if blow:
        plant(main, *blow)
    sys.argv = ["main.py", *arguments]
    main.FLAGS(sys.argv)
    main.main(sys.argv[:1])


def plant(main: Any, where: str, nth: int, signum: int, failure: int = 0) -> None:
    """Makes the nth call of `where`, a dotted name, send a signal or fail."""
    *path, name = where.split(".")
    owner = main
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), 0

    def planted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth and failure:
            raise OSError(failure, os.strerror(failure))
        if calls == nth:
            os.kill(os.getpid(), signum)
        return original(*args, **kwargs)

    setattr(owner, name, planted)


def start(folder: pathlib.Path, *args: Any) -> multiprocessing.Process:
    process = CONTEXT.Process(target=run, args=(str(folder), *args))
    process.start()
    return process


def numbers(value: Any) -> Iterator[bytes]:
    """Yields all tensors of a checkpoint's part."""
    if hasattr(value, "numpy"):
        yield value.numpy().tobytes()
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from numbers(each)


def outcome(folder: pathlib.Path) -> tuple[dict, bytes, list[bytes]]:
    """Returns a finished run's metrics, exported weights, and last state of all."""
    import torch

    version = folder / "logs" / "imdb" / "version_0"
    results = json.loads((version / "results.json").read_text())
    weights = (version / "model" / "model.safetensors").read_bytes()
    last = torch.load(version / "checkpoints" / "last.ckpt", weights_only=True)
    state = [*numbers(last["state_dict"]), *numbers(last["optimizer_states"])]
    metrics = {**results["metrics"], "best_epoch": results["best_epoch"]}
    return metrics, weights, state


def finish(folder: pathlib.Path, arguments: list[str]) -> int:
    """Resumes, or starts anew where nothing was saved; returns the exit status."""
    last = folder / "logs" / "imdb" / "version_0" / "checkpoints" / "last.ckpt"
    process = start(folder, ["--resume"] if last.exists() else arguments, 600.0)
    process.join()
    return process.exitcode


def trial(
    folder: pathlib.Path,
    arguments: list[str],
    seconds: float,
    chance: random.Random,
) -> list[str]:
    """Kills a run one to three times, each at a random moment; returns what it did."""
    version, done = folder / "logs" / "imdb" / "version_0", []
    kills = chance.randint(1, 3)
    while len(done) < kills:
        # If it ended before the blow: once more.
        if (version / "results.json").exists():
            shutil.rmtree(folder / "logs")
        last = version / "checkpoints" / "last.ckpt"
        flags = ["--resume"] if last.exists() else arguments
        process = start(folder, flags, chance.choice([0.0, 0.1, 600.0]))
        process.join(chance.uniform(0.1, 0.9) * seconds)
        signum = chance.choice(SIGNALS)
        if process.exitcode is None:
            os.kill(process.pid, signum)
            process.join()
        if process.exitcode != 0:
            done.append(f"{signal.Signals(signum).name} -> {process.exitcode}")
    return done


def main(argv: list[str]) -> None:
    import demo

    chance = random.Random(flags.FLAGS.torture_seed)
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        for part in ("whole", "reviews"):
            (root / part).mkdir()
        bert = demo.make_bert(root / "bert", hidden=32, positions=64, spread=0.1)
        reviews = demo.make_reviews(root / "reviews", 260, 94, sure=0.85)
        arguments = [f"--dataset={reviews}", f"--model={bert}"]
        arguments += [
            "--percent=100",
            "--seq_length=40",
            "--batch_size=8",
            "--lr=0.002",
        ]
        arguments += ["--precision=32-true", "--epochs=4"]
        start(root / "whole", arguments, 600.0).join()  # fills the caches
        begin = time.monotonic()
        start(root / "whole", arguments, 600.0).join()
        seconds = time.monotonic() - begin
        expected, equal = outcome(root / "whole"), 0
        for number in range(1, flags.FLAGS.trials + 1):
            folder = root / f"trial_{number}"
            folder.mkdir()
            done = trial(folder, arguments, seconds, chance)
            results = folder / "logs" / "imdb" / "version_0" / "results.json"
            status = 0 if results.exists() else finish(folder, arguments)
            same = status == 0 and outcome(folder) == expected
            equal += same
            print(
                f"{number}: {'equal' if same else 'DIFFERENT'} after {done}",
                flush=True,
            )
    print(
        f"{equal} of {flags.FLAGS.trials} resumed runs equal the undisturbed one"
    )
    sys.exit(equal < flags.FLAGS.trials)


if __name__ == "__main__":
    flags.DEFINE_integer("trials", 20, "Runs to kill.", 1)
    flags.DEFINE_integer("torture_seed", 0, "Draws the moments and the signals.")
    app.run(main)

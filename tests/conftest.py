"""A tiny BERT, made-up reviews, and ways to run `main.py` on them; no network.

`bert` and `reviews` are folders, `run` calls `main.main` in this process. `command`,
which runs `python main.py` as a user would, and `write_reviews` are imported from here.
"""

import atexit
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from typing import Any

# `datasets` names its cache after functions by name alone: each session needs its own.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="test-datasets-")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).parent / "measure"))

import datasets
import demo
import pytest
import torch
import transformers
from absl import flags
from absl.testing import flagsaver

import main

CACHE = pathlib.Path(os.environ["HF_DATASETS_CACHE"])
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
flags.FLAGS.mark_as_parsed()
torch.set_num_threads(1)  # more only slow so small a model down
datasets.disable_progress_bars()

# All different from their defaults, and from one another.
SETTINGS = {
    "percent": 50,
    "seq_length": 40,
    "truncation": "head",
    "epochs": 2,
    "batch_size": 5,
    "lr": 4e-3,
    "momentum": 0.8,
    "weight_decay": 0.05,
    "warmup": 0.25,
    "seed": 3,
    "precision": "32-true",
}


def write_reviews(
    folder: pathlib.Path,
    kind: str,
    train: dict[str, list] | None,
    test: dict[str, list] | None,
    names: list[str] | None = None,
) -> str:
    """Writes columns as train and test files; a parquet's labels may have names.

    Args:
        kind: csv, jsonl or parquet.
        train: Columns by name, as {"text": [...], "label": [...]}; None writes no file.
        test: Likewise.
        names: Makes the labels, which are numbers, a `ClassLabel` of these names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part, columns in (("train", train), ("test", test)):
        if columns is None:
            continue
        reviews = datasets.Dataset.from_dict(columns)
        if names is not None:
            reviews = reviews.cast_column(
                "label", datasets.ClassLabel(names=names)
            )
        write = {"csv": "to_csv", "jsonl": "to_json", "parquet": "to_parquet"}[
            kind
        ]
        getattr(reviews, write)(folder / f"{part}.{kind}")
    return str(folder)


def command(
    *arguments: str,
    stdin: str | None = None,
    cwd: pathlib.Path | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Runs `python main.py` with the arguments, as a user would; returns its output."""
    clean = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    clean["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        [sys.executable, str(demo.MAIN), *arguments],
        input=stdin,
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def call(**values: Any) -> pathlib.Path:
    """Calls `main.main` under these flags; returns the run's folder."""
    changed = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
    handlers = {signum: signal.getsignal(signum) for signum in changed}
    for signum in handlers:
        signal.signal(signum, signal.SIG_DFL)  # nohup, say, has one ignored
    try:
        with flagsaver.flagsaver(**SETTINGS | values):
            main.main(["main.py"])
            name = "debug" if flags.FLAGS.debug else "imdb"
            return pathlib.Path(flags.FLAGS.logdir) / name / "version_0"
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A folder with an untrained BERT; its wide weights make small faults show."""
    folder = tmp_path_factory.mktemp("bert")
    return demo.make_bert(folder, hidden=32, positions=64, spread=0.1)


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """A folder with 260 reviews to train on and 94 to test."""
    return demo.make_reviews(
        tmp_path_factory.mktemp("reviews"), 260, 94, sure=0.97
    )


@pytest.fixture
def run(tmp_path, bert, reviews):
    """Calls `main.main` with logs in `tmp_path`; flags given to it win."""
    ours = {"dataset": reviews, "model": bert, "logdir": str(tmp_path / "logs")}
    return lambda **values: call(**ours | values)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, bert, reviews):
    """The folder of a finished run under `SETTINGS`; tests leave it as it is."""
    logdir = tmp_path_factory.mktemp("trained") / "logs"
    return call(dataset=reviews, model=bert, logdir=str(logdir))


@pytest.fixture(scope="session")
def tokenizer(bert):
    return main.load_tokenizer(bert, main.check_config(bert, 3))


def piece_ids(
    tokenizer: transformers.BertTokenizer,
    text: str,
    seq_length: int,
    truncation: str,
) -> list[int]:
    """Returns what a model is to see of a review, by the plainest Python there is."""
    pieces = tokenizer.tokenize(re.sub("<br />", " ", text))
    room = seq_length - len(["[CLS]", "[SEP]"])
    head = {"head": room, "tail": 0, "head_tail": room // 4}[truncation]
    while len(pieces) > room:
        del pieces[head]
    return tokenizer.convert_tokens_to_ids(["[CLS]", *pieces, "[SEP]"])


@pytest.fixture(scope="session")
def commanded(tmp_path_factory, bert, reviews):
    """A run of `python main.py`: folder of logs and cache, arguments and output."""
    folder = tmp_path_factory.mktemp("commanded")
    ours = {"dataset": reviews, "model": bert} | SETTINGS
    arguments = [f"--{name}={value}" for name, value in ours.items()]
    cache = str(folder / "cache")
    return (
        folder,
        arguments,
        command(*arguments, cwd=folder, HF_DATASETS_CACHE=cache),
    )

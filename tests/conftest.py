"""A tiny BERT, made-up reviews, and ways to run `main.py` on them; no network.

`bert` and `reviews` are folders, `run` calls `main.main` in this process. `command`,
which runs `python main.py` as a user would, and `write_reviews` are imported from here.
"""

import atexit
import dataclasses
import json
import logging
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

# Tests of bits and of devices are of a CPU: none sees a GPU that is there.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DISABLE_MPS"] = "1"
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

ROWS = [(f"a {('boring', 'fine')[n % 2]} film {n}", n % 2) for n in range(40)]
CSV = "text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS)
JSONL = "".join(json.dumps({"text": t, "label": k}) + "\n" for t, k in ROWS)
Change = str | bytes | None | Callable[[bytes], str | bytes]

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


def load_splits(dataset: str, **settings: Any) -> datasets.DatasetDict:
    columns = {"text_column": "text", "label_column": "label"}
    return main.load_splits(columns | {"dataset": dataset} | settings)


def load_samples(dataset: str, percent: int, seed: int) -> datasets.DatasetDict:
    columns = {"text_column": "text", "label_column": "label"}
    draw = {"dataset": dataset, "percent": percent, "seed": seed}
    return main.load_samples(columns | draw)


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
            reviews = reviews.cast_column("label", datasets.ClassLabel(names=names))
        write = {"csv": "to_csv", "jsonl": "to_json", "parquet": "to_parquet"}[kind]
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
    return demo.make_reviews(tmp_path_factory.mktemp("reviews"), 260, 94, sure=0.97)


@pytest.fixture
def run(tmp_path, bert, reviews):
    """Calls `main.main` with logs in `tmp_path`; flags given to it win."""
    ours = {"dataset": reviews, "model": bert, "logdir": str(tmp_path / "logs")}
    return lambda **values: call(**ours | values)


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    """A file for the last.ckpt of `trained`, which a finished run removes."""
    return tmp_path_factory.mktemp("kept") / "last.ckpt"


@pytest.fixture(scope="session")
def trained(tmp_path_factory, bert, reviews, kept):
    """The folder of a finished run under `SETTINGS`; tests leave it as it is."""
    logdir = tmp_path_factory.mktemp("trained") / "logs"
    finish = main.finish

    def keeping(module: Any, folder: pathlib.Path, start: float) -> None:
        shutil.copy(folder / "checkpoints" / "last.ckpt", kept)
        finish(module, folder, start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "finish", keeping)
        return call(dataset=reviews, model=bert, logdir=str(logdir))


@pytest.fixture(scope="session")
def tokenizer(bert):
    return main.load_tokenizer(SETTINGS | {"model": bert})


def each(table: dict[str, Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", table.values(), ids=table)


@dataclasses.dataclass
class Case:
    """What is spoilt, the flags of the run, and words of the line that refuses it."""

    words: list[str]
    files: dict[str, Change] = dataclasses.field(default_factory=dict)
    flags: dict[str, Any] = dataclasses.field(default_factory=dict)


def spoil(files: dict[str, Change], folder: pathlib.Path = pathlib.Path()) -> str:
    """Writes files, changes them by a function, or removes those that are None."""
    for name, change in files.items():
        path = folder / name
        if change is None:
            for each in folder.glob(name):
                each.unlink()
            continue
        content = change(path.read_bytes()) if callable(change) else change
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder)


def snapshot(folder: pathlib.Path = pathlib.Path()) -> dict[str, bytes | str]:
    """Returns all that lies in a folder: bytes of files, targets of links."""
    found: dict[str, bytes | str] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if ".lock" in name:
            continue
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        else:
            found[name] = "folder" if path.is_dir() else path.read_bytes()
    return found


@pytest.fixture
def place(tmp_path, bert, trained):
    """Lays a sound model, sound data and a finished run into the working folder."""
    shutil.copytree(bert, "model")
    shutil.copytree(trained.parent, "logs/imdb")
    spoil({"data/train.csv": CSV, "data/test.csv": CSV, "new.csv": CSV})
    return tmp_path


@pytest.fixture
def interrupted(place, kept):
    """Makes the finished run one that was interrupted when it had trained."""
    run = pathlib.Path("logs/imdb/version_0")
    shutil.copy(kept, run / "checkpoints" / "last.ckpt")
    os.remove(run / "results.json")


@pytest.fixture
def refused(place, run, capfd, monkeypatch):
    """Checks that a run is refused in one line with these words, and no trace."""
    for name in ("datasets", "transformers", "huggingface_hub"):
        for handler in logging.getLogger(name).handlers:
            tell = lambda record: print(record.getMessage(), file=sys.stderr)  # noqa: E731
            monkeypatch.setattr(handler, "emit", tell)

    def check(case: Case, **values: Any) -> None:
        spoil(case.files)
        before = snapshot()
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            run(**values | case.flags)
        line = exit.value.code
        assert isinstance(line, str)  # Python prints it, and exits with status 1
        assert line.startswith("main.py: ") and len(line.splitlines()) == 1
        assert [word for word in case.words if word not in line] == [], line
        assert capfd.readouterr() == ("", "")
        assert snapshot() == before

    return check


def piece_ids(
    tokenizer: transformers.BertTokenizer,
    text: str,
    seq_length: int,
    truncation: str,
) -> list[int]:
    """Returns what a model is to see of a review, by the plainest Python there is."""
    pieces = tokenizer.tokenize(re.sub("<br />", " ", text))
    room = seq_length - len(["[CLS]", "[SEP]"])
    head = {"head": room, "tail": 0}[truncation]
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

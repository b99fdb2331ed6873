"""Bad input ends `main.py` with one line and status 1, and nothing on disk changes.

Each table spoils sound files, and gives words that the line must hold. Beside them
stand what is odd but sound, two runs at once, failures on the way, and that nothing
which is loaded runs code or writes where it should not.
"""

import dataclasses
import io
import itertools
import json
import logging
import os
import pathlib
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import huggingface_hub
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
import transformers
from absl import flags
from absl.testing import flagsaver
from conftest import command, write_reviews
from demo import MAIN

import main

Change = str | bytes | None | Callable[[bytes], str | bytes]
LAST = "logs/imdb/version_0/checkpoints/last.ckpt"
BEST = "logs/imdb/version_0/checkpoints/best.ckpt"
RESULTS = "logs/imdb/version_0/results.json"
ROWS = [(f"a {('boring', 'fine')[n % 2]} film {n}", n % 2) for n in range(40)]
CSV = "text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS)
JSONL = "".join(json.dumps({"text": t, "label": k}) + "\n" for t, k in ROWS)
MALICE = "import pathlib\npathlib.Path('executed').touch()\n"


class Evil:
    """Makes a file `executed` in the working folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pathlib.Path.touch, (pathlib.Path("executed"),)


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
        path.write_bytes(
            content.encode() if isinstance(content, str) else content
        )
    return str(folder)


def edit(**values: Any) -> Callable[[bytes], str]:
    """Returns what changes entries of a json file."""
    return lambda whole: json.dumps(json.loads(whole) | values)


def weigh(change: Callable[[dict], dict]) -> Callable[[bytes], bytes]:
    """Returns what changes the weights in a safetensors file."""

    def save(whole: bytes) -> bytes:
        weights = change(safetensors.torch.load(whole))
        return safetensors.torch.save(weights, {"format": "pt"})

    return save


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def store(**values: Any) -> Callable[[bytes], bytes]:
    """Returns what changes entries of a checkpoint; those that are None go."""

    def change(whole: bytes) -> bytes:
        checkpoint = torch.load(io.BytesIO(whole), weights_only=True) | values
        return saved({k: v for k, v in checkpoint.items() if v is not None})

    return change


def snapshot(folder: pathlib.Path = pathlib.Path()) -> dict[str, bytes | str]:
    """Returns all that lies in a folder: bytes of files, targets of links."""
    found: dict[str, bytes | str] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        else:
            found[name] = "folder" if path.is_dir() else path.read_bytes()
    return found


@pytest.fixture(autouse=True)
def nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def place(tmp_path, bert, trained):
    """Lays a sound model, sound data and a finished run into the working folder."""
    shutil.copytree(bert, "model")
    shutil.copytree(trained.parent, "logs/imdb")
    spoil({"data/train.csv": CSV, "data/test.csv": CSV, "new.csv": CSV})
    return tmp_path


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


def results(folder: pathlib.Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def each(table: dict[str, Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", table.values(), ids=table)


# Flags, processes and the folder of the logs.

ILLEGAL = {
    "--percent=0.5": "--percent",
    "--epochs=inf": "--epochs",
    "--lr=nan": "lr=nan.* below 1",
    "--momentum=nan": "momentum=nan.* below 1",
    "--weight_decay=nan": "weight_decay=nan.* below 1",
    "--warmup=nan": "warmup=nan.* below 1",
    "--warmup=1": "warmup=1.* below 1",
    "--lr=0": "lr above 0",
    "--seed=4294967296": "--seed",
    "--epoch=5": "epochs",  # the suggestion
}


@pytest.mark.parametrize("flag", ILLEGAL)
def test_absl_refuses_a_flag(flag):
    with flagsaver.flagsaver(), pytest.raises(flags.Error, match=ILLEGAL[flag]):
        flags.FLAGS(["main.py", flag])


@pytest.mark.parametrize("stray", ["debug", "-", ""])
def test_a_stray_argument_is_refused(stray):
    with pytest.raises(SystemExit, match=f"'{stray}'.*--name=value"):
        main.main(["main.py", stray])


FLAGS = {
    "too long for the model": Case(["--seq_length=65", "64"], {}, {"seq_length": 65}),
    "processes": Case(["13 reviews", "--devices"], {}, {"devices": 14}),
    "machines": Case(["--num_nodes=2", "torchrun"], {}, {"num_nodes": 2}),
    "logs in a cloud": Case(["--logdir=s3://x"], {}, {"logdir": "s3://x"}),
    "logs at an address": Case(["--logdir=file://"], {}, {"logdir": "file:///tmp"}),
    "logs in a file": Case(["cannot write to new.csv"], {}, {"logdir": "new.csv"}),
    "logs below a file": Case(
        ["cannot write to new.csv/a"], {}, {"logdir": "new.csv/a"}),
    "earlier runs cannot be moved": Case(
        ["--logdir=", "cannot move", "logs/imdb"], {"logs.old": "mine"}),
}  # fmt: skip


@each(FLAGS)
def test_flags_that_do_not_fit_are_refused(refused, case):
    refused(case)


ENVIRONMENT = {
    "fewer": ({"WORLD_SIZE": "2"}, ["WORLD_SIZE is 2", "--num_nodes 1"]),
    "no number": (
        {"WORLD_SIZE": "abc"},
        ["WORLD_SIZE", "abc", "--num_nodes 1"],
    ),
    "a rank too high": ({"RANK": "1", "WORLD_SIZE": "1"}, ["rank 1 of 1"]),
    "a rank alone": ({"RANK": "1"}, ["RANK", "WORLD_SIZE"]),
    "the first rank alone": ({"RANK": "0"}, ["RANK", "WORLD_SIZE"]),
    "a local rank alone": ({"LOCAL_RANK": "1"}, ["LOCAL_RANK", "WORLD_SIZE"]),
    "SLURM's rank alone": ({"SLURM_PROCID": "1"}, ["SLURM_PROCID", "WORLD_SIZE"]),
}


@each(ENVIRONMENT)
def test_processes_other_than_the_flags_say_are_refused(
    refused, monkeypatch, case
):
    environment, words = case
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
        if name != "WORLD_SIZE":  # Lightning reads it when it is imported
            monkeypatch.setattr(main.rank_zero_only, "rank", int(value))
    refused(Case(words))


def test_a_user_reads_one_line_and_no_more(place):
    spoil({"data/train.csv": CSV + "1,2,3,4\n"})
    before = snapshot()
    done = command("--model=model", "--dataset=data", "--seq_length=9", cwd=place)
    assert (done.returncode, done.stdout) == (1, "")
    assert "line 42" in done.stderr and done.stderr.count("\n") == 1
    assert snapshot() == before


@pytest.mark.parametrize("logdir", ["new/logs", ".", "a b;touch executed", "-rf"])
def test_any_logdir_keeps_what_lay_there_all_of_it(run, tmp_path, logdir):
    (tmp_path / "work").mkdir()
    os.chdir(tmp_path / "work")
    theirs = pathlib.Path(logdir, "imdb")
    spoil(
        {"version_0/results.json": "{}", "thesis.txt": "", ".git/HEAD": "a"},
        theirs,
    )
    earlier = snapshot(theirs)
    assert results(run(logdir=logdir, epochs=1))
    kept = pathlib.Path(f"{os.path.abspath(logdir)}.old").glob("*")
    assert [snapshot(path) for path in kept] == [earlier]
    assert [path.name for path in pathlib.Path(logdir).iterdir()] == [
        "imdb"
    ]  # no lock


def test_debug_removes_its_own_earlier_run_alone(run):
    spoil(
        {
            "logs/debug/version_0/old": "",
            "logs/debug/mine": "",
            "logs/imdb": "mine",
        }
    )
    assert results(run(debug=True))
    left = {str(path) for path in pathlib.Path().glob("logs*/*")}
    assert left == {"logs/debug", "logs/imdb"}
    left = {path.name for path in pathlib.Path("logs/debug").rglob("*")}
    assert "mine" in left and "old" not in left


@pytest.mark.parametrize(
    "link", ["imdb", "imdb/version_0", "debug", "debug/version_0"]
)
def test_a_link_is_moved_and_not_followed(run, place, link):
    shutil.move("logs", "target")
    target = place / "target" / "imdb" / link.partition("/")[2]
    path = place / "logs" / link
    path.parent.mkdir(parents=True)
    path.symlink_to(target)
    before = snapshot(place / "target")
    debug = link.startswith("debug")
    assert results(run(debug=debug, epochs=1)) and not path.is_symlink()
    assert snapshot(place / "target") == before
    kept = [p for p in (place / "logs.old").rglob("*") if p.is_symlink()]
    assert [p.readlink() for p in kept] == [target] * (not debug)


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        main.on_signals(main.stop)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is main.stop
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


# One run at a time.


@pytest.mark.parametrize("values", [{}, {"resume": True}, {"debug": True}])
def test_a_second_run_in_a_folder_is_refused(refused, values):
    spoil({RESULTS: None})
    name = "debug" if "debug" in values else "imdb"
    with main.only_run(pathlib.Path("logs", name)):
        words = ["--logdir=", f"process {os.getpid()} ", f"logs/{name}"]
        refused(Case(words), **values)
    assert not pathlib.Path("logs", f".{name}.lock").exists()


def test_a_lock_dies_with_its_process_and_binds_one_folder_alone(run):
    dying = (
        "import main, os, pathlib\n"
        "with main.only_run(pathlib.Path('logs/imdb')): os.kill(os.getpid(), 9)"
    )
    path = os.environ | {"PYTHONPATH": str(MAIN.parent)}
    done = subprocess.run([sys.executable, "-c", dying], env=path)
    assert done.returncode == -signal.SIGKILL
    assert pathlib.Path("logs/.imdb.lock").exists()
    with main.only_run(pathlib.Path("logs/debug")):
        assert results(run(epochs=1))
    assert [path.name for path in pathlib.Path("logs").iterdir()] == ["imdb"]


# The model.


def drop(part: str) -> Callable[[bytes], bytes]:
    return weigh(
        lambda weights: {k: v for k, v in weights.items() if part not in k}
    )


def spoil_one(weights: dict) -> dict:
    name = next(
        name for name in weights if name.endswith("embeddings.LayerNorm.bias")
    )
    weights[name][3] = float("nan")
    return weights


def as_words(size: int) -> Callable[[bytes], str]:
    """Returns what makes a tokenizer know this many numbers."""
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *map(str, range(size)),
    ]
    tokenizer = transformers.BertTokenizer({p: i for i, p in enumerate(pieces)})
    return lambda whole: tokenizer.backend_tokenizer.to_str()


C, W, T = "model/config.json", "model/model.safetensors", "model/tokenizer*"
OF_A_PART = '{"weight_map": {"a": "b.bin"}, "metadata": {}}'
EVIL = pickle.dumps(Evil())
MODELS = {
    "no config": Case(["config.json"], {C: None}),
    "a broken config": Case(["config.json"], {C: "{"}),
    "roberta": Case(["a BERT's config.json"], {C: edit(model_type="roberta")}),
    "a decoder": Case(["is_decoder False, found True"], {C: edit(is_decoder=True)}),
    "relative positions": Case(
        ["absolute, found relative_key"],
        {C: edit(position_embedding_type="relative_key")}),
    "another padding": Case(
        ["[PAD] is 0", "pad_token_id 3"], {C: edit(pad_token_id=3)}),
    "no padding": Case(
        ["[PAD] is 0", "pad_token_id None"], {C: edit(pad_token_id=None)}),
    "another padding of the tokenizer": Case(
        ["[PAD] is 3", "pad_token_id 0"],
        {"model/tokenizer_config.json": edit(pad_token="[SEP]")}),
    "no weights": Case(["model.safetensors"], {W: None}),
    "all but the last of the weights": Case(["safetensors"], {W: lambda all: all[:-9]}),
    "text as weights": Case(["safetensors"], {W: "not found" * 99}),
    "weights of fewer layers": Case(["16 weights", "layer.1."], {W: drop("layer.1.")}),
    "config of other layers": Case(["layer.2."], {C: edit(num_hidden_layers=3)}),
    "weights that are no numbers": Case(
        ["NaN", "embeddings.LayerNorm.bias"], {W: weigh(spoil_one)}),
    "no tokenizer": Case(
        ["tokenizer"], {T: None, "model/vocab*": None, "model/special*": None}),
    "a broken tokenizer": Case(["tokenizer"], {"model/tokenizer.json": '{"version": '}),
    "a tokenizer larger than the embedding": Case(
        ["95 word-pieces", "embeddings"], {"model/tokenizer.json": as_words(90)}),
    "a pickle of weights": Case(
        ["safetensors"], {W: None, "model/pytorch_model.bin": EVIL}),
    "a pickle named safetensors": Case(["safetensors"], {W: EVIL}),
    "a pickle as a part of safetensors": Case(["safetensors"], {
        W: None, f"{W}.index.json": OF_A_PART, "model/b.bin": EVIL}),
}  # fmt: skip


@each(MODELS)
def test_a_model_is_refused(refused, case):
    refused(Case(["--model=model", *case.words], case.files), model="model")


@pytest.mark.parametrize("name", ["imdb", "debug"])
@pytest.mark.parametrize("flag", ["model", "dataset"])
def test_what_lies_in_the_run_that_is_to_go_is_refused(refused, flag, name):
    folder = f"logs/{name}/version_0/of_{flag}"
    shutil.copytree({"model": "model", "dataset": "data"}[flag], folder)
    values = {flag: folder, "debug": name == "debug", "percent": 100}
    refused(Case([f"--{flag}={folder}"]), **values)


def test_a_classifier_of_other_classes_starts_anew_and_says_so(trained, capsys):
    model = str(trained / "model")
    earlier = safetensors.torch.load_file(trained / "model" / "model.safetensors")
    same = main.load_bert(model, ["neg", "pos"], False)
    assert same.classifier.weight.equal(earlier["classifier.weight"])
    assert not capsys.readouterr().out
    for names in (["pos", "neg"], ["bad", "good"], ["neg", "pos", "so-so"]):
        other = main.load_bert(model, names, False)
        assert capsys.readouterr().out.count("\n") == 1
        for row in other.classifier.weight:
            assert not row.eq(earlier["classifier.weight"]).any()
        assert [*other.config.id2label.values()] == names
        pooler = other.bert.pooler.dense.weight
        assert pooler.equal(earlier["bert.pooler.dense.weight"])


def test_code_that_a_model_names_is_never_run(run, place):
    tasks = ("Config", "Model", "ModelForSequenceClassification", "Tokenizer")
    config = edit(
        auto_map={f"Auto{task}": "evil.Evil" for task in tasks},
        custom_pipelines={"text-classification": {"impl": "evil.Evil"}},
        _attn_implementation="evil/kernel",
    )
    maps = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    tokenizer = edit(auto_map=maps, tokenizer_class="Evil")
    modules = dict.fromkeys(
        ["evil.py", "modeling_bert.py", "__init__.py"], MALICE
    )
    files = {"config.json": config, "tokenizer_config.json": tokenizer}
    spoil(modules | files, place / "model")
    before = snapshot(place / "model")
    assert results(run(model="model", epochs=1))
    assert snapshot(place / "model") == before


# Names of models and of data.


@pytest.mark.parametrize(
    "name", ["", "nowhere", "/nowhere/bert", "a/b/c", "new.csv"]
)
@pytest.mark.parametrize("flag", ["model", "dataset"])
def test_no_such_folder_is_refused(refused, flag, name):
    hint = "give the one that holds it" if name == "new.csv" else "owner/name"
    words = [f"--{flag}={name}: expected a folder", hint]
    refused(Case(words, flags={flag: name}))


@pytest.mark.parametrize("flag", ["model", "dataset"])
def test_a_name_that_the_hub_does_not_give_is_refused(refused, monkeypatch, flag):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(Case([f"--{flag}=no/body: expected"], flags={flag: "no/body"}))


def test_local_folders_need_no_network(run, place, monkeypatch):
    look_up = mock.Mock(side_effect=OSError)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert results(run(model="model", dataset="data", percent=100, epochs=1))
    look_up.assert_not_called()


# The data. Forty sound rows precede what is broken.


def both(content: str | bytes, kind: str = "csv") -> dict[str, Change]:
    """Returns files that take the place of the sound ones."""
    files = {f"data/{part}.{kind}": content for part in ("train", "test")}
    return {"data/*": None} | files


def train(more: str) -> dict[str, Change]:
    return {"data/train.csv": CSV + more}


def twice(name: str) -> bytes:
    """Returns a parquet file with two columns of this name."""
    values = {"text": [text for text, _ in ROWS], "label": [k for _, k in ROWS]}
    names = ["text", "label", name]
    table = pyarrow.table([pyarrow.array(values[n]) for n in names], names=names)
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


BROKEN_CARD = "---\nconfigs: [\n---\n"
EVIL_CARD = """---
configs:
- config_name: ../../../evil
  data_files: [{split: train, path: a.csv}, {split: test, path: a.csv}]
---
"""
DATA = {
    "an empty folder": Case(["train and a test"], {"data/*": None}),
    "a broken card alone": Case(
        ["train and a test", "parsing"],
        {"data/*": None, "data/README.md": BROKEN_CARD}),
    "a card that leads elsewhere": Case(
        ["train and a test"],
        {"data/*": None, "data/a.csv": CSV, "data/README.md": EVIL_CARD}),
    "a loading script": Case(
        ["train and a test", "data.py"],
        {"data/*": None, "data/data.py": MALICE, "data/__init__.py": MALICE}),
    "no test file": Case(["['train']"], {"data/test.csv": None}),
    "no train file": Case(["['test']"], {"data/train.csv": None}),
    "csv and jsonl": Case(
        ["one file each", "train.csv", "train.jsonl"], {"data/train.jsonl": JSONL}),
    "only texts, like aclImdb": Case(["label", "['text']"], {"data/*": None} | {
        f"data/{part}/{kind}/{n}.txt": "film" for part in ("train", "test")
        for kind in ("pos", "neg") for n in range(3)}),
    "a csv without rows": Case(["no data"], both("text,label\n")),
    "a csv without a byte": Case(["data/test.csv"], both("")),
    "a jsonl without a byte": Case(["data/test.jsonl"], both("", "jsonl")),
    "a row of four cells": Case(["line 42"], train("1,2,3,4\n")),
    "an open quote": Case(["row 41"], train('"a film,1\n')),
    "latin-1": Case(["utf-8"], both(CSV.encode() + "café,1\n".encode("latin-1"))),
    "a broken jsonl": Case(["row 40"], both(JSONL + '{"text": "', "jsonl")),
    "a broken parquet": Case(["test.parquet"], both(b"PAR1 and so on", "parquet")),
    "no text": Case(["text", "['review', 'label']"],
                    both(CSV.replace("text", "review"))),
    "no label in test": Case(["test: ", "['text', 'stars']"],
                             {"data/test.csv": CSV.replace("label", "stars")}),
    "semicolons": Case(["['text;label']"], both(CSV.replace(",", ";"))),
    "a second text alone": Case(["['text.1', 'label']"],
                                both("text.1,label\n" + "a,1\nb,0\n" * 20)),
    "two texts": Case(["one column text"],
                      both("text,text,label\n" + "a,b,1\nc,d,0\n" * 20)),
    "two labels": Case(["one column label"],
                       both("text,label,label\n" + "a,1,1\nb,0,0\n" * 20)),
    "two texts in parquet": Case(["text"], both(twice("text"), "parquet")),
    "two labels in parquet": Case(["label"], both(twice("label"), "parquet")),
    "texts missing": Case(["train: ", "2 of 43", "text", "NA"],
        train(",1\na film,0\n,0\n")),
    "a text missing in test": Case(["test: ", "1 of 42", "text"],
                                   {"data/test.csv": CSV + "a,1\n,1\n"}),
    "labels missing": Case(["2 of 42", "label"], train("a,\nb,\n")),
    "null text": Case(["1 of", "text"],
                      both(JSONL + '{"text": null, "label": 1}\n', "jsonl")),
    "a label that only test knows": Case(
        ["test has ['7']", "['0', '1']"], {"data/test.csv": CSV + "a film,7\n"}),
    "names in test, numbers in train": Case(
        ["test has ['neg', 'pos']", "['0', '1']"],
        {"data/test.csv": CSV.replace(",0\n", ",neg\n").replace(",1\n", ",pos\n")}),
    "labels that are broken numbers": Case(["label", "float"], train("a film,0.5\n")),
    "labels that are lists": Case(["label", "list"], both(
        '{"text": "a", "label": [1]}\n{"text": "", "label": [0]}\n' * 20, "jsonl")),
    "texts that are lists": Case(["text", "list"], both(
        '{"text": ["a"], "label": 1}\n{"text": [], "label": 0}\n' * 20, "jsonl")),
    "labels of words and numbers": Case(["label", "['int', 'str']"], both(
        JSONL + '{"text": "a film", "label": "bad"}\n', "jsonl")),
    "a blank label": Case(["a label is blank"], both(
        JSONL.replace(": 0}", ': " "}').replace(": 1}", ': "good"}'), "jsonl")),
    "commas without quotes": Case(["data/test.csv", "loss of data"], both(
        "text,label\n" + "fine, and touching,1\nbad, and stale,0\n" * 20)),
    "labels that are yes or no": Case(["label", "bool"], both(
        JSONL.replace(": 0", ": false").replace(": 1", ": true"), "jsonl")),
    "texts that are numbers": Case(["text", "int"],
                                   both("text,label\n" + "1,0\n2,1\n" * 20)),
    "ten reviews": Case(["too few", "1 of 10"], both(
        "text,label\n" + "a,0\nb,1\n" * 5)),
    "a class with one review": Case(["too few"], both(CSV + "a film,2\n")),
    "a pattern": Case(["--dataset=[ab]: ", "no *?["], {
        "a/b/train.csv": CSV, "a/b/test.csv": CSV, "[ab]/b/train.csv": CSV},
        {"dataset": "[ab]"}),
    "a small share": Case(["too few", "0 of 40"], {}, {"percent": 1}),
    "one class": Case(["two classes", "['1']"], both(CSV.replace(",0\n", ",1\n"))),
}  # fmt: skip


@each(DATA)
def test_data_are_refused(refused, case):
    prefix = "too few" if "too few" in case.words else "--dataset="
    case = dataclasses.replace(case, words=[f"main.py: {prefix}", *case.words])
    refused(case, **{"dataset": "data", "percent": 100} | case.flags)


@pytest.mark.parametrize("part", ["train", "test"])
def test_labels_of_minus_one_are_refused(refused, part):
    labels = {"train": [0, 1] * 20, "test": [0, 1] * 20}
    labels[part] = [*[0, 1] * 19, -1, -1]
    columns = {p: {"text": ["a"] * 40, "label": labels[p]} for p in labels}
    write_reviews(
        pathlib.Path("parquet"), "parquet", **columns, names=["neg", "pos"]
    )
    refused(Case([f"{part}: ", "-1"]), dataset="parquet", percent=100)


def labels_of(reviews: Any) -> list[str]:
    return reviews.features["label"].int2str(reviews["label"][:])


@pytest.mark.parametrize("test", ["neg pos", "pos neg", "neg", "csv"])
@pytest.mark.parametrize("train", ["neg pos", "pos neg", "so-so pos neg", "csv"])
def test_labels_of_test_are_matched_by_name(tmp_path, train, test):
    """A parquet's numbers have names in that order; a csv has the names themselves."""
    for part, names in (("train", train.split()), ("test", test.split())):
        columns = {"text": [], "label": []}
        for number, name in enumerate(
            ["neg", "pos"] if names == ["csv"] else names
        ):
            columns["text"].append(f"called {name}")
            columns["label"].append(name if names == ["csv"] else number)
        files = {"train": None, "test": None, part: columns}
        kind = ("csv", None) if names == ["csv"] else ("parquet", names)
        write_reviews(tmp_path, kind[0], files["train"], files["test"], kind[1])
    splits = main.load_splits(str(tmp_path))
    expected = ["neg", "pos"] if train == "csv" else train.split()
    for split in splits.values():
        assert split.features["label"].names == expected
        assert [f"called {name}" for name in labels_of(split)] == split["text"][:]


SOUND = {
    "neighbours do not join in": {
        "data/train_old.csv": "text,label\nold,1\n", "data/train.csv.bak": CSV,
        "data/old/train.csv": CSV, "data/eval.csv": "text,label\neval,0\n",
        "data/my test notes.csv": "x,y\n1,2\n", "data/test/0.csv": CSV},
    "one csv and one jsonl": {"data/test.csv": None, "data/test.jsonl": JSONL},
    "tabs": both(CSV.replace(",", "\t"), "tsv"),
    "capitals in the ending": both(CSV, "CSV"),
    "a byte order mark": both("\ufeff" + CSV),
    "a card without yaml": {"data/README.md": "# Reviews\n"},
    "a card with broken yaml": {"data/README.md": BROKEN_CARD},
    "a card that names other files": {"data/a.csv": CSV, "data/README.md": EVIL_CARD},
    "the Hub's layout": both(CSV) | {
        "data/*": None, "data/data/train-0-of-1.csv": CSV, "data/data/test-0.csv": CSV},
}  # fmt: skip


@each(SOUND)
@pytest.mark.parametrize("dataset", ["data", "."])
def test_train_and_test_are_read_and_nothing_else(place, case, dataset):
    spoil(case)
    os.chdir(place / "data" if dataset == "." else place)
    splits = main.load_splits(dataset)
    assert [*splits] == ["train", "test"]
    for split in splits.values():
        assert split["text"][:] == [text for text, _ in ROWS]
        assert labels_of(split) == [str(label) for _, label in ROWS]


def test_brackets_in_a_path_are_no_pattern():
    other = CSV.replace("film", "book")
    spoil({f"set1/{part}.csv": other for part in ("train", "test")})
    spoil({f"set[1]/{part}.csv": CSV for part in ("train", "test")})
    spoil({"reviews1.txt": "the other\n", "reviews[1].txt": "this one\n"})
    assert main.load_splits("set[1]")["train"]["text"][0] == ROWS[0][0]
    assert main.read_texts("reviews[1].txt")["text"][:] == ["this one"]


def test_a_file_replaced_under_its_time_and_size_is_read_anew():
    for word in ("film", "book"):
        content = CSV.replace("film", word)
        hub = ("hub/data/train-0.csv", "hub/data/test-0.csv")  # its layout
        names = ("data/train.csv", "data/test.csv", "data/new.csv", *hub)
        spoil(dict.fromkeys(names, content))
        for name in names:
            os.utime(name, (10**9, 10**9))
        read = [
            *main.load_splits("data").values(),
            main.read_texts("data/new.csv"),
        ]
        read += main.load_splits("hub").values()
        first = [reviews["text"][0] for reviews in read]
        assert first == [f"a boring {word} 0"] * 5


ODD = [
    "",
    " \t ",
    "a fine\0film",
    "a 🎬 film ❤️",
    "[PAD] [SEP] [UNK]",
    "ﷺ\u200b\u202e",
]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_odd_reviews_are_kept(run, tmp_path, kind):
    odd = [
        text for text in ODD if kind != "csv" or text
    ]  # there "" is a missing text
    texts = (
        [text for text, _ in ROWS] + odd + ["x" * 10**5, "a fine film " * 10**4]
    )
    columns = {"text": texts, "label": [n % 2 for n in range(len(texts))]}
    dataset = write_reviews(tmp_path / "data", kind, columns, columns)
    assert main.load_splits(dataset)["test"]["text"][:] == texts
    found = results(run(dataset=dataset, percent=100))
    kept = {part: sum(n.values()) for part, n in found["samples"].items()}
    assert kept["test"] == kept["train"] + kept["val"] == len(texts)
    assert sum(map(sum, found["confusion"])) == len(texts)


# What an honest result says.


def test_a_run_tells_leaks_baseline_and_blanks(run, tmp_path, capsys):
    train = {
        "text": [text for text, _ in ROWS],
        "label": ["neg", "pos", "neg", " pos"] * 10,
    }
    known = [ROWS[1][0], ROWS[4][0], ROWS[4][0]]
    texts = [*known, ROWS[5][0].upper(), *map(str, range(9, 18))]
    test = {"text": texts, "label": ["pos"] * 3 + ["neg "] * 10}
    dataset = write_reviews(tmp_path / "data", "jsonl", train, test)
    main.say_once.cache_clear()  # of earlier tests
    found = results(run(dataset=dataset, percent=100))
    assert found["samples"]["test"] == {"neg": 10, "pos": 3}
    assert found["leaks"] == 3
    assert found["baseline"] == {
        "label": "neg",
        "test_acc": pytest.approx(10 / 13),
    }
    data, _, end = capsys.readouterr().out.partition("Training")
    blanks = "labels that differ by blanks alone are one class"
    assert data.count(blanks) == 1 and blanks not in end
    assert " 3 of test are in train or val, word for word" in data
    assert " 3 of test are in train or val, word for word" in end
    assert "always neg: 76.92%" in end


def test_many_classes_print_little(run, tmp_path, capsys):
    labels = [f"class {n:02}" for n in range(main.SHOWN + 1)] * 10
    columns = {
        "text": [f"a film {n}" for n in range(len(labels))],
        "label": labels,
    }
    dataset = write_reviews(tmp_path / "data", "jsonl", columns, columns)
    found = results(run(dataset=dataset, percent=100))
    assert found["confusion"] is None and len(found["samples"]["test"]) == 21
    out = capsys.readouterr().out
    assert "class 19 " in out and ", …" in out
    assert "class 20" not in out and "taken for" not in out


def test_class_names_lead_nowhere_and_fit_an_ascii_terminal(
    run, place, monkeypatch
):
    """They become tags, tables, a card and lines."""
    names = ["../../../evil", "/evil\n---\nevil: 1", "🎬"]
    columns = {"text": [text for text, _ in ROWS[:39]], "label": names * 13}
    dataset = write_reviews(place / "names", "jsonl", columns, columns)
    before = snapshot()
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    folder = run(dataset=dataset, percent=100)
    assert [*results(folder)["samples"]["test"]] == names
    run(predict="new.csv", model=str(folder / "model"))
    terminal.flush()
    said, _, predicted = terminal.buffer.getvalue().partition(b"\nlabel,")
    assert (
        rb"always" in said
        and rb"\U0001f3ac" in said
        and rb"\U0001f3ac" in predicted
    )
    new = {
        name for name in snapshot().keys() - before.keys() if name[:4] != "logs"
    }
    assert new == set()


# Resuming. `run` gives the flags of the run that is here interrupted.

OF_OTHERS = {"state_dict": {}, "hyper_parameters": {"lr": 0.1}, "global_step": 3}
RESUME = {
    "nothing": Case(["nothing", "last.ckpt"], {"logs/imdb/version_0/**/*.*": None}),
    "no checkpoint": Case(["nothing", "last.ckpt"], {LAST: None}),
    "no best": Case(["no best.ckpt"], {BEST: None}),
    "empty": Case(["no whole checkpoint"], {LAST: ""}),
    "all but a byte": Case(["no whole checkpoint"], {LAST: lambda whole: whole[:-1]}),
    "text": Case(["no whole checkpoint"], {LAST: "not found\n"}),
    "a tensor": Case(["no whole checkpoint"], {LAST: saved(torch.ones(3))}),
    "weights alone": Case(["no whole checkpoint"], {LAST: saved({"w": torch.ones(3)})}),
    "no settings": Case(["no whole"], {LAST: store(hyper_parameters=None)}),
    "no optimiser": Case(["no whole"], {LAST: store(optimizer_states=None)}),
    "no fingerprint": Case(["no whole"], {LAST: store(fingerprint=None)}),
    "of another program": Case(["no whole checkpoint"], {LAST: saved(OF_OTHERS)}),
    "a pickle": Case(["no whole checkpoint"], {LAST: pickle.dumps(Evil())}),
    "a pickle among the callbacks": Case(["no whole"], {LAST: store(callbacks=Evil())}),
    "another rate": Case(["--lr=0.004", "0.003"], flags={"lr": 0.003}),
    "another precision": Case(
        ["--precision=32-true", "bf16-mixed"], flags={"precision": "bf16-mixed"}),
    "another model": Case(["--model=", "bert", "not model"], flags={"model": "model"}),
    "other data": Case(["--dataset=", "not data"], flags={"dataset": "data"}),
}  # fmt: skip


@each(RESUME)
def test_another_or_broken_run_is_not_resumed(refused, case):
    spoil({RESULTS: None})
    refused(
        Case(["--resume: ", *case.words], case.files, case.flags), resume=True
    )


def test_a_run_is_not_resumed_with_another_tokenizer(place, run, monkeypatch):
    """As a model folder, or a name on the Hub, may hold another one tomorrow."""
    load = main.load_tokenizer

    def changed(model: str, config: dict) -> Any:
        tokenizer = load(model, config)
        tokenizer.backend_tokenizer.normalizer = None
        return tokenizer

    spoil({RESULTS: None})
    monkeypatch.setattr(main, "load_tokenizer", changed)
    with pytest.raises(SystemExit, match="another tokenizer, than the run's"):
        run(resume=True)


def test_a_finished_run_is_not_resumed(refused):
    refused(Case(["--resume: ", "finished"]), resume=True)


def test_a_pickle_in_the_best_checkpoint_runs_no_code(run, place):
    """It is read once training, which is done, has gone on."""
    spoil({RESULTS: None, BEST: store(callbacks=Evil())})
    with pytest.raises(
        (SystemExit, pickle.UnpicklingError), match="Weights only load failed"
    ):
        run(resume=True)


def test_checkpoints_are_read_as_weights_alone(run, place, monkeypatch):
    spoil({RESULTS: None})
    load = mock.Mock(side_effect=torch.load)
    monkeypatch.setattr(torch, "load", load)
    run(resume=True)
    names = [call.args[0] for call in load.call_args_list]
    assert {"last.ckpt", "best.ckpt"} <= {os.path.basename(str(n)) for n in names}
    assert load.call_count == 4  # to check, to fit, to test, and to finish
    assert all(call.kwargs["weights_only"] for call in load.call_args_list)


# While running.


def spoil_loss(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[int], float]
) -> None:
    calls = itertools.count(1)
    cross_entropy = main.F.cross_entropy

    def spoilt(*args: Any, **options: Any) -> torch.Tensor:
        return cross_entropy(*args, **options) * spoil(next(calls))

    monkeypatch.setattr(main.F, "cross_entropy", spoilt)


@pytest.mark.parametrize(
    ("every", "line"), [(1, "inf at step 3"), (5, "nan at step 5")]
)
def test_a_loss_that_is_no_number_names_the_step(run, monkeypatch, every, line):
    monkeypatch.setattr(main, "LOG_EVERY", every)
    spoil_loss(monkeypatch, lambda call: float("inf") if call == 3 else 1.0)
    with pytest.raises(SystemExit, match=f"loss {line}: .*--lr"):
        run()


def test_a_full_gpu_names_the_flags_that_help(run, monkeypatch):
    def full(call: int) -> float:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2 GiB."
        )

    spoil_loss(monkeypatch, full)
    with pytest.raises(SystemExit, match=r"memory.*--batch_size.*--seq_length"):
        run()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="it is Linux's")
@pytest.mark.parametrize(("whole", "name"), [(0, "best"), (3, "last")])
def test_a_full_disk_is_told_in_one_line(run, monkeypatch, whole, name):
    """The first checkpoints that are whole are best.ckpt, last.ckpt and best.ckpt."""
    save = torch.save
    saves = itertools.count()

    def to_full_disk(value: Any, file: Any) -> None:
        with open("/dev/full", "wb") as full:
            save(value, file if next(saves) < whole else full)

    monkeypatch.setattr(torch, "save", to_full_disk)
    with pytest.raises(
        SystemExit, match=f"cannot save .*{name}.ckpt.* disk full"
    ):
        run()
    assert [path.name for path in pathlib.Path("logs").iterdir()] == [
        "imdb"
    ]  # no lock


# Predicting.

CONFIG = "logs/imdb/version_0/model/config.json"
MODEL = "logs/imdb/version_0/model/model.safetensors"
PREDICT = {
    "no such file": Case(["new.tsv"], flags={"predict": "new.tsv"}),
    "a folder": Case(["data"], flags={"predict": "data"}),
    "no name": Case(["--predict=: "], flags={"predict": ""}),
    "no text": Case(["text", "['review']"], {"new.csv": "review\na film\n"}),
    "two texts": Case(["one column text"], {"new.csv": "text,text\na film,b\n"}),
    "a broken csv": Case(["line 3"], {"new.csv": "text\na,b\nc,d,e\n"}),
    "missing text": Case(["1 of", "text"], {"new.csv": "text,n\na film,1\n,2\n"}),
    "numbers": Case(["'int'"], {"new.csv": "text\n1\n2\n"}),
    "no byte": Case(["new.csv"], {"new.csv": ""}),
    "no rows": Case(["no data"], {"new.csv": "text\n"}),
    "no line": Case(["new.txt"], {"new.txt": ""}, {"predict": "new.txt"}),
    "commas without quotes": Case(
        ["new.csv", "loss of data"], {"new.csv": "text\nfine, and touching\n"}),
    "bytes": Case(["utf-8"], {"new.txt": b"\xff\xfe\x00"}, {"predict": "new.txt"}),
    "an empty jsonl": Case(["new.jsonl"], {"new.jsonl": ""}, {"predict": "new.jsonl"}),
    "a broken jsonl": Case(["new.jsonl"], {"new.jsonl": "{"}, {"predict": "new.jsonl"}),
    "a packed csv": Case([".csv", ".txt"], {"new.csv.gz": b"\x1f\x8b"},
                         {"predict": "new.csv.gz"}),
    "lists": Case(["text", "list"], {"new.jsonl": '{"text": ["a film", "b"]}\n'},
                  {"predict": "new.jsonl"}),
    "dictionaries": Case(["text", "dict"], {"new.jsonl": '{"text": {"a": "b"}}\n'},
                         {"predict": "new.jsonl"}),
    "no model": Case(["no model in a/b", "--model"], {}, {"model": "a/b"}),
    "no classifier": Case(["model", "no trained classifier"], {}, {"model": "model"}),
    "no weights of the classifier": Case(
        ["2 weights", "classifier.bias"], {MODEL: drop("classifier")}),
    "no pooler": Case(["2 weights", "bert.pooler"], {MODEL: drop("pooler")}),
    "a classifier of fewer classes": Case(
        ["weights", "classifier"], {CONFIG: edit(id2label={0: "a", 1: "b", 2: "c"})}),
    "a classifier that is no number": Case(["NaN"], {MODEL: weigh(spoil_one)}),
    "too long for the model": Case(["--seq_length=65"], {CONFIG: edit(seq_length=65)}),
}  # fmt: skip


@each(PREDICT)
def test_reviews_to_label_are_refused(refused, case):
    model = "logs/imdb/version_0/model"  # conftest gives that of the tests
    refused(case, **{"predict": "new.csv", "model": model} | case.flags)


TEXTS = ["a fine film", 'a "boring" film, clumsy', "a\tfine film"]
READABLE = {
    "new.tsv": pandas.DataFrame({"text": TEXTS}).to_csv(sep="\t"),
    "new.CSV": pandas.DataFrame({"text": TEXTS}).to_csv(),
    "new.json": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS),
    "new.txt": "".join(f"{text}\n" for text in TEXTS),
    "new": "".join(f"{text}\n" for text in TEXTS),
}


@pytest.mark.parametrize("name", READABLE)
def test_each_kind_of_file_is_read_as_what_it_is(name):
    spoil({name: READABLE[name]})
    assert main.read_texts(name)["text"][:] == TEXTS


def test_prediction_prints_its_csv_and_nothing_else(run, place, capfd):
    brackets = "a [SEP] fine [PAD] film [CLS] [MASK]"
    texts = [
        brackets,
        brackets.replace("[", "(").replace("]", ")"),
        brackets.upper(),
    ]
    texts.append("a film")
    spoil({"new.txt": "\n".join(texts)})
    before = snapshot()
    capfd.readouterr()
    run(model="logs/imdb/version_0/model", predict="new.txt")
    out, err = capfd.readouterr()
    assert snapshot() == before and not err
    head, *rows = out.splitlines()
    assert head == "label,neg,pos" and len(rows) == len(texts)
    for row in rows:
        label, neg, pos = row.split(",")
        assert label == ("neg" if float(neg) > float(pos) else "pos")
        assert float(neg) + float(pos) == pytest.approx(1, abs=2e-6)
    assert (
        rows[0] == rows[1] == rows[2] != rows[3]
    )  # special tokens are plain text


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        (
            "--model=model --dataset=data --percent=100 --seq_length=9 --batch_size=3",
            0,
        ),
        ("--predict=new.csv", -signal.SIGPIPE),
    ],
)
def test_a_reader_that_goes_ends_a_prediction_but_no_run(place, flags, status):
    """As `| head` goes: without a word, whether or not anything is left to print."""
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, str(MAIN), *flags.split()]
    done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (status, b"")
    assert pathlib.Path(RESULTS).exists()
    assert len([*pathlib.Path().glob("logs.old/*")]) == (status == 0)

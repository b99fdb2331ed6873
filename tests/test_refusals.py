"""Bad input ends `main.py` with one line and status 1, and nothing on disk changes.

The tables name a case, say what is broken, and give words that the line must hold. The
last part shows that nothing which is loaded can run code, or write where it should not.
"""

import http.server
import io
import json
import logging
import os
import pathlib
import pickle
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
import transformers
from absl import flags
from absl.testing import flagsaver
from conftest import command, write_reviews

import main

Files = dict[str, str | bytes | None]
Refused = Callable[..., str]
Run = Callable[..., pathlib.Path]


def snapshot(folder: pathlib.Path) -> dict[str, bytes | str]:
    """Returns all that lies in a folder: bytes of files, targets of links."""
    found: dict[str, bytes | str] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        else:
            found[name] = "folder" if path.is_dir() else path.read_bytes()
    return found


def write(folder: pathlib.Path, files: Files) -> str:
    """Writes files; those that are None do not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if content is not None:
            raw = content.encode() if isinstance(content, str) else content
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(raw)
    return str(folder)


def earlier_run(logdir: pathlib.Path) -> None:
    """Makes what looks like a finished run."""
    files: Files = {"hparams.yaml": "lr: 0.1\n", "results.json": '{"seconds": 1}\n'}
    write(logdir / "imdb" / "version_0", files | {"checkpoints/last.ckpt": b"weights"})


def one_line(capsys: pytest.CaptureFixture[str], call: Callable[[], Any]) -> str:
    """Returns the one line with which a call ends the program."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        call()
    line = exit.value.code
    assert isinstance(line, str)  # Python prints it, and exits with status 1
    assert line.strip() and len(line.splitlines()) == 1
    assert capsys.readouterr() == ("", "")
    return line


@pytest.fixture
def stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> pytest.CaptureFixture[str]:
    """Captures what libraries log as well: they hold the stderr of their import."""
    for name in ("datasets", "transformers", "huggingface_hub"):
        for handler in logging.getLogger(name).handlers:
            tell = lambda record: print(record.getMessage(), file=sys.stderr)  # noqa: E731
            monkeypatch.setattr(handler, "emit", tell)
    return capsys


@pytest.fixture
def refused(
    tmp_path: pathlib.Path,
    run: Run,
    stderr: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Refused:
    """Checks that a run is refused in one line with these words, and no trace."""
    monkeypatch.chdir(tmp_path)

    def check(*words: str, **values: Any) -> str:
        if not (tmp_path / "logs").exists():
            earlier_run(tmp_path / "logs")
        before = snapshot(tmp_path)
        line = one_line(stderr, lambda: run(**values))
        for word in words:
            assert word in line
        assert snapshot(tmp_path) == before
        return line

    return check


# Flags.

ILLEGAL = {
    "--percent=0": "--percent",
    "--percent=101": "--percent",
    "--percent=-5": "--percent",
    "--percent=half": "--percent",
    "--percent=0.5": "--percent",
    "--percent=nan": "--percent",
    "--seq_length=2": "--seq_length",
    "--seq_length=long": "--seq_length",
    "--truncation=middle": "head_tail",
    "--epochs=0": "--epochs",
    "--epochs=-1": "--epochs",
    "--epochs=1.5": "--epochs",
    "--epochs=inf": "--epochs",
    "--batch_size=0": "--batch_size",
    "--optimizer=adam": "adamw",
    "--lr=0": "--lr",
    "--lr=-1e-5": "--lr",
    "--lr=1": "--lr",
    "--lr=nan": "--lr",
    "--lr=inf": "--lr",
    "--lr=fast": "--lr",
    "--momentum=1": "--momentum",
    "--momentum=-0.1": "--momentum",
    "--momentum=nan": "--momentum",
    "--weight_decay=nan": "--weight_decay",
    "--weight_decay=-1": "--weight_decay",
    "--warmup=nan": "--warmup",
    "--warmup=1": "--warmup",
    "--warmup=-inf": "--warmup",
    "--seed=-1": "--seed",
    "--seed=4294967296": "--seed",
    "--seed=lucky": "--seed",
    "--precision=16": "bf16-mixed",
    "--devices=0": "--devices",
    "--devices=auto": "--devices",
    "--num_nodes=0": "--num_nodes",
    "--strategy=fsdp": "ddp",
    "--debug=perhaps": "--debug",
    "--learning_rate=1e-5": "learning_rate",
    "--epoch=5": "epochs",  # the suggestion
}


@pytest.mark.parametrize("flag", ILLEGAL)
def test_absl_refuses_a_flag(flag: str) -> None:
    with flagsaver.flagsaver(), pytest.raises(flags.Error) as error:
        flags.FLAGS(["main.py", flag])
    assert ILLEGAL[flag] in str(error.value)


def test_a_user_reads_one_line_and_no_more(tmp_path: pathlib.Path, bert: str) -> None:
    write(tmp_path / "data", {"train.csv": CSV + "1,2,3,4\n", "test.csv": CSV})
    earlier_run(tmp_path / "logs")
    before = snapshot(tmp_path)
    done = command(f"--model={bert}", "--dataset=data", "--seq_length=9", cwd=tmp_path)
    assert done.returncode == 1
    assert "line 42" in done.stderr and done.stderr.count("\n") == 1
    assert not done.stdout
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("stray", ["debug", "-", "0", "percent=5", ""])
def test_a_stray_argument_is_refused(
    capsys: pytest.CaptureFixture[str], stray: str
) -> None:
    line = one_line(capsys, lambda: main.main(["main.py", stray]))
    assert repr(stray) in line and "--" in line


def test_a_length_beyond_the_model_is_refused(refused: Refused) -> None:
    refused("--seq_length=65", "64", seq_length=65)


def test_more_processes_than_reviews_are_refused(refused: Refused) -> None:
    refused("14 processes", "--devices", devices=14)  # 13 reviews validate


@pytest.mark.parametrize("started, devices", [("2", 1), ("1", 2), ("2", 3)])
def test_another_number_of_processes_than_the_flags_say_is_refused(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, started: str, devices: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", started)
    words = f"{started} processes started", f"--num_nodes is {devices}"
    refused("--devices", *words, devices=devices)


# The folder of the logs.


def as_file(folder: pathlib.Path) -> str:
    (folder / "notes").write_text("mine")
    return "notes"


def below_file(folder: pathlib.Path) -> str:
    return as_file(folder) + "/logs/bert"


def dangling(folder: pathlib.Path) -> str:
    (folder / "link").symlink_to(folder / "nowhere")
    return "link"


def of_somebody(*parts: str) -> Callable[[pathlib.Path], str]:
    def make(folder: pathlib.Path) -> str:
        earlier_run(folder / "theirs")
        path = folder.joinpath("theirs", *parts)
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        return "theirs"

    return make


def imdb_file(folder: pathlib.Path) -> str:
    write(folder / "theirs", {"imdb": "mine"})
    return "theirs"


def old_file(folder: pathlib.Path) -> str:
    earlier_run(folder / "theirs")
    (folder / "theirs.old").write_text("mine")
    return "theirs"


LOGDIRS = {
    "a file": (as_file, ["notes", "folder"]),
    "below a file": (below_file, ["notes", "folder"]),
    "a dangling link": (dangling, ["link", "folder"]),
    "imdb is a file": (imdb_file, ["theirs/imdb"]),
    "imdb has a file of somebody": (of_somebody("imdb", "thesis.txt"), ["thesis.txt"]),
    "imdb has a folder of somebody": (
        of_somebody("imdb", "version_1", "model"),
        ["theirs/imdb/version_1"],
    ),
    "imdb has a hidden folder": (of_somebody("imdb", ".git", "HEAD"), [".git"]),
    "version_0 has a file of somebody": (
        of_somebody("imdb", "version_0", "photo.jpg"),
        ["photo.jpg"],
    ),
    "earlier runs cannot be moved": (old_file, ["theirs.old"]),
}


@pytest.mark.parametrize("case", LOGDIRS)
def test_a_logdir_is_refused(
    refused: Refused, tmp_path: pathlib.Path, case: str
) -> None:
    make, words = LOGDIRS[case]
    refused("--logdir", *words, logdir=make(tmp_path))


@pytest.mark.parametrize("below", ["", "new/logs"])
def test_a_logdir_that_is_not_writable_is_refused(
    refused: Refused, tmp_path: pathlib.Path, below: str
) -> None:
    (tmp_path / "theirs").mkdir(mode=0o500)
    if os.access(tmp_path / "theirs", os.W_OK):
        pytest.skip("root may write anywhere")
    refused("--logdir", "theirs", logdir=str(tmp_path / "theirs" / below))


@pytest.mark.parametrize("logdir", ["logs", ".", "", "sub/..", "a b;touch x", "-rf"])
def test_any_name_of_a_logdir_keeps_the_earlier_run(
    run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, logdir: str
) -> None:
    (tmp_path / "work" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    earlier_run(pathlib.Path(logdir))
    earlier = snapshot(pathlib.Path(logdir, "imdb"))
    assert (run(logdir=logdir, epochs=1) / "results.json").exists()
    kept = pathlib.Path(f"{os.path.abspath(logdir)}.old").glob("*")
    assert [snapshot(path) for path in kept] == [earlier]


# The model.


def edit(name: str, **values: Any) -> Callable[[pathlib.Path], None]:
    """Returns what changes entries of a json file."""

    def change(folder: pathlib.Path) -> None:
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | values))

    return change


def drop(*patterns: str) -> Callable[[pathlib.Path], None]:
    def remove(folder: pathlib.Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return remove


def put(name: str, content: str | bytes) -> Callable[[pathlib.Path], None]:
    return lambda folder: void(write(folder, {name: content}))


def void(_: Any) -> None: ...


def cut(keep: float) -> Callable[[pathlib.Path], None]:
    def truncate(folder: pathlib.Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])

    return truncate


def larger_tokenizer(folder: pathlib.Path) -> None:
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    drop("tokenizer*", "vocab*", "special*")(folder)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(size))]
    transformers.BertTokenizer({p: i for i, p in enumerate(pieces)}).save_pretrained(
        folder
    )


def without_weights_of_a_layer(folder: pathlib.Path) -> None:
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    kept = {k: v for k, v in weights.items() if "layer.1." not in k}
    assert len(kept) < len(weights)
    safetensors.torch.save_file(kept, path, {"format": "pt"})


def as_pickle(folder: pathlib.Path) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    drop("model.safetensors")(folder)


MODELS = {
    "an empty folder": (drop("*"), ["config.json"]),
    "no config": (drop("config.json"), ["config.json"]),
    "broken config": (put("config.json", "{"), ["config.json"]),
    "roberta": (edit("config.json", model_type="roberta"), ["BERT", "roberta"]),
    "distilbert": (
        edit("config.json", model_type="distilbert"),
        ["BERT", "distilbert"],
    ),
    "no weights": (drop("model.safetensors"), ["model.safetensors"]),
    "half of the weights": (cut(0.5), ["safetensors"]),
    "all but the last of the weights": (cut(0.999), ["safetensors"]),
    "no byte of the weights": (cut(0), ["safetensors"]),
    "text as weights": (put("model.safetensors", "not found" * 99), ["safetensors"]),
    "a pickle of weights": (as_pickle, ["safetensors"]),
    "weights of fewer layers": (without_weights_of_a_layer, ["layer.1."]),
    "config of other layers": (edit("config.json", num_hidden_layers=3), ["layer.2."]),
    "config of another width": (
        edit("config.json", hidden_size=48, intermediate_size=96),
        ["weights"],
    ),
    "no tokenizer": (drop("tokenizer*", "vocab*", "special*"), ["tokenizer"]),
    "broken tokenizer": (put("tokenizer.json", '{"version": '), ["tokenizer"]),
    "a tokenizer larger than the embedding": (larger_tokenizer, ["embedding"]),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_is_refused(
    refused: Refused, tmp_path: pathlib.Path, bert: str, case: str
) -> None:
    spoil, words = MODELS[case]
    model = shutil.copytree(bert, tmp_path / "model")
    spoil(model)
    refused("--model", *words, model=str(model))


@pytest.mark.parametrize("name", ["", "nowhere", "/nowhere/bert", "./a/b", "a/b/c"])
@pytest.mark.parametrize("flag", ["model", "dataset"])
def test_no_such_folder_is_refused(refused: Refused, flag: str, name: str) -> None:
    refused(f"--{flag}={name}", "no such folder", **{flag: name})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Puts another Hub in place of the real one: shut, silent or without the name."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    silent, shut = socket.create_server(("127.0.0.1", 0)), socket.socket()
    shut.bind(("127.0.0.1", 0))  # nobody listens
    ports = {"no name": server.server_port, "silent": silent.getsockname()[1]}
    ports["shut"] = shut.getsockname()[1]

    def use(kind: str) -> None:
        url = f"http://127.0.0.1:{ports[kind]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)

    yield use
    server.shutdown()
    for each in (server.socket, silent, shut):
        each.close()


@pytest.mark.parametrize(
    ("flag", "name", "kind"),
    [
        ("model", "google-bert/bert-base-uncased", "silent"),
        ("model", "google-bert/bert-base-uncased", "shut"),
        ("dataset", "stanfordnlp/imdb", "shut"),
    ],
)
def test_without_network_it_says_so_within_seconds(
    refused: Refused, hub: Callable[[str], None], flag: str, name: str, kind: str
) -> None:
    hub(kind)
    start = time.monotonic()
    words = "network", "--dataset", "--model", "HF_HUB_OFFLINE=1"
    refused(f"--{flag}={name}", *words, **{flag: name})
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("flag", ["model", "dataset"])
def test_a_name_that_the_hub_lacks_is_refused(
    refused: Refused, hub: Callable[[str], None], flag: str
) -> None:
    hub("no name")
    line = refused(f"--{flag}=no/body", "Hub", **{flag: "no/body"})
    assert "network" not in line


@pytest.mark.parametrize("flag", ["model", "dataset"])
def test_a_name_that_is_not_cached_is_refused_offline(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(f"--{flag}=no/body", **{flag: "no/body"})


# The data. Forty sound rows precede what is broken.

ROWS = [(f"a {('boring', 'fine')[n % 2]} film {n}", n % 2) for n in range(40)]
CSV = "text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS)
JSONL = "".join(json.dumps({"text": t, "label": k}) + "\n" for t, k in ROWS)


def both(content: str | bytes, kind: str = "csv") -> Files:
    return {f"train.{kind}": content, f"test.{kind}": content}


def table(*names: str) -> bytes:
    """Returns a parquet file of these columns, which may have one name twice."""
    values: dict[str, list] = {"text": [t for t, _ in ROWS], "label": [1, 0] * 20}
    columns = [pyarrow.array(values[name]) for name in names]
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns, names=[*names]), file)
    return file.getvalue()


def train_csv(more: str) -> Files:
    return {"train.csv": CSV + more, "test.csv": CSV}


def test_csv(more: str) -> Files:
    return {"train.csv": CSV, "test.csv": CSV + more}


test_csv.__test__ = False  # type: ignore[attr-defined]

DATA: dict[str, tuple[Files, list[str]]] = {
    "an empty folder": ({}, ["train", "test"]),
    "no test file": ({"train.csv": CSV}, ["test", "['train']"]),
    "no train file": ({"test.csv": CSV}, ["train", "['test']"]),
    "mixed types": ({"train.csv": CSV, "test.jsonl": JSONL}, ["csv", "json"]),
    "only texts, like aclImdb": (
        {f"{part}/{k}/{n}.txt": "film" for part in ("train", "test")
         for k in ("pos", "neg") for n in range(3)},
        ["label", "['text']"],
    ),  # fmt: skip
    "a csv without rows": (both("text,label\n"), []),
    "a test csv without rows": ({"train.csv": CSV, "test.csv": "text,label\n"}, []),
    "a csv without a byte": (both(""), []),
    "a row of four cells": (train_csv("1,2,3,4\n"), ["line 42"]),
    "an open quote": (train_csv('"a film,1\n'), ["row 41"]),
    "latin-1": (both(CSV.encode() + "café,1\n".encode("latin-1")), ["utf-8"]),
    "a broken jsonl": (both(JSONL + '{"text": "', "jsonl"), ["row 40"]),
    "a broken parquet": (both(b"PAR1 and no more", "parquet"), ["parquet"]),
    "no text": (both(CSV.replace("text", "review")), ["text", "['review', 'label']"]),
    "no label": (both(CSV.replace("label", "stars")), ["label", "['text', 'stars']"]),
    "semicolons": (both(CSV.replace(",", ";")), ["text", "['text;label']"]),
    "no text in test": ({"train.csv": CSV, "test.csv": CSV.replace("text", "review")},
                        ["text", "review"]),  # fmt: skip
    "a second text alone": (
        both("text.1,label\n" + "a,1\nb,0\n" * 20), ["['text.1', 'label']"]),
    "two texts": (both("text,text,label\n" + "a,b,1\nc,d,0\n" * 20), ["text"]),
    "two labels": (both("text,label,label\n" + "a,1,1\nb,0,0\n" * 20), ["label"]),
    "two texts in parquet": (both(table("text", "text", "label"), "parquet"), ["text"]),
    "two labels in parquet": (
        both(table("text", "label", "label"), "parquet"), ["label"]),  # fmt: skip
    "two texts in jsonl": (
        both(JSONL.replace('{"text"', '{"text": "a", "text"'), "jsonl"), ["text"]),
    "texts missing": (train_csv(",1\na film,0\n,0\n"), ["train", "2 of 43", "row 41"]),
    "a text missing in test": (test_csv("a,1\n,1\n"), ["test", "1 of 42", "row 42"]),
    "labels missing": (train_csv("a film,\na film,\n"), ["train", "2 of 42", "row 41"]),
    "null text": (both(JSONL + '{"text": null, "label": 1}\n', "jsonl"),
                  ["text", "1 of 41", "row 41"]),  # fmt: skip
    "a label that only test knows": (test_csv("a film,7\n"), ["test", "7"]),
    "labels of another type in test": (test_csv("a film,seven\n"), ["seven"]),
    "labels that are broken numbers": (both(CSV + "a film,0.5\n"), ["label", "double"]),
    "a list among the labels": (
        both(JSONL + '{"text": "a", "label": [1]}\n', "jsonl"), ["label"]),
    "labels that are lists": (
        both('{"text": "a", "label": [1]}\n{"text": "", "label": [0]}\n' * 20, "jsonl"),
        ["label", "list"],
    ),
    "texts that are lists": (
        both('{"text": ["a"], "label": 1}\n{"text": [], "label": 0}\n' * 20, "jsonl"),
        ["text", "list"],
    ),
    "labels that are yes or no": (
        both(JSONL.replace(": 0", ": false").replace(": 1", ": true"), "jsonl"),
        ["label", "bool"],
    ),
    "texts that are numbers": (both("text,label\n" + "1,0\n2,1\n" * 20), ["int64"]),
    "one class": (both(CSV.replace(",0\n", ",1\n")), ["classes", "[1]"]),
    "two reviews": (both("text,label\na,0\nb,1\n"), ["too few"]),
    "ten reviews": (both("text,label\n" + "a,0\nb,1\n" * 5), ["too few"]),
    "a class with one review": (both(CSV + "a film,2\n"), ["too few"]),
}  # fmt: skip


@pytest.mark.parametrize("case", DATA)
def test_data_are_refused(refused: Refused, tmp_path: pathlib.Path, case: str) -> None:
    files, words = DATA[case]
    dataset = write(tmp_path / "data", files)
    line = refused(*words, dataset=dataset, percent=100)
    assert "--dataset" in line or "too few" in words


def test_a_file_for_a_folder_is_refused(
    refused: Refused, tmp_path: pathlib.Path
) -> None:
    write(tmp_path, {"one.csv": CSV})
    refused("--dataset=one.csv", "folder", dataset="one.csv")


def test_too_small_a_share_is_refused(refused: Refused, tmp_path: pathlib.Path) -> None:
    dataset = write(tmp_path / "data", both(CSV))
    refused("too few", "40", dataset=dataset, percent=1)


def test_labels_of_minus_one_are_refused(
    refused: Refused, tmp_path: pathlib.Path
) -> None:
    texts, labels = [text for text, _ in ROWS], [*[0, 1] * 19, -1, -1]
    columns = {"text": texts, "label": labels}
    names = ["neg", "pos"]
    sound = {"text": texts, "label": [0, 1] * 20}
    dataset = write_reviews(tmp_path / "a", "parquet", columns, sound, names)
    refused("--dataset", "train", "-1", dataset=dataset, percent=100)
    dataset = write_reviews(tmp_path / "b", "parquet", sound, columns, names)
    refused("--dataset", "test", "-1", dataset=dataset, percent=100)


# What is odd, and sound all the same.

ODD = [
    "",
    "   \t ",
    "a fine\0film",
    "a fine 🎬 film ❤️",
    "[PAD] [SEP] [CLS] [MASK] [UNK]",
    "ﷺ\u200b\u202e",
]
LONG = {"train": "x" * 10**6, "test": "a fine film " * 10**5}


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_odd_reviews_are_kept(run: Run, tmp_path: pathlib.Path, kind: str) -> None:
    odd = [text for text in ODD if kind != "csv" or text]  # there "" is a missing text
    columns: dict[str, dict[str, list]] = {}
    for part, long in LONG.items():
        texts = [text for text, _ in ROWS] + odd
        texts += [long] if kind == "parquet" else ["long"]  # once, as it takes seconds
        labels = [number % 2 for number in range(len(texts))]
        columns[part] = {"text": texts, "label": labels}
    dataset = write_reviews(tmp_path / "data", kind, **columns)
    folder = run(dataset=dataset, percent=100, epochs=1)
    results = json.loads((folder / "results.json").read_text())
    kept = {part: sum(n.values()) for part, n in results["samples"].items()}
    assert kept["test"] == kept["train"] + kept["val"] == len(ROWS) + len(odd) + 1
    assert 0 <= results["metrics"]["test_acc"] <= 1


def test_a_byte_order_mark_is_no_part_of_a_name(
    run: Run, tmp_path: pathlib.Path
) -> None:
    dataset = write(tmp_path / "data", both("\ufeff" + CSV))
    assert (run(dataset=dataset, percent=100) / "results.json").exists()


def predictions(
    run: Run, capsys: pytest.CaptureFixture[str], file: pathlib.Path
) -> list[str]:
    capsys.readouterr()
    run(predict=str(file))
    return capsys.readouterr().out.splitlines()[1:]


def test_special_tokens_in_a_review_are_plain_text(
    run: Run,
    trained: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(trained.parent, tmp_path / "logs" / "imdb")
    file = tmp_path / "reviews.txt"
    lines = [f"a {a}sep{b} fine {a}pad{b} film {a}cls{b} {a}mask{b}" for a, b in
             ("[]", "()")]  # fmt: skip
    lines += [lines[0].upper(), "a fine film"]
    file.write_text("\n".join(lines))
    brackets, parentheses, capitals, plain = predictions(run, capsys, file)
    assert brackets == parentheses == capitals != plain


# Resuming.


@pytest.fixture
def interrupted(trained: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """The folder of a run that looks as if it had been killed before its results."""
    folder = shutil.copytree(trained.parent, tmp_path / "logs" / "imdb") / "version_0"
    (folder / "results.json").unlink()
    return folder


def test_there_is_nothing_to_resume(refused: Refused, tmp_path: pathlib.Path) -> None:
    (tmp_path / "logs").mkdir()
    refused("--resume", "nothing", resume=True)


def test_a_finished_run_is_not_resumed(
    refused: Refused, trained: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(trained.parent, tmp_path / "logs" / "imdb")
    refused("--resume", "finished", resume=True)


def test_a_run_killed_before_its_first_checkpoint_is_not_resumed(
    refused: Refused, interrupted: pathlib.Path
) -> None:
    (interrupted / "checkpoints" / "last.ckpt").unlink()
    refused("--resume", "last.ckpt", resume=True)


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def changed(whole: bytes, **values: Any) -> bytes:
    checkpoint = torch.load(io.BytesIO(whole), weights_only=True)
    return saved(checkpoint | values)


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "half": lambda whole: whole[: len(whole) // 2],
    "all but a byte": lambda whole: whole[:-1],
    "text": lambda whole: b"not found\n",
    "a tensor": lambda whole: saved(torch.ones(3)),
    "a list": lambda whole: saved([1, 2]),
    "weights alone": lambda whole: saved({"bert.weight": torch.ones(3)}),
    "no settings": lambda whole: changed(whole, hyper_parameters=None),
    "without the state of an optimiser": lambda whole: saved(
        {
            name: torch.load(io.BytesIO(whole), weights_only=True)[name]
            for name in ("hyper_parameters", "global_step", "state_dict")
        }
    ),
    "of another program": lambda whole: saved(
        {"state_dict": {}, "hyper_parameters": {"lr": 0.1}, "global_step": 3}
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_or_foreign_checkpoint_is_refused(
    refused: Refused, interrupted: pathlib.Path, case: str
) -> None:
    last = interrupted / "checkpoints" / "last.ckpt"
    last.write_bytes(BROKEN[case](last.read_bytes()))
    refused("--resume", resume=True)


OTHER = {
    "percent": 60, "seq_length": 20, "truncation": "tail", "epochs": 5,
    "batch_size": 9, "optimizer": "sgd", "lr": 0.003, "momentum": 0.7,
    "weight_decay": 0.06, "warmup": 0.35, "seed": 4, "precision": "bf16-mixed",
    "model": "bert", "dataset": "data",
}  # fmt: skip


@pytest.mark.parametrize("flag", OTHER)
def test_another_run_is_not_resumed(
    refused: Refused,
    interrupted: pathlib.Path,
    tmp_path: pathlib.Path,
    bert: str,
    flag: str,
) -> None:
    shutil.copytree(bert, tmp_path / "bert")
    write(tmp_path / "data", both(CSV))
    last = interrupted / "checkpoints" / "last.ckpt"
    settings = torch.load(last, weights_only=True)["hyper_parameters"]
    both_values = str(settings[flag]), str(OTHER[flag])
    assert settings[flag] != OTHER[flag]
    refused(f"--{flag}", *both_values, resume=True, **{flag: OTHER[flag]})


# While running.


def test_a_loss_that_is_not_a_number_names_the_step(
    run: Run, bert: str, tmp_path: pathlib.Path, stderr: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(bert, tmp_path / "model")
    weights = safetensors.torch.load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("embeddings.LayerNorm.bias"))
    weights[name][:] = float("nan")
    safetensors.torch.save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match=r"step 1 .*nan.*--lr"):
        run(model=str(model))


def spoil_loss(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[int], float]) -> None:
    calls, cross_entropy = [], main.F.cross_entropy

    def spoilt(*arguments: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return cross_entropy(*arguments, **options) * spoil(len(calls))

    monkeypatch.setattr(main.F, "cross_entropy", spoilt)


def test_an_infinite_loss_names_the_step(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_loss(monkeypatch, lambda call: float("inf") if call == 3 else 1.0)
    with pytest.raises(SystemExit, match=r"step 3 .*inf.*--lr"):
        run()


def test_a_full_gpu_names_the_flags_that_help(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(call: int) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    spoil_loss(monkeypatch, full)
    with pytest.raises(SystemExit, match=r"memory.*--batch_size.*--seq_length"):
        run()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="it is Linux's")
def test_a_full_disk_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save = torch.save

    def to_full_disk(value: Any, *_: Any, **options: Any) -> None:
        with open("/dev/full", "wb") as full:
            save(value, full, **options)

    monkeypatch.setattr(torch, "save", to_full_disk)
    with pytest.raises(SystemExit, match=r"space.*--resume"):
        run()


# Predicting.

PREDICT: dict[str, tuple[Files, str, list[str]]] = {
    "no such file": ({}, "new.csv", []),
    "a folder": ({"new.csv/x": "a film"}, "new.csv", []),
    "no text": ({"new.csv": "review\na film\n"}, "new.csv", ["text", "review"]),
    "a broken csv": ({"new.csv": "text\na,b\nc,d,e\n"}, "new.csv", ["line 3"]),
    "a broken jsonl": ({"new.jsonl": "{"}, "new.jsonl", []),
    "missing text": ({"new.csv": "text,n\na film,1\n,2\n"}, "new.csv", ["1 of 2"]),
    "numbers": ({"new.csv": "text\n1\n2\n"}, "new.csv", ["int64"]),
    "nothing": ({"new.txt": ""}, "new.txt", []),
    "nothing in a csv": ({"new.csv": ""}, "new.csv", []),
    "no rows": ({"new.csv": "text\n"}, "new.csv", []),
    "bytes": ({"new.txt": b"\xff\xfe\x00"}, "new.txt", ["utf-8"]),
    "no name": ({}, "", []),
}


@pytest.mark.parametrize("case", PREDICT)
def test_reviews_to_label_are_refused(
    refused: Refused, trained: pathlib.Path, tmp_path: pathlib.Path, case: str
) -> None:
    files, name, words = PREDICT[case]
    write(tmp_path, files)
    shutil.copytree(trained.parent, tmp_path / "logs" / "imdb")
    refused("--predict", *words, predict=name)


def test_a_length_beyond_the_model_that_labels_is_refused(
    refused: Refused, trained: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    write(tmp_path, {"new.csv": CSV})
    run = shutil.copytree(trained, tmp_path / "logs" / "imdb" / "version_0")
    edit("config.json", seq_length=65)(run / "model")
    refused("--seq_length=65", "64", predict="new.csv")


def test_without_a_model_nothing_is_labelled(
    refused: Refused, tmp_path: pathlib.Path
) -> None:
    write(tmp_path, {"new.csv": CSV})
    refused("--predict", "--model", predict="new.csv")


# Security.


class Evil:
    """Makes a file `executed` in the working folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pathlib.Path.touch, (pathlib.Path("executed"),)


CODE = "import pathlib\npathlib.Path('executed').touch()\n"


@pytest.fixture(autouse=True)
def nothing_is_executed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "executed").exists()


def test_the_malice_of_these_tests_works(tmp_path: pathlib.Path) -> None:
    for malice in (lambda: pickle.loads(pickle.dumps(Evil())), lambda: exec(CODE)):
        malice()
        (tmp_path / "executed").unlink()


INDEX = '{"weight_map": {"a": "b.bin"}, "metadata": {}}'
EVIL_WEIGHTS: dict[str, Files] = {
    "pytorch_model.bin": {"pytorch_model.bin": pickle.dumps(Evil())},
    "a zip of it": {"pytorch_model.bin": saved({"bert.pooler.dense.bias": Evil()})},
    "in parts": {
        "pytorch_model.bin.index.json": INDEX,
        "b.bin": pickle.dumps(Evil()),
    },
    "named as safetensors": {"model.safetensors": pickle.dumps(Evil())},
    "named as a part of safetensors": {
        "model.safetensors.index.json": INDEX,
        "b.bin": pickle.dumps(Evil()),
    },
}


@pytest.mark.parametrize("case", EVIL_WEIGHTS)
def test_weights_in_a_pickle_are_refused_and_run_no_code(
    refused: Refused, tmp_path: pathlib.Path, bert: str, case: str
) -> None:
    model = shutil.copytree(bert, tmp_path / "model")
    drop("model.safetensors")(model)
    refused("--model", "safetensors", model=write(model, EVIL_WEIGHTS[case]))


EVIL_CHECKPOINT: dict[str, Callable[[bytes], bytes]] = {
    "a pickle": lambda whole: pickle.dumps(Evil()),
    "a zip": lambda whole: saved(Evil()),
    "in the settings": lambda whole: changed(whole, hyper_parameters={"lr": Evil()}),
    "besides": lambda whole: changed(whole, callbacks=Evil()),
}


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
@pytest.mark.parametrize("case", EVIL_CHECKPOINT)
def test_a_pickle_in_a_checkpoint_is_refused_and_runs_no_code(
    refused: Refused, run: Run, interrupted: pathlib.Path, case: str, name: str
) -> None:
    checkpoint = interrupted / "checkpoints" / name
    checkpoint.write_bytes(EVIL_CHECKPOINT[case](checkpoint.read_bytes()))
    if name == "last.ckpt":
        refused("--resume", resume=True)
    else:  # it is read once training is done
        with pytest.raises((SystemExit, pickle.UnpicklingError)):
            run(resume=True)


def evil_code(folder: pathlib.Path) -> None:
    write(folder, {"evil.py": CODE, "modeling_bert.py": CODE, "__init__.py": CODE})
    tasks = ("Config", "Model", "ModelForSequenceClassification", "Tokenizer")
    classes = {f"Auto{task}": "evil.Evil" for task in tasks}
    pipeline = {"text-classification": {"impl": "evil.Evil", "type": "text"}}
    edit("config.json", auto_map=classes, custom_pipelines=pipeline)(folder)
    names = ["evil.Evil", "evil.Evil"]
    wish = {"auto_map": {"AutoTokenizer": names}, "tokenizer_class": "Evil"}
    edit("tokenizer_config.json", **wish)(folder)


def evil_kernel(folder: pathlib.Path) -> None:
    edit("config.json", _attn_implementation="evil/kernel")(folder)


@pytest.mark.parametrize("wish", [evil_code, evil_kernel])
def test_code_that_a_model_names_is_never_run(
    run: Run, tmp_path: pathlib.Path, bert: str, wish: Callable[[pathlib.Path], None]
) -> None:
    model = shutil.copytree(bert, tmp_path / "model")
    wish(model)
    before = snapshot(model)
    assert (run(model=str(model), epochs=1) / "results.json").exists()
    assert snapshot(model) == before


def test_a_loading_script_is_never_run(
    refused: Refused, run: Run, tmp_path: pathlib.Path
) -> None:
    scripts: Files = {"imdb.py": CODE, "train.py": CODE, "__init__.py": CODE}
    refused("--dataset", "imdb.py", dataset=write(tmp_path / "imdb", scripts))
    refused("--dataset", dataset=write(tmp_path / "alone", scripts))
    dataset = write(tmp_path / "data", both(CSV) | scripts)
    assert (run(dataset=dataset, percent=100, epochs=1) / "results.json").exists()


def test_names_in_the_data_lead_nowhere(run: Run, tmp_path: pathlib.Path) -> None:
    """Labels and names of a configuration become tags and folders of caches."""
    names = ["../../../evil", "/evil\n# evil\n---\nevil: 1"]
    texts = [text for text, _ in ROWS]
    columns = {"text": texts, "label": [names[label] for _, label in ROWS]}
    dataset = write_reviews(tmp_path / "data", "jsonl", columns, columns)
    before = snapshot(tmp_path)
    assert (run(dataset=dataset, percent=100) / "results.json").exists()
    after = snapshot(tmp_path)
    assert {k: v for k, v in after.items() if k.split("/")[0] != "logs"} == before


def test_the_name_of_a_configuration_leads_nowhere(
    refused: Refused, tmp_path: pathlib.Path
) -> None:
    card = """---
configs:
- config_name: ../../../evil
  data_files: [{split: train, path: train.csv}, {split: test, path: test.csv}]
---
"""
    dataset = write(tmp_path / "data", both(CSV) | {"README.md": card})
    refused("--dataset", dataset=dataset, percent=100)


@pytest.mark.parametrize("place", ["imdb", "imdb/version_0", "debug"])
def test_a_link_is_moved_and_not_followed(
    run: Run, tmp_path: pathlib.Path, place: str
) -> None:
    earlier_run(tmp_path / "target")
    target = tmp_path / "target" / "imdb" / place.partition("/")[2]
    link = tmp_path / "logs" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    before = snapshot(tmp_path / "target")
    folder = run(debug=place == "debug", epochs=1)
    assert (folder / "results.json").exists()
    assert not link.is_symlink()
    assert snapshot(tmp_path / "target") == before
    kept = [p for p in (tmp_path / "logs.old").rglob("*") if p.is_symlink()]
    assert [p.readlink() for p in kept] == [target] * (place != "debug")

"""Bad input ends `main.py` with one line and status 1, and nothing on disk changes.

Each table spoils sound files, and gives words that the line must hold. Beside them
stand what is odd but sound, two runs at once, failures on the way, and that nothing
which is loaded runs code or writes where it should not.
"""

import errno
import io
import itertools
import json
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

import datasets
import pytest
import safetensors.torch
import torch
import transformers
from absl import flags
from absl.testing import flagsaver
from conftest import CSV, ROWS, Case, command, each, snapshot, spoil, write_reviews
from demo import MAIN

import main

LAST = "logs/imdb/version_0/checkpoints/last.ckpt"
BEST = "logs/imdb/version_0/checkpoints/best.ckpt"
RESULTS = "logs/imdb/version_0/results.json"
MALICE = "import pathlib\npathlib.Path('executed').touch()\n"


class Evil:
    """Makes a file `executed` in the working folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pathlib.Path.touch, (pathlib.Path("executed"),)


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


@pytest.fixture(autouse=True)
def nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "executed").exists()


def results(folder: pathlib.Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


# Flags, processes and the folder of the logs.

ILLEGAL = {
    "--percent=0.5": "--percent",
    "--epochs=inf": "--epochs",
    "--lr=nan": "lr=nan.* below 1",
    "--momentum=nan": "momentum=nan.* below 1",
    "--weight_decay=nan": "weight_decay=nan.* below 1",
    "--warmup=nan": "warmup=nan.* below 1",
    "--warmup=1": "warmup=1.* below 1",
    "--momentum=-0.1": "momentum=-0.1.* at least 0",
    "--lr=0": "lr above 0",
    "--seed=-1": "--seed",
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
    "float16 without a GPU": Case(
        ["--precision=16-mixed", "NVIDIA", "32-true"], {}, {"precision": "16-mixed"}),
    "logs in a file": Case(["cannot write", "new.csv"], {}, {"logdir": "new.csv"}),
    "logs below a file": Case(
        ["--logdir=new.csv/a"], {}, {"logdir": "new.csv/a"}),
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
def test_processes_other_than_the_flags_say_are_refused(refused, monkeypatch, case):
    environment, words = case
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
        if name != "WORLD_SIZE":  # Lightning reads it when it is imported
            monkeypatch.setattr(main.rank_zero_only, "rank", int(value))
    refused(Case(words))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_cache_that_cannot_be_written_is_named(refused, monkeypatch, kind):
    columns = {"text": [text for text, _ in ROWS], "label": [n for _, n in ROWS]}
    dataset = write_reviews(pathlib.Path("own"), kind, columns, None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "new.csv/cache")
    refused(Case(["cannot write to the cache", "HF_HOME"]), dataset=dataset)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_cache_on_a_full_disk_is_named(refused, monkeypatch, kind):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    columns = {"text": [text for text, _ in ROWS], "label": [n for _, n in ROWS]}
    dataset = write_reviews(pathlib.Path("own"), kind, columns, None)
    for writer in ("arrow_writer.ArrowWriter.write_table", "builder.ArrowWriter.write"):
        monkeypatch.setattr(f"datasets.{writer}", full)
    full_disk = "No space left" if kind == "csv" else "its disk is full"
    refused(Case(["cannot write to", "HF_HOME", full_disk]), dataset=dataset)


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
    assert [path.name for path in pathlib.Path(logdir).glob("[!.]*")] == [
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
    left = {str(path) for path in pathlib.Path().glob("logs*/[!.]*")}
    assert left == {"logs/debug", "logs/imdb"}
    left = {path.name for path in pathlib.Path("logs/debug").rglob("*")}
    assert "mine" in left and "old" not in left


@pytest.mark.parametrize("link", ["imdb", "imdb/version_0", "debug/version_0"])
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
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {signum: signal.getsignal(signum) for signum in signals}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with main.on_signals(main.stop):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is main.stop
        assert signal.getsignal(signal.SIGTERM) is before[signal.SIGTERM]
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@pytest.mark.parametrize("debug", [False, True])
def test_verbosity_alone_lets_the_traceback_through(debug):
    for verbosity, error in ((0, SystemExit), (1, OSError)):
        with (
            flagsaver.flagsaver(debug=debug, verbosity=verbosity),
            pytest.raises(error, match="cause"),
            main.refusing("why", OSError),
        ):
            raise OSError("cause")


def test_a_long_cause_keeps_its_beginning_and_its_end():
    """What failed stands first in libraries' messages, why stands last."""
    with (
        pytest.raises(SystemExit) as refusal,
        main.refusing("why", OSError),
    ):
        raise OSError("moving" + " x" * 1000 + " No space left")
    line = refusal.value.code
    assert line.startswith("main.py: why: moving") and line.endswith("No space left")
    assert len(line) < 330


# One run at a time.


@pytest.mark.parametrize("values", [{}, {"resume": True}, {"debug": True}])
def test_a_second_run_in_a_folder_is_refused(refused, interrupted, values):
    name = "debug" if "debug" in values else "imdb"
    with main.only_run(pathlib.Path("logs", name)):
        words = ["--logdir=", f"process {os.getpid()} on ", f"logs/{name}"]
        refused(Case(words), **values)
    assert not pathlib.Path("logs", f".{name}.lock").exists()


@pytest.mark.parametrize("ended", [True, False])
def test_a_run_that_went_on_meanwhile_is_not_resumed(
    run, interrupted, monkeypatch, ended
):
    """As where the run still lived when its resumption was started."""
    load = main.load_samples

    def going_on(settings: dict) -> datasets.DatasetDict:
        checkpoint = torch.load(LAST, weights_only=True)
        torch.save(checkpoint | {"global_step": 99}, LAST)
        if ended:
            spoil({RESULTS: "{}"})
        return load(settings)

    monkeypatch.setattr(main, "load_samples", going_on)
    before = snapshot()
    words = "the run is finished" if ended else "the run went on meanwhile"
    with pytest.raises(SystemExit, match=words):
        run(resume=True)
    assert snapshot().keys() - before.keys() <= {RESULTS}  # no log is cut


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
    assert [path.name for path in pathlib.Path("logs").glob("[!.]*")] == ["imdb"]


def test_a_disk_without_locks_still_takes_one_run_at_a_time(monkeypatch):
    """As some shared disks are."""

    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    path = pathlib.Path("logs", "imdb")
    monkeypatch.setattr("fcntl.flock", fail)
    number = errno.ENOSYS
    for _ in range(2):
        with (
            pytest.warns(UserWarning, match="flock"),
            main.only_run(path),
            pytest.raises(SystemExit, match=f"process {os.getpid()} on "),
            main.only_run(path),
        ):
            pass
    number = errno.ENOLCK
    with pytest.raises(SystemExit, match="cannot write there"), main.only_run(path):
        pass


def test_a_notebook_has_one_device(refused, monkeypatch):
    """There Lightning would fork, which loses what `finish` needs."""
    connector = "pytorch_lightning.trainer.connectors.accelerator_connector"
    monkeypatch.setattr(f"{connector}._IS_INTERACTIVE", True)
    refused(Case(["--devices", "interactive"], {}, {"devices": 2}))


def test_in_a_slurm_job_plain_python_runs(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    main.check_processes(1, 1)
    with pytest.raises(SystemExit, match="--num_nodes=2"):
        main.check_processes(1, 2)


# The model.


def drop(part: str) -> Callable[[bytes], bytes]:
    return weigh(lambda weights: {k: v for k, v in weights.items() if part not in k})


def as_words(size: int) -> Callable[[bytes], str]:
    """Returns what makes a tokenizer know this many numbers."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = {piece: n for n, piece in enumerate([*special, *map(str, range(size))])}
    tokenizer = transformers.BertTokenizer(pieces)
    return lambda _: tokenizer.backend_tokenizer.to_str()


C, W, T = "model/config.json", "model/model.safetensors", "model/tokenizer*"
OF_A_PART = '{"weight_map": {"a": "b.bin"}, "metadata": {}}'
EVIL = pickle.dumps(Evil())
MODELS = {
    "no config": Case(["config.json"], {C: None}),
    "a broken config": Case(["cannot be loaded", "JSON"], {C: "{"}),
    "distilbert": Case(
        ["found a distilbert", "expected a bert"], {C: edit(model_type="distilbert")}),
    "no weights": Case(["model.safetensors"], {W: None}),
    "all but the last of the weights": Case(
        ["cannot be loaded"], {W: lambda whole: whole[:-9]}),
    "text as weights": Case(["cannot be loaded"], {W: "not found" * 99}),
    "weights of fewer layers": Case(["16 weights", "layer.1."], {W: drop("layer.1.")}),
    "config of other layers": Case(["layer.2."], {C: edit(num_hidden_layers=3)}),
    "no tokenizer": Case(
        ["tokenizer"], {T: None, "model/vocab*": None, "model/special*": None}),
    "a broken tokenizer": Case(
        ["cannot be loaded"], {"model/tokenizer.json": '{"version": '}),
    "a pickle of weights": Case(
        ["a .bin", "convert it"], {W: None, "model/pytorch_model.bin": EVIL}),
    "another padding": Case(
        ["[PAD] is 0", "in its config 3"], {C: edit(pad_token_id=3)}),
    "no padding": Case(
        ["[PAD] is 0", "in its config None"], {C: edit(pad_token_id=None)}),
    "another padding of the tokenizer": Case(
        ["[PAD] is 3", "in its config 0"],
        {"model/tokenizer_config.json": edit(pad_token="[SEP]")}),
    "a tokenizer larger than the embedding": Case(
        ["95 word-pieces", "embeddings"], {"model/tokenizer.json": as_words(90)}),
    "a pickle named safetensors": Case(["cannot be loaded"], {W: EVIL}),
    "a pickle as a part of safetensors": Case(["a .bin"], {
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
    refused(Case([f"--{flag}={folder}", "will be moved"]), **values)


def test_a_classifier_of_other_classes_starts_anew_and_says_so(trained, capsys):
    model = str(trained / "model")
    earlier = safetensors.torch.load_file(trained / "model" / "model.safetensors")

    def load(names):
        settings = {"model": model, "label_names": names, "seq_length": 3}
        return main.load_bert(settings, trained=False)

    same = load(["neg", "pos"])
    assert same.classifier.weight.equal(earlier["classifier.weight"])
    assert not capsys.readouterr().out
    for names in (["pos", "neg"], ["bad", "good"], ["neg", "pos", "so-so"]):
        other = load(names)
        assert capsys.readouterr().out.count("\n") == 1
        for row in other.classifier.weight:
            assert not row.eq(earlier["classifier.weight"]).any()
        assert not other.classifier.bias.any() or len(names) == 3
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
    modules = dict.fromkeys(["evil.py", "modeling_bert.py", "__init__.py"], MALICE)
    files = {"config.json": config, "tokenizer_config.json": tokenizer}
    spoil(modules | files, place / "model")
    before = snapshot(place / "model")
    assert results(run(model="model", epochs=1))
    assert snapshot(place / "model") == before


# Names of models and of data.


@pytest.mark.parametrize("name", ["", "nowhere", "/nowhere/bert", "a/b/c", "../a"])
@pytest.mark.parametrize("flag", ["model", "dataset"])
def test_no_such_folder_is_refused(refused, flag, name):
    refused(Case([f"--{flag}={name}: no such file or folder"], flags={flag: name}))


def test_a_name_of_the_hub_without_its_owner_is_completed(refused):
    for flag, name in (("model", "bert-base-uncased"), ("dataset", "imdb")):
        full = {"model": "google-bert/bert-base-uncased", "dataset": "stanfordnlp/imdb"}
        refused(Case([f"owner/name: {full[flag]}?"], flags={flag: name}))


def test_local_folders_need_no_network(run, place, monkeypatch):
    look_up = mock.Mock(side_effect=OSError)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert results(run(model="model", dataset="data", percent=100, epochs=1))
    look_up.assert_not_called()


# What an honest result says.


def test_a_run_tells_leaks_and_baseline(run, tmp_path, capsys):
    train = {
        "text": [text for text, _ in ROWS],
        "label": ["neg", "pos"] * 20,
    }
    known = [ROWS[1][0], ROWS[4][0], ROWS[4][0]]
    texts = [*known, ROWS[5][0].upper(), *map(str, range(9, 18))]
    test = {"text": texts, "label": ["pos"] * 3 + ["neg"] * 10}
    dataset = write_reviews(tmp_path / "data", "jsonl", train, test)
    found = results(run(dataset=dataset, percent=100))
    assert found["samples"]["test"] == {"neg": 10, "pos": 3}
    assert found["leaks"] == 3
    assert found["baseline"] == {
        "label": "neg",
        "test_acc": pytest.approx(10 / 13),
    }
    data, _, end = capsys.readouterr().out.partition("Training")
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
    assert "class 20" not in out and "true classes" not in out


def test_class_names_lead_nowhere_and_fit_an_ascii_terminal(run, place, monkeypatch):
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
    assert rb"always" in said and rb"\U0001f3ac" in said and "🎬".encode() in predicted
    new = {name for name in snapshot().keys() - before.keys() if name[:4] != "logs"}
    assert new == set()


# Resuming. `run` gives the flags of the run that is here interrupted.

OLDER = store(hyper_parameters={"label_names": ["neg", "pos"], "strategy": "auto"})
RESUME = {
    "nothing": Case(["nothing", "last.ckpt"], {"logs/imdb/version_0/**/*.*": None}),
    "no checkpoint": Case(["nothing", "last.ckpt"], {LAST: None}),
    "empty": Case(["is broken"], {LAST: ""}),
    "all but a byte": Case(["is broken"], {LAST: lambda whole: whole[:-1]}),
    "text": Case(["is broken"], {LAST: "not found\n"}),
    "a pickle": Case(["is broken"], {LAST: pickle.dumps(Evil())}),
    "a pickle of callbacks": Case(["is broken"], {LAST: store(callbacks=Evil())}),
    "another rate": Case(["--lr=0.004", "0.003"], flags={"lr": 0.003}),
    "another precision": Case(
        ["--precision=32-true", "bf16-mixed"], flags={"precision": "bf16-mixed"}),
    "an older main.py's": Case(["of other flags", "Lightning 2"], {LAST: OLDER}),
}  # fmt: skip


@each(RESUME)
def test_another_or_broken_run_is_not_resumed(refused, interrupted, case):
    refused(Case(["--resume: ", *case.words], case.files, case.flags), resume=True)


def test_a_run_is_not_resumed_with_another_tokenizer(interrupted, run, monkeypatch):
    """As a model folder, or a name on the Hub, may hold another one tomorrow."""
    load = main.load_tokenizer

    def changed(settings: dict) -> Any:
        tokenizer = load(settings)
        tokenizer.backend_tokenizer.normalizer = None
        return tokenizer

    monkeypatch.setattr(main, "load_tokenizer", changed)
    with pytest.raises(SystemExit, match="other reviews, tokenizer or model than"):
        run(resume=True)


def test_a_finished_run_is_not_resumed(refused):
    refused(Case(["--resume: ", "finished"]), resume=True)


def test_a_pickle_in_the_best_checkpoint_runs_no_code(run, interrupted):
    """It is read once training, which is done, has gone on."""
    spoil({BEST: store(callbacks=Evil())})
    with pytest.raises(
        (SystemExit, pickle.UnpicklingError), match="Weights only load failed"
    ):
        run(resume=True)


def test_checkpoints_are_read_as_weights_alone(run, interrupted, monkeypatch):
    load = mock.Mock(side_effect=torch.load)
    monkeypatch.setattr(torch, "load", load)
    run(resume=True)
    names = [call.args[0] for call in load.call_args_list]
    assert {"last.ckpt", "best.ckpt"} <= {os.path.basename(str(n)) for n in names}
    assert load.call_count == 5  # to check twice, to fit, to test, and to finish
    assert all(call.kwargs["weights_only"] for call in load.call_args_list)


# While running.


def spoil_loss(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[int], float]) -> None:
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
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

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
    with pytest.raises(SystemExit, match=f"cannot save .*{name}.ckpt.* disk full"):
        run()
    assert not [*pathlib.Path("logs").rglob("*.partial")]
    assert [path.name for path in pathlib.Path("logs").glob("[!.]*")] == [
        "imdb"
    ]  # no lock


# Predicting.

CONFIG = "logs/imdb/version_0/model/config.json"
MODEL = "logs/imdb/version_0/model/model.safetensors"
PREDICT = {
    "no such file": Case(["new.tsv", "No such file"], flags={"predict": "new.tsv"}),
    "a folder": Case(["data"], flags={"predict": "data"}),
    "no name": Case(["--predict=: "], flags={"predict": ""}),
    "an ending that is not read": Case(
        ["expected one of .csv"], {"new.xlsx": "PK"}, {"predict": "new.xlsx"}),
    "a packed file": Case(
        ["expected one of .csv"], {"a.csv.gz": b"\x1f\x8b"}, {"predict": "a.csv.gz"}),
    "a log": Case([".parquet, .txt"], {"new.log": "a"}, {"predict": "new.log"}),
    "no text": Case(["text", "['review']", "--text_column"],
                    {"new.csv": "review\na film\n"}),
    "no text in a jsonl": Case(["text", "['a']"], {"new.jsonl": '{"a": 1}'},
                               {"predict": "new.jsonl"}),
    "a broken csv": Case(["line 3"], {"new.csv": "text\na\nc,d,e\n"}),
    "an open quote": Case(["line 3", "end of data"], {"new.csv": 'text\na\n"b\n'}),
    "no byte": Case(["new.csv", "no reviews"], {"new.csv": ""}),
    "no rows": Case(["no reviews"], {"new.csv": "text\n"}),
    "no line": Case(["new.txt", "no reviews"], {"new.txt": ""}, {"predict": "new.txt"}),
    "commas without quotes": Case(
        ["line 2", "in marks"], {"new.csv": "text\nfine, and touching\n"}),
    "bytes": Case(["UTF-8"], {"new.txt": b"\xff\xfe\x00"}, {"predict": "new.txt"}),
    "latin-1": Case(["UTF-8"], {"new.csv": "text\né\n".encode("latin-1")}),
    "a broken jsonl": Case(["line 1"], {"new.jsonl": "{"}, {"predict": "new.jsonl"}),
    "no parquet": Case(["x.parquet"], {"x.parquet": "PAR1"}, {"predict": "x.parquet"}),
    "no model": Case(["no model in a/b", "--model"], {}, {"model": "a/b"}),
    "no classifier": Case(["weights missing", "classifier"], {}, {"model": "model"}),
    "no weights of the classifier": Case(
        ["2 weights", "classifier.bias"], {MODEL: drop("classifier")}),
    "no pooler": Case(["2 weights", "bert.pooler"], {MODEL: drop("pooler")}),
    "a classifier of fewer classes": Case(
        ["weights", "classifier"], {CONFIG: edit(id2label={0: "a", 1: "b", 2: "c"})}),
    "too long for the model": Case(["--seq_length=65"], {}, {"seq_length": 65}),
}  # fmt: skip


@each(PREDICT)
def test_reviews_to_label_are_refused(refused, case):
    model = "logs/imdb/version_0/model"  # conftest gives that of the tests
    refused(case, **{"predict": "new.csv", "model": model} | case.flags)


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
    assert rows[0] == rows[1] == rows[2] != rows[3]  # special tokens are plain text


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        ("--predict=new.csv", -signal.SIGPIPE),
        ("--model=model --dataset=data --percent=100 --seq_length=9 --epochs=1", 0),
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

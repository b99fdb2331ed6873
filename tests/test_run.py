"""What a run leaves: files, numbers, lines; and what it leaves alone."""

import csv
import errno
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import datasets
import demo
import huggingface_hub
import pytest
import torch
import transformers
import yaml
from absl.testing import flagsaver
from conftest import SETTINGS, call, load_samples, piece_ids, write_reviews
from tensorboard.backend.event_processing import (
    event_accumulator,
    plugin_event_accumulator,
)
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.summary.writer import record_writer
from tensorboard.util import tensor_util

import main

Run = Callable[..., pathlib.Path]
Module = main.IMDBSentimentClassifier
METRICS = ("loss", "acc", "f1", "ece")
RUN_FILES = {
    "hparams.yaml",
    "results.json",
    "predictions.csv",
    "checkpoints/best.ckpt",
    "model/README.md",
    "model/config.json",
    "model/model.safetensors",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
}


def files(folder: pathlib.Path) -> dict[str, bytes]:
    """Returns what a folder holds, the tail of event files' names left out."""
    return {
        re.sub("tfevents.*", "tfevents", path.relative_to(folder).as_posix()): (
            path.read_bytes()
        )
        for path in folder.rglob("*")
        if path.is_file()
    }


def read_results(folder: pathlib.Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def label(model: pathlib.Path, texts: list[str]) -> list[str]:
    """Labels texts as a user of the exported model would."""
    pipeline = transformers.pipeline(
        "text-classification", model=str(model), truncation=True
    )
    return [answer["label"] for answer in pipeline(texts)]


# Files and numbers


def test_a_run_leaves_exactly_its_files(trained):
    events = {"events.out.tfevents"}
    assert files(trained).keys() == RUN_FILES | events
    assert [*trained.parents[1].glob("[!.]*")] == [trained.parent]  # logs/imdb
    assert [*trained.parents[2].iterdir()] == [trained.parents[1]]  # logs


def test_results_hold_metrics_sizes_flags_and_versions(trained, bert, reviews):
    results, seed = read_results(trained), SETTINGS["seed"]
    parts = (
        "metrics baseline best_epoch tested confusion samples seconds flags versions"
    )
    odd = "leaks val_leaks contradictory empty line_breaks"
    assert results.keys() == {*parts.split(), *odd.split()}
    assert results["tested"] == 47
    names = [f"{part}_{kind}" for part in ("val", "test") for kind in METRICS]
    assert results["metrics"].keys() == {*names, "test_acc_interval"}
    samples = load_samples(reviews, SETTINGS["percent"], seed)
    for part, sample in samples.items():
        neg = sample["label"][:].count(0)
        assert results["samples"][part] == {"neg": neg, "pos": len(sample) - neg}
    flags = {"dataset": reviews, "model": bert} | SETTINGS
    flags |= {
        "text_column": "text",
        "label_column": "label",
        "optimizer": "adamw",
        "devices": 1,
        "num_nodes": 1,
    }
    assert results["flags"] == flags
    noted = yaml.safe_load((trained / "hparams.yaml").read_text())
    assert noted == flags | {"label_names": ["neg", "pos"]}
    assert results["versions"]["torch"] == torch.__version__
    assert results["versions"]["transformers"] == transformers.__version__
    assert 0 < results["seconds"] < 120
    low, high = results["metrics"]["test_acc_interval"]
    interval = main.wilson(results["metrics"]["test_acc"], 47)
    assert [low, high] == pytest.approx(interval)
    assert low < results["metrics"]["test_acc"] < high
    sizes = results["samples"]["test"]
    assert results["baseline"]["test_acc"] == max(sizes.values()) / 47
    assert sizes[results["baseline"]["label"]] == max(sizes.values())
    texts = {*samples["train"]["text"], *samples["val"]["text"]}
    leaks = sum(text in texts for text in samples["test"]["text"])
    assert results["leaks"] == leaks
    assert sum(map(sum, results["confusion"])) == 47


@pytest.mark.parametrize(
    "share, n, low, high",
    [(0.8, 10, 0.4902, 0.9433), (0, 10, 0, 0.2775), (1, 50, 0.92865, 1)],
)
def test_the_interval_is_wilsons(share, n, low, high):
    assert main.wilson(share, n) == pytest.approx([low, high], abs=5e-5)


def test_tensorboard_shows_the_whole_run(trained):
    log = event_accumulator.EventAccumulator(str(trained)).Reload()
    shown = {*log.Tags()["scalars"]}
    losses = {f"{part}_{kind}" for part in ("val", "test") for kind in METRICS}
    assert shown >= {"train_loss", "train_acc", "lr", "speed", *losses}
    assert not [name for name in shown if "hp_metric" in name]
    (event,) = log.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    drawn = []
    for chart in layout.category[0].chart:
        regexes = "|".join(chart.multiline.tag)
        drawn.append([tag for tag in sorted(shown) if re.match(regexes, tag)])
    assert drawn == [["train_loss", "val_loss"], ["train_acc", "val_acc"]]
    steps = [event.step for event in log.Scalars("train_loss")]
    assert (
        steps == [event.step for event in log.Scalars("lr")] == [9, 19, 23, 29, 39, 47]
    )
    rates = [event.value for event in log.Scalars("lr")]
    assert rates[0] == pytest.approx(SETTINGS["lr"] * 9 / 12)  # it rises for 12 steps
    assert "epoch" not in shown
    assert all(event.value > 0 for event in log.Scalars("speed"))
    results = read_results(trained)
    assert [event.step for event in log.Scalars("val_acc")] == [23, 47]
    assert [event.step for event in log.Scalars("train_loss_epoch")] == [23, 47]
    best = log.Scalars("val_acc")[results["best_epoch"]].value
    assert best == max(event.value for event in log.Scalars("val_acc"))
    assert best == pytest.approx(results["metrics"]["val_acc"])
    for name in ("test_loss", "test_acc"):
        (event,) = log.Scalars(name)
        assert event.value == pytest.approx(results["metrics"][name])


def judge(folder, reviews, bert):
    """Yields word-pieces, probabilities and label of each test review, plainly."""
    tokenizer = transformers.BertTokenizer.from_pretrained(bert)
    model = transformers.BertForSequenceClassification.from_pretrained(folder / "model")
    seq_length, truncation = SETTINGS["seq_length"], SETTINGS["truncation"]
    samples = load_samples(reviews, SETTINGS["percent"], SETTINGS["seed"])
    for review in samples["test"]:
        ids = piece_ids(tokenizer, review["text"], seq_length, truncation)
        with torch.no_grad():
            logits = model.eval()(torch.tensor([ids])).logits[0]
        seen = tokenizer.decode(ids[1:-1])
        yield seen, logits.softmax(-1), review["label"]


def test_tensorboard_draws_what_the_model_says_of_each_review(trained, reviews, bert):
    log = event_accumulator.EventAccumulator(str(trained)).Reload()

    def text(tag):
        (event,) = log.Tensors(f"{tag}/text_summary")
        return event.tensor_proto.string_val[0].decode()

    names = ["neg", "pos"]
    judged = [*judge(trained, reviews, bert)]
    confusion = [[0, 0], [0, 0]]
    errors = []
    for seen, probabilities, label in judged:
        sure, predicted = probabilities.max(-1)
        confusion[label][predicted] += 1
        verdict = f"{names[label]} taken for {names[predicted]}"
        if predicted != label:
            line = f"1. **{verdict} at {sure:.1%}:** {seen}"
            errors.append((sure.item(), line))
    head, *rows = text("test_confusion").splitlines()
    assert head.split() == names and head.startswith("    ")
    told = [row.split() for row in rows]
    assert told == [["neg", *map(str, confusion[0])], ["pos", *map(str, confusion[1])]]
    assert confusion[0][1] != confusion[1][0]  # else it may be turned unnoticed
    worst = sorted(errors, reverse=True)[:20]
    assert text("test_worst").splitlines() == [line for _, line in worst]
    assert len({line for _, line in worst}) > 3

    for number, name in enumerate(names):
        own = [label for _, _, label in judged if label == number]
        (curve,) = log.Tensors(f"test_pr/{name}")
        right, _, _, missed, _, _ = tensor_util.make_ndarray(curve.tensor_proto)
        half = len(right) // 2  # the threshold of one half
        assert right[half] == confusion[number][number]
        assert right[half] + missed[half] == len(own)


def test_checkpoints_are_loaded_as_mere_weights(run, monkeypatch):
    loaded, load = [], torch.load

    def noted(*arguments, **options):
        loaded.append(options.get("weights_only"))
        return load(*arguments, **options)

    monkeypatch.setattr("torch.load", noted)
    run(debug=True)
    assert len(loaded) > 1 and {*loaded} == {True}


def test_only_the_first_process_finishes(run, monkeypatch):
    calls = []
    second = types.SimpleNamespace(
        is_global_zero=False,
        checkpoint_callback=main.Checkpoints(pathlib.Path()),
        fit=lambda *_, **__: calls.append("fit"),
        test=lambda *_, **__: calls.append("test"),
    )
    monkeypatch.setattr(main, "make_trainer", lambda *_: second)
    monkeypatch.setattr(main, "finish", lambda *_: calls.append("finish"))
    run()
    assert calls == ["fit", "test"]


def test_predictions_list_each_test_review_by_its_row_in_the_file(
    trained, reviews, bert
):
    with open(trained / "predictions.csv") as file:
        header, *rows = csv.reader(file)
    assert header == ["row", "label", "prediction", "neg", "pos"]
    numbers = [int(row[0]) for row in rows]
    assert numbers == sorted({*numbers}) and len(rows) == 47 and numbers[-1] > 47
    whole = datasets.Dataset.from_parquet(f"{reviews}/test.parquet")
    tokenizer = transformers.BertTokenizer.from_pretrained(bert)
    load = transformers.BertForSequenceClassification.from_pretrained
    model = load(trained / "model").eval()
    cut = SETTINGS["seq_length"], SETTINGS["truncation"]
    names = ["neg", "pos"]
    for number, row in zip(numbers, rows, strict=True):
        review = whole[number]
        ids = piece_ids(tokenizer, review["text"], *cut)
        with torch.no_grad():
            shares = model(torch.tensor([ids])).logits[0].softmax(-1)
        assert row[1:3] == [names[review["label"]], names[shares.argmax()]]
        assert [float(share) for share in row[3:]] == pytest.approx(
            shares.tolist(), abs=2e-6
        )


def test_a_checkpoint_alone_makes_the_module_that_was_exported(trained):
    file = trained / "checkpoints" / "best.ckpt"
    module = Module.load_from_checkpoint(file, weights_only=True)
    load = transformers.BertForSequenceClassification.from_pretrained
    exported = load(trained / "model").state_dict()
    for name, weights in module.bert.state_dict().items():
        assert weights.equal(exported[name])
    assert module.hparams.seq_length == SETTINGS["seq_length"]


# Progress


def test_without_a_terminal_a_line_tells_each_tenth_of_an_epoch(
    run, capsys, monkeypatch
):
    monkeypatch.setattr(main, "SAY_EVERY", 0)
    monkeypatch.setattr(main, "LOG_EVERY", 1)
    run(epochs=1)
    said = capsys.readouterr().out.splitlines()
    lines = [line for line in said if re.match(r"Epoch 0 .*\d/24 \[", line)]
    told = [int(re.search(r"(\d+)/24", line)[1]) for line in lines]
    assert told == [3, 5, 8, 10, 12, 15, 17, 20, 22, 24]
    for line in lines[1:]:
        assert re.search(r"\[\d\d:\d\d<\d\d:\d\d, .*train_loss=\d.*, speed=\d", line)
    assert len([line for line in said if line.startswith("Testing")]) == 10  # batches
    assert len([line for line in said if line.startswith("Validation")]) == 3


@pytest.mark.parametrize(
    "seconds, told", [(7, [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]), (1, [60])]
)
def test_lines_of_progress_come_once_a_minute_at_most(capsys, seconds, told):
    bar = main.ProgressLines()
    bar._time = lambda: bar.n * seconds  # a step takes so many
    bar.reset()
    bar.total = 100
    said = []
    for n in range(1, 101):
        bar.n = n
        bar.refresh()
        said += [n] * capsys.readouterr().out.count("/100")
    assert said == told


NOTEBOOK = """
    import io, runpy, sys

    sys.stdout = io.StringIO()  # which, like Jupyter's, cannot be reconfigured
    for _ in range(2):
        sys.argv = {arguments}
        try:
            runpy.run_path({main!r}, run_name="__main__")
        except SystemExit as end:
            assert not end.code, end.code
    sys.__stdout__.write(sys.stdout.getvalue())
"""


def test_a_notebook_runs_it_twice(bert, reviews, tmp_path):
    """As `%run main.py` does: in one process, whose stdout is not a file."""
    arguments = [str(demo.MAIN), "--debug", f"--model={bert}", f"--dataset={reviews}"]
    script = NOTEBOOK.format(
        main=str(demo.MAIN), arguments=[*arguments, "--seq_length=40"]
    )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Test      accuracy") == 2


def test_a_thread_runs_it(bert, reviews, tmp_path):
    """Where Python sets no handlers of signals."""
    ours = {"dataset": reviews, "model": bert, "logdir": str(tmp_path), "debug": True}
    with flagsaver.flagsaver(**SETTINGS | ours):
        thread = threading.Thread(target=main.main, args=[["main.py"]])
        thread.start()
        thread.join()
    assert read_results(tmp_path / "debug" / "version_0")


def test_a_logdir_may_name_variables(run, tmp_path, monkeypatch):
    """TensorBoard's logger expands them: what else a run leaves lies beside its log."""
    monkeypatch.setenv("PLACE", str(tmp_path / "place"))
    run(logdir="$PLACE/logs", debug=True)
    assert files(tmp_path / "place/logs/debug/version_0").keys() >= RUN_FILES
    assert not pathlib.Path("$PLACE").exists()


def test_a_full_disk_under_the_terminal_ends_no_run(bert, reviews, tmp_path):
    arguments = [f"--model={bert}", f"--dataset={reviews}", "--seq_length=40"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, demo.MAIN, "--debug", *arguments],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert read_results(tmp_path / "logs" / "debug" / "version_0")


def test_closed_streams_end_no_run(bert, reviews, tmp_path):
    """As under a daemon: then other files must not get the streams' numbers."""
    arguments = [f"--model={bert}", f"--dataset={reviews}", "--seq_length=40"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, demo.MAIN, "--debug"]
        + arguments,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0
    assert read_results(tmp_path / "logs" / "debug" / "version_0")


def test_a_disk_that_fills_under_the_log_is_told_in_one_line(run, monkeypatch, capfd):
    """TensorBoard writes it in a thread, which would show a traceback."""
    write = record_writer.RecordWriter.write
    writes = itertools.count()

    def full(writer: Any, data: bytes) -> None:
        if next(writes) == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(writer, data)

    monkeypatch.setattr(record_writer.RecordWriter, "write", full)
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    with pytest.raises(SystemExit, match="cannot write to .*: its disk is full"):
        run()
    assert "Traceback" not in capfd.readouterr().err


def test_a_full_disk_under_labels_is_told_in_one_line(trained, tmp_path):
    (tmp_path / "new.txt").write_text("a fine film\n" * 9)
    arguments = [f"--predict={tmp_path}/new.txt", f"--model={trained}/model"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, demo.MAIN, *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr == "main.py: cannot write to stdout: its disk is full\n"


# The exported model


@pytest.mark.parametrize("truncation", ["tail", "head"])
def test_the_exported_model_has_the_accuracy_that_results_say(
    trained, run, reviews, truncation
):
    default = SETTINGS["truncation"] == truncation
    folder = trained if default else run(truncation=truncation)
    test = load_samples(reviews, SETTINGS["percent"], SETTINGS["seed"])["test"]
    names = test.features["label"].names
    labels = [names.index(name) for name in label(folder / "model", test["text"][:])]
    confusion = [[0, 0], [0, 0]]
    for row, predicted in zip(test["label"], labels, strict=True):
        confusion[row][predicted] += 1
    results = read_results(folder)
    assert results["confusion"] == confusion
    right = confusion[0][0] + confusion[1][1]
    assert results["metrics"]["test_acc"] == pytest.approx(right / len(test))
    assert 0 < right < len(test)  # else labels could be exchanged unnoticed


def test_the_model_card_holds_what_the_hub_reads(trained, reviews):
    results, folder = read_results(trained), trained / "model"
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    told = card.text.split("```")[1].removeprefix("json")
    assert json.loads(told) == results
    strange = {"samples": {"test": {"a: b\n---\nlicense: mit": 1, "c": 1}}}
    other = huggingface_hub.ModelCard(main.model_card(results | strange))
    for data in (card.data, other.data):
        assert data.pipeline_tag == "text-classification"
        assert data.library_name == "transformers"
        assert data.license is None  # the user's choice


def test_the_best_epoch_is_tested_and_exported_not_the_last(run, monkeypatch):
    validate, first = Module.validation_step, {}

    def worse_and_worse(module: Module, batch: dict, batch_idx: int) -> None:
        predicted = module(batch["input_ids"]).argmax(-1)
        right = module.current_epoch == 0
        labels = predicted if right else 1 - predicted
        if right:
            first.update({k: v.clone() for k, v in module.bert.state_dict().items()})
        validate(module, batch | {"labels": labels}, batch_idx)

    monkeypatch.setattr(Module, "validation_step", worse_and_worse)
    tested = {}
    trained_last = []
    monkeypatch.setattr(
        Module,
        "on_train_end",
        lambda module: trained_last.append(module.bert.classifier.weight.clone()),
    )
    monkeypatch.setattr(
        Module,
        "on_test_start",
        lambda module: tested.update(module.bert.state_dict()),
    )
    folder = run()
    results = read_results(folder)
    assert (results["best_epoch"], results["metrics"]["val_acc"]) == (0, 1)
    exported = transformers.BertForSequenceClassification.from_pretrained(
        folder / "model"
    ).state_dict()
    assert exported.keys() == first.keys()
    for name, weights in first.items():
        assert exported[name].equal(weights) and tested[name].equal(weights)
    assert not trained_last[0].equal(first["classifier.weight"])


def test_a_resumed_run_remembers_its_best_epoch(run, monkeypatch):
    validate, train = Module.validation_step, Module.training_step

    def worse_and_worse(module: Module, batch: dict, batch_idx: int) -> None:
        predicted = module(batch["input_ids"]).argmax(-1)
        labels = predicted if module.current_epoch == 0 else 1 - predicted
        validate(module, batch | {"labels": labels}, batch_idx)

    def interrupted(module: Module, batch: dict, batch_idx: int) -> torch.Tensor:
        if (module.current_epoch, batch_idx) == (1, 3):
            signal.raise_signal(signal.SIGINT)
        return train(module, batch, batch_idx)

    monkeypatch.setattr(Module, "validation_step", worse_and_worse)
    monkeypatch.setattr(Module, "training_step", interrupted)
    with pytest.raises(SystemExit, match="130"):
        run()
    monkeypatch.setattr(Module, "training_step", train)
    results = read_results(run(resume=True))
    assert (results["best_epoch"], results["metrics"]["val_acc"]) == (0, 1)


@pytest.mark.parametrize("later, kept", [(0.86, True), (0.84, False)])
def test_a_later_epoch_is_kept_unless_worse_by_a_standard_error(tmp_path, later, kept):
    """Of 40 reviews, 90 % of them right, that is 4.7 points."""
    module = types.SimpleNamespace(samples={"val": range(40)})
    checkpoints = main.Checkpoints(tmp_path)
    trainer = checkpoints.trainer = mock.Mock()
    trainer.strategy.reduce_boolean_decision.return_value = False
    for acc in (0.9, later):
        trainer.save_checkpoint.reset_mock()
        trainer.callback_metrics = {"val_acc": torch.tensor(acc)}
        checkpoints.on_validation_end(trainer, module)
    best = mock.call(tmp_path / "best.ckpt", weights_only=True)
    assert (best in trainer.save_checkpoint.mock_calls) == kept


def test_of_equal_epochs_the_later_is_kept(run, monkeypatch):
    validate = Module.validation_step

    def all_right(module: Module, batch: dict, batch_idx: int) -> None:
        labels = module(batch["input_ids"]).argmax(-1)
        validate(module, batch | {"labels": labels}, batch_idx)

    monkeypatch.setattr(Module, "validation_step", all_right)
    results = read_results(run())
    assert (results["best_epoch"], results["metrics"]["val_acc"]) == (1, 1)


def test_three_classes_of_a_csv_are_trained_and_named(run, tmp_path):
    words = {
        "so-so": demo.WORDS[0].split()[8:16],
        "bad": demo.WORDS[1].split(),
        "good": demo.WORDS[2].split(),
    }
    labels = [*words] * 20
    texts = [
        " ".join(words[name][(i + k) % 8] for k in range(3 + i % 4))
        for i, name in enumerate(labels)
    ]
    folder = write_reviews(
        tmp_path / "own", "csv",
        {"text": texts, "label": labels}, {"text": texts[:9], "label": labels[:9]},
    )  # fmt: skip
    run_folder = run(dataset=folder, percent=100, epochs=4, lr=5e-3)
    results, model = read_results(run_folder), run_folder / "model"
    assert results["samples"]["val"] == {"bad": 2, "good": 2, "so-so": 2}
    config = json.loads((model / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good", "2": "so-so"}
    assert results["metrics"]["test_acc"] == 1
    assert label(model, texts[:6]) == labels[:6]


def test_a_learnable_set_is_learned(run, tmp_path_factory):
    reviews = demo.make_reviews(tmp_path_factory.mktemp("more"), 600, 200, sure=1)
    folder = run(dataset=reviews, percent=100, batch_size=16)
    results = read_results(folder)
    assert results["metrics"]["test_acc"] > 0.95
    assert sum(results["samples"]["test"].values()) == 200


# Again, and earlier runs


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    trained, run, tmp_path
):
    torch.rand(1)
    again, other = run(), run(seed=4, logdir=str(tmp_path / "other"))
    weights = [
        (folder / "model/model.safetensors").read_bytes()
        for folder in (trained, again, other)
    ]
    assert weights[0] == weights[1] != weights[2]
    metrics = [read_results(folder)["metrics"] for folder in (trained, again, other)]
    assert metrics[0] == metrics[1] != metrics[2]


def test_earlier_logs_are_moved_and_not_lost(run, tmp_path):
    earlier = tmp_path / "logs/imdb/version_0"
    (earlier / "model").mkdir(parents=True)
    (earlier / "model/config.json").write_text("{}")
    (earlier / "results.json").write_text("an earlier result")
    before = files(tmp_path / "logs/imdb")
    stamp = "2001-09-09_01-46-40"
    (tmp_path / "logs.old" / stamp).mkdir(parents=True)  # of another run
    (tmp_path / "logs.old" / stamp / "results.json").write_text("the other's")
    (tmp_path / "logs" / "mine.txt").write_text("no run's")
    folder = run(epochs=1)
    assert read_results(folder)["flags"]["epochs"] == 1
    assert files(folder).keys() == RUN_FILES | {"events.out.tfevents"}
    assert files(tmp_path / "logs.old" / stamp) == {"results.json": b"the other's"}
    others = {path.name for path in (tmp_path / "logs.old").iterdir()} - {stamp}
    (name,) = others
    assert name.startswith(time.strftime("%Y-%m-%d_"))
    assert files(tmp_path / "logs.old" / name) == before
    assert (tmp_path / "logs" / "mine.txt").read_text() == "no run's"


def test_runs_moved_within_a_second_lie_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda *_: "now")
    for number in (1, 2, 3):
        earlier = tmp_path / "logs" / "imdb"
        earlier.mkdir(parents=True)
        (earlier / "results.json").write_text(str(number))
        with flagsaver.flagsaver(debug=False):
            main.clear(earlier)
    kept = sorted((tmp_path / "logs.old").rglob("results.json"))
    found = {str(p.relative_to(tmp_path / "logs.old")): p.read_text() for p in kept}
    places = ["now", "now_", "now__"]
    assert found == {f"{p}/results.json": str(n) for n, p in enumerate(places, 1)}


def test_a_tilde_is_the_home_for_all_that_a_run_leaves(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run(logdir="~/logs", debug=True)
    left = files(tmp_path / "home/logs/debug/version_0")
    assert left.keys() == RUN_FILES | {"events.out.tfevents"}
    assert not (tmp_path / "~").exists()


def test_debug_walks_the_whole_way_and_leaves_other_runs_alone(
    run, tmp_path, monkeypatch
):
    other = tmp_path / "logs/imdb/version_0/results.json"
    other.parent.mkdir(parents=True)
    other.write_text("of another run")

    def no_network(*_: object) -> None:
        raise AssertionError("a local run has no business on the network")

    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    for _ in range(2):  # the second takes the place of the first
        folder = run(debug=True)
        assert folder == tmp_path / "logs/debug/version_0"
        assert files(folder).keys() == RUN_FILES | {"events.out.tfevents"}
        log = event_accumulator.EventAccumulator(str(folder)).Reload()
        assert [event.step for event in log.Scalars("train_loss")] == [0]
    assert files(tmp_path / "logs/imdb") == {
        "version_0/results.json": b"of another run"
    }
    assert {path.name for path in tmp_path.iterdir()} == {"logs"}


def test_all_of_ones_own_reviews_are_used_by_default(run):
    assert read_results(run(percent=None, epochs=1))["flags"]["percent"] == 100


def test_importing_main_touches_nothing(tmp_path):
    earlier = tmp_path / "logs/imdb/version_0/results.json"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("an earlier result")
    clean = {"PYTHONPATH": str(demo.MAIN.parent), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", "import main"],
        cwd=tmp_path,
        env=os.environ | clean | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert files(tmp_path) == {"logs/imdb/version_0/results.json": b"an earlier result"}


# As a user would


def test_the_command_tells_the_data_each_epoch_and_the_result(
    commanded, trained, reviews, bert
):
    folder, _, done = commanded
    assert (done.returncode, done.stderr) == (0, "")
    run = folder / "logs/imdb/version_0"
    results = read_results(run)
    for part, sizes in results["samples"].items():
        counts = f"neg {sizes['neg']}, pos {sizes['pos']}"
        line = rf"{part} +{sum(sizes.values())} reviews: {counts}\n"
        assert re.search(line, done.stdout)
    for epoch in (0, 1):
        figures = (
            r"train_acc_epoch [\d.]+  val_loss [\d.]+  val_acc [\d.]+  speed [\d,]+"
        )
        line = rf"Epoch {epoch}   train_loss_epoch [\d.]+  {figures}\n"
        assert re.search(line, done.stdout)
    tokenizer = transformers.BertTokenizer.from_pretrained(bert)
    samples = load_samples(reviews, SETTINGS["percent"], SETTINGS["seed"])
    texts = [text for sample in samples.values() for text in sample["text"]]
    lengths = [len(piece_ids(tokenizer, text, 999, "head")) for text in texts]
    cut = sum(length >= SETTINGS["seq_length"] for length in lengths) / len(lengths)
    assert 0.1 < cut < 0.9
    line = f"{cut:.0%} fill 40 word-pieces; of longer ones the head is kept\n"
    assert line in done.stdout
    low, high = results["metrics"]["test_acc_interval"]
    share = f"{results['metrics']['test_acc']:.2%}"
    end = done.stdout[done.stdout.index("Test ") :]
    for told in (f"accuracy {share}", f"95 % interval {low:.2%} to {high:.2%}"):
        assert told in end
    assert "47 reviews" in end
    assert "tensorboard --logdir logs\n" in end
    assert "main.py --model=logs/imdb/version_0/model --predict=FILE\n" in end
    # A process of its own comes to the same bits.
    weights = (run / "model/model.safetensors").read_bytes()
    assert weights == (trained / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "txt", "-"])
def test_predict_labels_each_review_in_order_as_the_pipeline_does(
    trained, reviews, tmp_path, monkeypatch, capsys, kind
):
    path = pathlib.Path(reviews, "test.parquet")
    texts = datasets.Dataset.from_parquet(str(path))["text"][::3]
    file = str(tmp_path / f"test.{kind}")
    if kind == "-":
        file = "-"
        (tmp_path / "stdin.txt").write_text("\n".join(texts) + "\n", "utf-8")
        stdin = os.open(tmp_path / "stdin.txt", os.O_RDONLY)
        os.dup2(stdin, 0)
    elif kind == "txt":
        pathlib.Path(file).write_text("\n".join(texts) + "\n")
    else:
        write_reviews(tmp_path, kind, None, {"text": texts, "label": [0] * len(texts)})
    before = files(trained.parents[1])
    capsys.readouterr()
    call(predict=file, logdir=str(trained.parents[1]), seed=5)
    header, *rows = csv.reader(capsys.readouterr().out.splitlines())
    assert header == ["label", "neg", "pos"]
    assert [row[0] for row in rows] == label(trained / "model", texts)
    assert {row[0] for row in rows} == {"neg", "pos"}
    for name, *shares in rows:
        neg, pos = map(float, shares)
        assert neg + pos == pytest.approx(1, abs=2e-6)
        assert name == ("pos" if pos > neg else "neg")
    assert files(trained.parents[1]) == before


def test_predict_cuts_as_in_training_unless_flags_say_otherwise(
    trained, tmp_path, capsys
):
    words = "fine film plot it awful boring clumsy stale dreadful tedious "
    (tmp_path / "new.txt").write_text(words * 5)
    load = transformers.BertForSequenceClassification.from_pretrained
    model = load(trained / "model").eval()
    plain = transformers.BertTokenizer.from_pretrained(trained / "model")
    settings = SETTINGS | {"model": str(trained / "model"), "text_column": "text"}
    shares = []
    for given, cut in (
        ({}, (40, "head")),
        ({"seq_length": 8}, (8, "head")),
        ({"seq_length": 8, "truncation": "tail"}, (8, "tail")),
    ):
        defaults = {"seq_length": 256, "truncation": "tail"}
        capsys.readouterr()
        main.predict(settings | defaults, given, str(tmp_path / "new.txt"))
        shares.append(float(capsys.readouterr().out.split(",")[-2]))
        ids = torch.tensor([piece_ids(plain, words * 5, *cut)])
        with torch.no_grad():
            share = model(ids).logits.softmax(-1)[0, 0].item()
        assert shares[-1] == pytest.approx(share, abs=2e-6)
    assert len({*shares}) == 3


def test_labels_of_another_model_are_read_in_the_order_of_their_numbers(
    trained, tmp_path, capsys
):
    model = shutil.copytree(trained, tmp_path / "imdb" / "version_0") / "model"
    (tmp_path / "new.txt").write_text("a fine film\nan awful film\n")
    rows = []
    for labels in ({"0": "neg", "1": "pos"}, {"1": "pos", "0": "neg"}):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"id2label": labels}))
        call(predict=str(tmp_path / "new.txt"), logdir=str(tmp_path))
        rows.append(capsys.readouterr().out)
    assert rows[0] == rows[1] and rows[0].startswith("label,neg,pos\n")


def test_predict_names_many_classes_in_the_order_of_their_numbers(
    bert, tmp_path, capsys
):
    names = [f"class {number}" for number in range(12)]
    model = transformers.BertForSequenceClassification.from_pretrained(
        bert,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    model.save_pretrained(tmp_path / "model")
    transformers.BertTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "model")
    texts = ["a fine film", "an awful film", "it was", "the plot!"]
    (tmp_path / "new.txt").write_text("\n".join(texts))
    capsys.readouterr()
    call(predict=str(tmp_path / "new.txt"), model=str(tmp_path / "model"))
    header, *rows = csv.reader(capsys.readouterr().out.splitlines())
    assert header == ["label", *names]
    assert [row[0] for row in rows] == label(tmp_path / "model", texts)


def test_the_demo_shows_a_run_that_learns(tmp_path, monkeypatch, capsys):
    logs = tmp_path / "other" / "logs"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--epochs=2", f"--logdir={logs}"])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as done:
        demo.demo()
    assert not done.value.code
    results = read_results(logs / "imdb" / "version_0")
    assert results["metrics"]["test_acc"] > 0.9
    (folder,) = tmp_path.glob("demo-*")
    assert results["flags"]["dataset"] == str(folder / "reviews")
    shown = capsys.readouterr().out
    assert shown.startswith(f"$ python {demo.MAIN} --dataset={folder}/reviews ")
    assert "Epoch 1" in shown and "Epoch 2" not in shown and "accuracy" in shown
    assert shown.endswith(f"lie in {folder}\n")


def test_what_is_logged_is_on_disk_whenever_a_run_is_saved(tmp_path):
    """Where TensorFlow writes the log, its points else wait in memory."""
    checkpoints = main.Checkpoints(tmp_path)
    trainer = checkpoints.trainer = mock.Mock()
    trainer.strategy.reduce_boolean_decision = lambda value, all: value
    checkpoints.save(due=False)
    assert not trainer.save_checkpoint.called
    checkpoints.save(due=True)
    trainer.save_checkpoint.assert_called_once_with(tmp_path / "last.ckpt")
    trainer.logger.save.assert_called_once_with()


def test_a_signal_noted_as_training_ended_ends_the_run_before_the_test(tmp_path):
    checkpoints = main.Checkpoints(tmp_path)
    checkpoints.trainer = types.SimpleNamespace(world_size=1)
    with main.on_signals(main.stop):
        checkpoints.on_test_start()  # none was
        checkpoints.note(signal.SIGTERM, None)
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            checkpoints.on_test_start()


def test_a_signal_is_noted_though_the_terminal_was_closed(tmp_path, monkeypatch):
    """As when an ssh session ends: SIGHUP comes, and stderr cannot be written."""

    def gone(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    checkpoints = main.Checkpoints(tmp_path)
    monkeypatch.setattr("os.write", gone)
    checkpoints.note(signal.SIGHUP, None)
    assert checkpoints.signum == signal.SIGHUP
    with pytest.raises(SystemExit, match=str(128 + signal.SIGHUP)):
        main.stop(signal.SIGHUP)


def test_a_disk_full_at_the_last_write_leaves_a_run_that_goes_on(run, monkeypatch):
    write = pathlib.Path.write_text

    def full(path: pathlib.Path, *arguments: object, **options: object) -> int:
        if path.name.startswith("results.json"):
            write(path, "")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_text", full)
        with pytest.raises(SystemExit, match="cannot write to .*: its disk is full"):
            run(epochs=1)
    folder = run(epochs=1, resume=True)
    assert read_results(folder)
    # What the first part had logged of the test, TensorBoard shows once.
    log = plugin_event_accumulator.EventAccumulator(str(folder)).Reload()
    logged = {tag: len(log.Tensors(tag)) for tag in log.Tags()["tensors"]}
    of_test = {tag: n for tag, n in logged.items() if tag.startswith("test_")}
    assert of_test.keys() >= {"test_acc", "test_pr/pos", "test_worst/text_summary"}
    assert {*of_test.values()} == {1}

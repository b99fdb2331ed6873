"""Two processes train and score as one would: each review once, one log, one export."""

import json
import os
import pathlib
import subprocess
import sys

import conftest
import demo
import pytest
import pytorch_lightning as pl

import main

ARGUMENTS = ["--percent=100", "--seq_length=24", "--batch_size=8", "--epochs=2"]
ARGUMENTS += [
    "--lr=0.002",
    "--precision=32-true",
    "--devices=2",
    "--strategy=ddp",
]


def start(starter: str, arguments: list[str], cwd: pathlib.Path) -> str:
    """Runs `main.py` on two processes, started by Lightning or by torchrun."""
    python = [sys.executable]
    if starter == "torchrun":
        python += [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--standalone",
        ]
    done = subprocess.run(
        [*python, str(demo.MAIN), *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("starter", ["Lightning", "torchrun"])
def test_two_processes_leave_what_one_would(starter, bert, reviews, tmp_path):
    earlier = tmp_path / "logs" / "imdb" / "version_0"
    earlier.mkdir(parents=True)
    (earlier / "hparams.yaml").write_text("an earlier run")
    arguments = [f"--dataset={reviews}", f"--model={bert}", *ARGUMENTS]
    said = start(starter, arguments, tmp_path)
    folder = tmp_path / "logs" / "imdb" / "version_0"
    results = json.loads((folder / "results.json").read_text())

    # One log, one export, one earlier run moved; each line is said once.
    assert said.count("Test      accuracy") == said.count("Data      ") == 1
    pids = {path.name.split(".")[-2] for path in folder.glob("events*")}
    assert len(pids) == 1
    (old,) = (tmp_path / "logs.old").iterdir()
    assert (old / "version_0" / "hparams.yaml").read_text() == "an earlier run"
    # 234 reviews to train on, in batches of at most 2 x 8; 94 to test, each once.
    assert "2 epochs of 15 steps of 16 reviews" in said
    assert sum(map(sum, results["confusion"])) == 94

    # One process gives the same weights the same scores.
    settings = conftest.SETTINGS | results["flags"]
    settings |= {"model": str(folder / "model"), "devices": 1, "strategy": "auto"}
    module = main.make_module(settings, ["neg", "pos"])
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False
    )
    (alone,) = trainer.test(module, verbose=False)
    for name, value in alone.items():
        assert results["metrics"][name] == pytest.approx(value, abs=1e-6), name

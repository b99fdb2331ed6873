"""What holds on a GPU, told without one: made-up devices, and float16 on a CPU."""

import json
import os
import pathlib
import signal
import subprocess
import sys
from types import SimpleNamespace as Stub
from typing import Any

import pytest
import pytorch_lightning as pl
import safetensors.torch
import torch
from torch.optim import optimizer as optimizers

import main

Module = main.IMDBSentimentClassifier


# A walk on fake tensors: `fake_gpu.py` takes it, in a process of its own.


@pytest.fixture(scope="module")
def walks():
    """What was noted of fit, test and predict, by the bug that was planted."""
    script = pathlib.Path(__file__).with_name("fake_gpu.py")
    path = f"{script.parent}:{script.parents[1]}"
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_step_waits_for_the_gpu_but_those_that_log(walks):
    fit, test, predict = (walks[""][stage] for stage in ("fit", "test", "predict"))
    ours = {note: n for note, n in fit.items() if "main.py" in note}
    assert ours == {
        # The 5th step, the 10th, and the last of the epoch: is the loss finite?
        "reads a value in main.py: log_step": 3,
        "copies from the CPU in main.py: log_point": 3,
        # Once an epoch: what is said and drawn of it.
        "reads a value in main.py: score": 1,
        "copies to the CPU in main.py: score": 1,
    }
    assert {note: n for note, n in test.items() if "main.py" in note} == {
        "reads a value in main.py: score": 1,
        "copies to the CPU in main.py: score": 1,
    }
    assert not [note for note in predict if "main.py" in note]
    for notes in (fit, test, predict):
        assert not [note for note in notes if "doubles" in note or "advance" in note]


@pytest.mark.parametrize(
    "bug, note",
    [
        ("an item", "reads a value in training_epoch_loop.py: advance"),
        ("a copy", "copies from the CPU in training_epoch_loop.py: advance"),
        ("a double", "makes doubles in training_epoch_loop.py: advance"),
    ],
)
def test_the_walk_notes_what_a_step_does_wrong(walks, bug, note):
    assert walks[bug]["fit"][note] == 1


def test_the_walk_refuses_a_tensor_of_the_cpu(walks):
    assert "same device" in walks["a tensor of the CPU"]


# Devices that were never there.


@pytest.mark.parametrize(
    "gpu, cpu, precision",
    [
        (True, {}, "bf16-mixed"),
        (False, {"avx512_bf16": True, "amx_bf16": True}, "16-mixed"),
        (None, {"avx512_bf16": True}, "bf16-mixed"),
        (None, {"avx512_bf16": False, "amx_bf16": True}, "bf16-mixed"),
        (None, {"avx512_bf16": False}, "32-true"),
    ],
)
def test_auto_is_the_fastest_that_the_hardware_has(monkeypatch, gpu, cpu, precision):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu is not None)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: gpu)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: cpu)
    assert main.fastest_precision() == precision


@pytest.mark.parametrize("why", ["driver is too old", "no kernel image is available"])
def test_a_gpu_that_torch_cannot_use_is_refused_first_of_all(run, monkeypatch, why):
    def ones(*_: Any, device: str) -> torch.Tensor:
        raise RuntimeError(f"CUDA error: {why}\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.ones", ones)
    with pytest.raises(SystemExit) as refusal:
        run(dataset="nowhere")
    line = refusal.value.code
    assert why in line and "CUDA_VISIBLE_DEVICES=" in line and "whl/cu129" in line
    assert len(line.splitlines()) == 1


def test_attention_by_cudnn_is_off(run):
    torch.backends.cuda.enable_cudnn_sdp(True)
    run(debug=True)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("fastest, told", [("32-true", 1), ("bf16-mixed", 0)])
def test_bf16_that_is_emulated_is_told(run, monkeypatch, capsys, fastest, told):
    """As where a run is resumed on another machine."""
    monkeypatch.setattr(main, "fastest_precision", lambda: fastest)
    run(debug=True, precision="bf16-mixed")
    said = capsys.readouterr().out
    assert said.count("slow on this machine: 32-true is its fastest") == told


def test_labels_on_stdout_are_labels_alone(trained, tmp_path, run, monkeypatch, capsys):
    monkeypatch.setattr(main, "fastest_precision", lambda: "32-true")
    (tmp_path / "new.txt").write_text("a fine film\n")
    model = str(trained / "model")
    run(predict=str(tmp_path / "new.txt"), model=model, precision="bf16-mixed")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "label,neg,pos" and len(said) == 2


def test_dropout_seeds_the_generators_of_the_cpu_and_of_its_device(monkeypatch):
    seeded = []
    monkeypatch.setattr("torch.cuda.manual_seed", lambda n: seeded.append(n))
    monkeypatch.setattr("torch.xpu.manual_seed", None)
    module = Stub(hparams=Stub(seed=3), global_step=4, global_rank=1)
    for device, kinds in (("cuda:0", 1), ("cpu", 0)):
        seeded.clear()
        module.device = torch.device(device)
        Module.on_train_batch_start(module, {}, 0)
        assert seeded == [torch.initial_seed()] * kinds


MEMORY = {
    "a GPU's": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    "a Mac's": RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    "a CPU's": RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    "C++'s": RuntimeError("std::bad_alloc"),
    "oneDNN's": RuntimeError("could not create a memory object"),
    "Python's": MemoryError(),
}


@pytest.mark.parametrize("error", MEMORY.values(), ids=MEMORY)
def test_full_memory_names_the_flags_that_help(error):
    with (
        pytest.raises(SystemExit, match=r"memory.*--batch_size.*--seq_length"),
        main.refusing_breakdowns("logs"),
    ):
        raise error


@pytest.mark.parametrize("error", [
    RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer"),
    torch.distributed.DistNetworkError("failed to send: Broken pipe"),
])  # fmt: skip
def test_the_end_of_another_process_is_told(error):
    with (
        pytest.raises(SystemExit, match=r"another process.*--resume goes on"),
        main.refusing_breakdowns("logs"),
    ):
        raise error


def test_other_errors_of_a_run_keep_their_traceback():
    peer = ConnectionResetError(104, "Connection reset by peer")  # the Hub, say
    for error in (RuntimeError("mat1 and mat2"), OSError(2, "No such file"), peer):
        with pytest.raises(type(error)), main.refusing_breakdowns("logs"):
            raise error


@pytest.mark.parametrize("processes, asked", [(1, 48), (2, 4)])
def test_several_processes_agree_at_few_steps(tmp_path, processes, asked):
    decisions = []

    def decide(value: bool, all: bool) -> bool:
        decisions.append(value)
        return value

    checkpoints = main.Checkpoints(tmp_path)
    checkpoints.trainer = trainer = Stub(
        world_size=processes,
        log_every_n_steps=10,
        is_last_batch=False,
        strategy=Stub(reduce_boolean_decision=decide),
    )
    for step in range(1, 49):
        trainer.global_step = step
        checkpoints.on_train_batch_end(trainer)
    assert decisions == [False] * asked


# float16, with a real scaler, which only CUDA has by itself.


@pytest.fixture
def halved(run, monkeypatch):
    """Calls `main.main` in 16-mixed on the CPU; returns the folder and scalers."""
    make = pl.Trainer
    scalers = []

    def run_halved(scale: float = 2.0**16, **values: Any) -> tuple[pathlib.Path, list]:
        def trainer(precision: str, plugins: list, **options: Any) -> pl.Trainer:
            scalers.append(torch.amp.GradScaler("cpu", init_scale=scale))
            half = pl.plugins.MixedPrecision("16-mixed", "cpu", scalers[-1])
            return make(plugins=[*plugins, half], **options)

        monkeypatch.setattr(pl, "Trainer", trainer)
        monkeypatch.setattr(main, "check_precision", lambda _: None)
        try:
            return run(**{"precision": "16-mixed"} | values), scalers
        finally:
            monkeypatch.setattr(pl, "Trainer", make)

    return run_halved


def weights_of(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model" / "model.safetensors")


@pytest.fixture
def norms(monkeypatch):
    """The norm of the gradients in each step, before they are clipped."""
    found = []
    clip = torch.nn.utils.clip_grad_norm_

    def noted(*arguments: Any) -> torch.Tensor:
        found.append(clip(*arguments).item())
        return torch.tensor(found[-1])

    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", noted)
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_float16_trains_as_float32_does(run, halved, norms, bert, tmp_path, optimizer):
    flags = {"optimizer": optimizer, "lr": 1e-3, "epochs": 1, "warmup": 0.0}
    whole = weights_of(run(logdir=str(tmp_path / "whole"), **flags))
    in_float32 = norms.copy()
    norms.clear()
    folder, _ = halved(logdir=str(tmp_path / "half"), **flags)
    assert norms == pytest.approx(in_float32, rel=0.05)
    assert 0.1 < max(norms) < 100  # not times the scale, 65,536
    start = safetensors.torch.load_file(f"{bert}/model.safetensors")
    moves = []
    for weights in (whole, weights_of(folder)):
        moved = [weights[f"bert.{name}"] - before for name, before in start.items()]
        moves.append(torch.cat([move.flatten() for move in moved]))
    assert torch.cosine_similarity(*moves, dim=0) > 0.98
    assert moves[1].norm().item() == pytest.approx(moves[0].norm().item(), rel=0.05)


def test_a_step_whose_gradients_overflow_is_skipped(halved, norms):
    moved = []

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        steps = [state["step"].item() for state in optimizer.state.values()]
        moved.append(steps[0])

    with optimizers.register_optimizer_step_post_hook(after):
        _, (scaler,) = halved(scale=2.0**26, epochs=1)
    skipped = [norm for norm in norms if not torch.tensor(norm).isfinite()]
    assert 3 < len(skipped) < 20 and len(norms) == 24
    # AdamW counts the steps that it took, and each overflow halved the scale.
    assert moved == [*range(1, 25 - len(skipped))]
    assert scaler.get_scale() == 2.0 ** (26 - len(skipped))


def test_a_resumed_run_in_float16_ends_as_the_undisturbed(
    halved, tmp_path, monkeypatch
):
    scale = 2.0**44  # steps are skipped before the signal and after
    whole, (first,) = halved(scale=scale, logdir=str(tmp_path / "whole"))
    train = Module.training_step

    def interrupted(module: Module, batch: dict, batch_idx: int) -> torch.Tensor:
        if (module.current_epoch, batch_idx) == (1, 3):
            signal.raise_signal(signal.SIGINT)
        return train(module, batch, batch_idx)

    monkeypatch.setattr(Module, "training_step", interrupted)
    with pytest.raises(SystemExit, match="130"):
        halved(scale=scale)
    monkeypatch.setattr(Module, "training_step", train)
    resumed, (*_, last) = halved(scale=2.0**10, resume=True)
    assert last.get_scale() == first.get_scale() != 2.0**10
    for name, weights in weights_of(whole).items():
        assert weights.equal(weights_of(resumed)[name])


def test_a_loss_that_overflows_in_float16_names_float32(monkeypatch):
    module = Stub(hparams=Stub(precision="16-mixed"), global_step=9)
    with pytest.raises(SystemExit, match="--lr, or --precision=32-true"):
        Module.log_step(module, torch.tensor(float("nan")), torch.tensor(0.0))

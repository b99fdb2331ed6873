"""Measures `main.py` beside other ways to fine-tune BERT on the same reviews.

    pip install accelerate           for Hugging Face's Trainer, main.py needs none
    cd tests/measure
    python benchmark.py --dataset=FOLDER --model=FOLDER --rounds=5 --reviews=1280
    python benchmark.py --dataset=FOLDER --model=FOLDER --contestants=ours,bare

The contestants take turns, one process each, with the same reviews cut and tokenised
by `main.tokenise`, the same pretrained weights and the same seed, one more each round:
    ours             main.py as it stands; it also validates, logs, saves and exports
    trainer_example  Hugging Face's Trainer as its example script has it: float32,
                     batches of 8, every review padded to --seq_length
    trainer_best     the same with length groups, padding to multiples of 8, and the
                     precision, batch size, optimiser, schedule, validation of ours;
                     it groups 50 batches at a time, or a quarter of fewer than 200
    demo             a loop: float32, batches of 8 padded to --seq_length, SGD
    bare             a loop with our batches, model, optimiser: no Lightning, no log

The figures are medians over rounds; a ratio is formed within each round, and shown as
its median (least..most):
    word-pieces a second  real ones, padding not counted; from the third training step
                          on, without validation; of the test, to its accuracy
    padding               share of the positions in all batches
    peak memory           of the process; on a GPU, of its tensors
    to the first step     from the start of the process, without tokenising, and for
    and total             those that need no Lightning without its import
    test accuracy         also as points, ours less the other's
    share of bf16 rate    on a GPU: operations of training on the real word-pieces, as
                          a share of those in a bf16 product of 8192 x 8192
"""

import functools
import importlib.util
import json
import math
import os
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from typing import Any

import datasets
import torch
import transformers
from absl import app, flags
from transformers.models.bert import modeling_bert

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
before = time.perf_counter()
import pytorch_lightning as pl  # noqa: E402

import main  # noqa: E402

IMPORT = time.perf_counter() - before  # seconds
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ["ours", "trainer_example", "trainer_best", "demo", "bare"]
FIGURES = {
    "training, word-pieces a second": ",.0f",
    "evaluation, word-pieces a second": ",.0f",
    "padding in training": ".1%",
    "padding in evaluation": ".1%",
    "peak memory, MB": ",.0f",
    "peak memory / memory of the first 20 steps": ".2f",
    "to the first step, s": ".1f",
    "total, s": ".1f",
    "test accuracy": ".2%",
    "share of bf16 rate": ".1%",
}
Figures = dict[str, float]
Batch = dict[str, torch.Tensor]
Samples = datasets.DatasetDict
Loader = torch.utils.data.DataLoader
FLAGS = flags.FLAGS
flags.adopt_module_key_flags(main)
FLAGS.set_default("epochs", 1)
flags.DEFINE_integer("rounds", 3, "Runs of each contestant; five for claims.", 1)
flags.DEFINE_integer("reviews", 320, "Reviews to train on; a ninth more validates.", 48)
flags.DEFINE_integer("test_reviews", 250, "Reviews to test on.", 2)
flags.DEFINE_list("contestants", NAMES, "Who takes part, in this order.")
flags.register_validator("contestants", {*NAMES}.issuperset, f"must be some of {NAMES}")
flags.DEFINE_enum("contestant", None, NAMES, "Internal: who runs in this process.")
flags.DEFINE_string("samples", None, "Internal: folder of the tokenised reviews.")
flags.DEFINE_float("started", None, "Internal: when this process was started, in s.")


def clock() -> float:
    """Returns the time in seconds, once the GPU has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Meter:
    """Counts the word-pieces of batches, and the seconds they take after a warm-up."""

    def __init__(self, pad: int, warm_up: int) -> None:
        self.pad, self.warm_up, self.seconds, self.since = pad, warm_up, 0.0, None
        self.batches = []  # of real word-pieces, and of positions
        self.early = 0.0  # MB, the most that the first twenty steps held

    def begin(self, batch: Batch) -> None:
        """Notes that a step begins."""
        if not self.batches:
            self.first = time.time()
        if self.since is None and len(self.batches) >= self.warm_up:
            self.since = clock()
        if len(self.batches) == 20:
            self.early = peak_memory()
        input_ids = batch["input_ids"]  # [B, T]
        self.batches.append((input_ids.ne(self.pad).sum(), input_ids.numel()))

    def pause(self) -> None:
        """Notes that these steps are done: what follows is not timed."""
        if self.since is not None:
            self.seconds, self.since = self.seconds + clock() - self.since, None

    def speed(self) -> float:
        return sum(int(real) for real, _ in self.batches[self.warm_up :]) / self.seconds

    def padding(self) -> float:
        real, positions = map(sum, zip(*self.batches, strict=True))
        return 1 - int(real) / positions


def precision() -> str:
    return main.fastest_precision() if FLAGS.precision == "auto" else FLAGS.precision


def steps(samples: Samples) -> int:
    """Returns how many steps our batches make."""
    return FLAGS.epochs * math.ceil(len(samples["train"]) / FLAGS.batch_size)


def load_tokenizer() -> transformers.BertTokenizer:
    return main.load_tokenizer(FLAGS.flag_values_dict())


def plain_bert(samples: Samples) -> torch.nn.Module:
    classes = samples["train"].features["label"].num_classes
    kind = modeling_bert.BertForSequenceClassification
    return kind.from_pretrained(FLAGS.model, num_labels=classes).float().train()


def pad(rows: list[dict], pad_token_id: int) -> Batch:
    """Pads to the limit: <int64>[B, seq_length] word-pieces, <int64>[B] labels."""
    padding = [pad_token_id] * FLAGS.seq_length
    padded = [(row["input_ids"] + padding)[: FLAGS.seq_length] for row in rows]
    input_ids = torch.tensor(padded)
    labels = torch.tensor([row["label"] for row in rows])
    mask = input_ids.ne(pad_token_id).long()
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def send(batch: Batch) -> Batch:
    return {k: v.to(DEVICE, non_blocking=True) for k, v in batch.items()}


# The contestants; each shows its batches to the meters and returns its accuracy.


def ours(samples: Samples, training: Meter, testing: Meter) -> float:
    watch = pl.callbacks.LambdaCallback(
        on_train_batch_start=lambda _, __, batch, *i: training.begin(batch),
        on_validation_start=lambda *_: training.pause(),
        on_test_batch_start=lambda _, __, batch, *i: testing.begin(batch),
        on_test_end=lambda *_: testing.pause(),
    )
    make_trainer = main.make_trainer

    def watched(*arguments: Any) -> pl.Trainer:
        trainer = make_trainer(*arguments)
        trainer.callbacks.append(watch)
        return trainer

    def take(module: pl.LightningModule, stage: str) -> None:
        # The samples are tokenised, and have no texts to compare.
        module.samples = samples
        odd = ("leaks", "val_leaks", "contradictory", "empty", "line_breaks")
        module.oddities = dict.fromkeys(odd, 0)
        module.fingerprint = ""

    main.make_trainer = watched
    main.load_samples = lambda _: samples
    main.IMDBSentimentClassifier.prepare_data = lambda module: None
    main.IMDBSentimentClassifier.setup = take
    main.main(sys.argv[:1])
    results = pathlib.Path(FLAGS.logdir, "imdb", "version_0", "results.json")
    return json.loads(results.read_text())["metrics"]["test_acc"]


def hugging_face(
    collate: Callable,
    samples: Samples,
    training: Meter,
    testing: Meter,
    **own: Any,
) -> float:
    """Trains, saves and tests by Hugging Face's Trainer."""

    class Pause(transformers.TrainerCallback):
        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            training.pause()

    def watched(step: Callable, meter: Meter) -> Callable:
        def begin(model: Any, batch: Batch, *rest: Any, **named: Any) -> Any:
            meter.begin(batch)
            return step(model, batch, *rest, **named)

        return begin

    def accuracy(scored: Any) -> dict[str, float]:
        right = scored.predictions.argmax(-1) == scored.label_ids
        return {"accuracy": right.mean().item()}

    own |= {"num_train_epochs": FLAGS.epochs, "seed": FLAGS.seed}
    own |= {"use_cpu": DEVICE == "cpu", "report_to": "none", "disable_tqdm": True}
    trainer = transformers.Trainer(
        plain_bert(samples),
        transformers.TrainingArguments(FLAGS.logdir, **own),
        data_collator=collate,
        train_dataset=samples["train"],
        eval_dataset=samples["val"],
        compute_metrics=accuracy,
        callbacks=[Pause()],
    )
    trainer.training_step = watched(trainer.training_step, training)
    trainer.train()
    trainer.save_model()
    trainer.prediction_step = watched(trainer.prediction_step, testing)
    scored = trainer.predict(samples["test"])
    testing.pause()
    return scored.metrics["test_accuracy"]


def trainer_example(samples: Samples, *meters: Meter) -> float:
    collate = functools.partial(pad, pad_token_id=meters[0].pad)
    return hugging_face(collate, samples, *meters)


def trainer_best(samples: Samples, *meters: Meter) -> float:
    tokenizer, size = load_tokenizer(), FLAGS.batch_size
    collate = transformers.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8)
    grouping = {"train_sampling_strategy": "group_by_length"}
    if not hasattr(transformers.TrainingArguments, *grouping):
        grouping = {"group_by_length": True}  # its name in transformers 4
    return hugging_face(
        collate, samples, *meters, **grouping, bf16=precision() == "bf16-mixed",
        per_device_train_batch_size=size, per_device_eval_batch_size=2 * size,
        optim="adamw_torch_fused", learning_rate=FLAGS.lr, adam_beta1=FLAGS.momentum,
        weight_decay=FLAGS.weight_decay,
        warmup_steps=round(FLAGS.warmup * steps(samples)),
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )  # fmt: skip


def test(logits: Callable, batches: Loader, testing: Meter) -> float:
    """Returns the accuracy of `logits`, a function that makes [B, C] of a batch."""
    right = []
    with torch.inference_mode():
        for batch in map(send, batches):
            testing.begin(batch)
            right.append(logits(batch).argmax(-1).eq(batch["labels"]))
    accuracy = torch.cat(right).float().mean().item()
    testing.pause()
    return accuracy


def demo(samples: Samples, training: Meter, testing: Meter) -> float:
    collate = functools.partial(pad, pad_token_id=training.pad)
    model = plain_bert(samples).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    batches = Loader(samples["train"], 8, shuffle=True, collate_fn=collate)
    for _ in range(FLAGS.epochs):
        for batch in map(send, batches):
            training.begin(batch)
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        training.pause()
    model.eval()
    batches = Loader(samples["test"], 8, collate_fn=collate)
    return test(lambda batch: model(**batch).logits, batches, testing)


def bare(samples: Samples, training: Meter, testing: Meter) -> float:
    torch.set_float32_matmul_precision("high")
    settings, _ = main.take_flags()
    names = samples["train"].features["label"].names
    module = main.IMDBSentimentClassifier(names, **settings)
    module.samples = samples
    # What the module asks of a Trainer.
    progress = types.SimpleNamespace(current=types.SimpleNamespace(ready=0))
    loop = types.SimpleNamespace(batch_progress=progress)
    module.trainer = types.SimpleNamespace(
        global_rank=0,
        world_size=1,
        estimated_stepping_batches=steps(samples),
        fit_loop=types.SimpleNamespace(epoch_loop=loop),
    )
    module.to(DEVICE)
    [optimizer], [schedule] = module.configure_optimizers()
    bf16 = {"dtype": torch.bfloat16, "enabled": precision() == "bf16-mixed"}
    batches = module.train_dataloader()
    for epoch in range(FLAGS.epochs):
        batches.sampler.set_epoch(epoch)
        for batch in map(send, batches):
            training.begin(batch)
            with torch.autocast(DEVICE, **bf16):
                logits = module(batch["input_ids"])
            torch.nn.functional.cross_entropy(logits, batch["labels"]).backward()
            module.on_before_optimizer_step(optimizer)
            optimizer.step()
            schedule["scheduler"].step()
            optimizer.zero_grad()
        training.pause()
    module.eval()
    logits = torch.autocast(DEVICE, **bf16)(lambda batch: module(batch["input_ids"]))
    return test(logits, module.test_dataloader(), testing)


def peak_memory() -> float:
    """Returns the most that this process held, in MB: on the GPU if there is one."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    status = pathlib.Path("/proc/self/status")
    # On Linux, where getrusage starts from the parent's figure.
    if status.exists():
        most = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        return int(most[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def compete(name: str) -> Figures:
    """Runs a contestant in this process and returns its figures."""
    main.quieten()
    pad_token_id = load_tokenizer().pad_token_id
    training, testing = Meter(pad_token_id, 2), Meter(pad_token_id, 0)
    torch.manual_seed(FLAGS.seed)
    samples = datasets.load_from_disk(FLAGS.samples)
    accuracy = globals()[name](samples, training, testing)
    start = FLAGS.started + (0 if name in ("ours", "bare") else IMPORT)
    figures = [
        training.speed(),
        testing.speed(),
        training.padding(),
        testing.padding(),
    ]
    peak = peak_memory()
    figures += [peak, peak / training.early if training.early else math.nan]
    figures += [training.first - start, time.time() - start, accuracy]
    return dict(zip(FIGURES, figures, strict=False))


# The parent, which prepares the reviews, starts the contestants and makes the tables.


def prepare(folder: str) -> torch.Tensor:
    """Saves the tokenised samples; returns the lengths of train's reviews, [N]."""
    splits = main.load_splits(FLAGS.flag_values_dict())
    # A tenth of the draw validates, as in main.py.
    sizes = {"train": round(FLAGS.reviews / 0.9), "test": FLAGS.test_reviews}
    for part, size in sizes.items():
        if size < len(splits[part]):
            draw = {"train_size": size, "stratify_by_column": "label"}
            parts = splits[part].train_test_split(**draw, seed=FLAGS.seed)
            splits[part] = parts["train"]
    splits["val"], splits["train"] = main.draw_share(
        splits["train"], "val", 10, FLAGS.seed
    )
    samples = main.tokenise(datasets.DatasetDict(splits), load_tokenizer())
    samples.save_to_disk(folder)
    return torch.tensor(samples["train"]["length"][:]).double()


def run(name: str, samples: str, seed: int) -> Figures:
    """Runs a contestant in a process of its own and returns its figures."""
    with tempfile.TemporaryDirectory() as logdir:
        command = [
            sys.executable,
            __file__,
            *sys.argv[1:],
            f"--contestant={name}",
        ]
        command += [
            f"--samples={samples}",
            f"--logdir={logdir}",
            f"--seed={seed}",
        ]
        command += [f"--started={time.time()}"]
        env = {"CUDA_VISIBLE_DEVICES": "0"} | os.environ  # a Trainer would take all
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}benchmark.py: {name} failed, see above")
    figures = json.loads(done.stdout.splitlines()[-1])
    shown = (f"{title} {figures[title]:{FIGURES[title]}}" for title in figures)
    print(f"{name}:", *shown, sep="  ", file=sys.stderr, flush=True)
    return figures


def bf16_share(lengths: torch.Tensor) -> float:
    """Measures the share of the GPU's bf16 rate that a word-piece a second makes."""
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for repeats in (10, 50):  # the first to warm up
        start = clock()
        for _ in range(repeats):
            torch.mm(matrix, matrix)
        rate = 2 * 8192**3 * repeats / (clock() - start)
    config = transformers.BertConfig.from_pretrained(FLAGS.model)
    width, inner = config.hidden_size, config.intermediate_size
    seen = (lengths.square().sum() / lengths.sum()).item()  # by the mean word-piece
    # Forward and backward, 6 for a weight; 12 to attend to one word-piece.
    weights = width * (4 * width + 2 * inner)
    return config.num_hidden_layers * (6 * weights + 12 * width * seen) / rate


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(rounds: list[dict[str, Figures]]) -> str:
    """Returns the medians over rounds, and the ratios of ours to the others."""
    medians, ratios, others = (
        [],
        [],
        [name for name in rounds[0] if name != "ours"],
    )
    for title, form in FIGURES.items():
        if all(title in figures for figures in rounds[0].values()):
            each = [[r[name][title] for r in rounds] for name in rounds[0]]
            medians.append([title, *(f"{statistics.median(e):{form}}" for e in each)])
        if "ours" in rounds[0] and not re.search("padding|share", title):
            points = title == "test accuracy"
            ratios.append([f"{title}, points less" if points else title.split(",")[0]])
            for name in others:
                pairs = [(r["ours"][title], r[name][title]) for r in rounds]
                each = sorted(100 * (a - b) if points else a / b for a, b in pairs)
                spread = f"({each[0]:.2f}..{each[-1]:.2f})"
                ratios[-1].append(f"{statistics.median(each):.2f} {spread}")
    parts = [table(["", *rounds[0]], medians), table(["ours /", *others], ratios)]
    return "\n\n".join(parts if ratios and others else parts[:1])


def benchmark(argv: list[str]) -> None:
    if FLAGS.contestant:
        print("\n" + json.dumps(compete(FLAGS.contestant)))
        return
    needed = any(name.startswith("trainer") for name in FLAGS.contestants)
    if needed and not importlib.util.find_spec("accelerate"):
        sys.exit("benchmark.py: the Trainer needs accelerate: pip install accelerate")
    main.quieten()
    main.check_config(FLAGS.model, FLAGS.seq_length)
    rounds, names = [], FLAGS.contestants
    with tempfile.TemporaryDirectory() as folder:
        lengths = prepare(folder)
        for seed in range(FLAGS.seed, FLAGS.seed + FLAGS.rounds):
            rounds.append({name: run(name, folder, seed) for name in names})
    where = f"{os.cpu_count()} CPU cores"
    if DEVICE == "cuda":
        where, share = torch.cuda.get_device_name(), bf16_share(lengths)
        for figures in (r[name] for r in rounds for name in names):
            speed = figures["training, word-pieces a second"]
            figures["share of bf16 rate"] = speed * share
    versions = (
        f"{lib.__name__} {lib.__version__}" for lib in (torch, pl, transformers)
    )
    print(where, precision(), *versions, sep=", ")
    size = f"{len(lengths):,} reviews of up to {FLAGS.seq_length} word-pieces"
    print(f"{size}, epochs {FLAGS.epochs}, rounds {FLAGS.rounds}, {FLAGS.model}\n")
    print(tables(rounds))


if __name__ == "__main__":
    app.run(benchmark)

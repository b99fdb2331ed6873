"""Fine-tunes BERT to tell positive from negative film reviews, or any labelled texts.

    python main.py --debug                     the whole way on one batch, in seconds
    python main.py --percent=50 --epochs=10    half of IMDB; the default is 5 %
    python main.py --dataset=FOLDER            own reviews: train.csv and test.csv (or
                                               jsonl, parquet) with text and label
    python main.py --resume                    go on with an interrupted run
    python main.py --predict=FILE              label new reviews with the last model
    tensorboard --logdir logs                  look at the run

Flags by group, what a newcomer changes first in front:
    Data          dataset percent seq_length truncation
    Model         model
    Optimisation  epochs batch_size optimizer lr momentum weight_decay warmup
    Run           debug predict resume seed logdir precision devices num_nodes strategy

Shapes: B reviews in a batch, N in a sample; T word-pieces of a batch's longest review,
with [CLS], [SEP] and padding to eights; H the width of the model; C classes.

[1] Devlin et al. 2019, BERT: https://arxiv.org/abs/1810.04805
[2] Sun et al. 2019, How to Fine-Tune BERT: https://arxiv.org/abs/1905.05583
[3] Loshchilov and Hutter 2019, AdamW: https://arxiv.org/abs/1711.05101
[4] Wilson 1927, the score interval: https://doi.org/10.2307/2276774
"""

import ctypes
import datetime
import errno
import functools
import json
import logging
import math
import os
import pathlib
import pickle
import re
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import huggingface_hub
import pandas
import pytorch_lightning as pl
import safetensors
import sh
import tokenizers
import torch
import torch.nn.functional as F
import torchmetrics
import transformers
from absl import app, flags
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch.nn.utils.rnn import pad_sequence
from transformers.models.bert import modeling_bert

Batch = dict[str, torch.Tensor]
Loader = torch.utils.data.DataLoader
Reviews = datasets.Dataset
FLAGS = flags.FLAGS
# Flags that do not belong to the experiment: `--resume` lets them differ.
RUN_FLAGS = ("debug", "predict", "resume", "logdir")
SAVE_EVERY = 600  # seconds after which the next step writes `last.ckpt`
UNREADABLE = (datasets.exceptions.DatasetsError, OSError, ValueError)
# What a run leaves in its folder; a folder with anything else is somebody's own.
OURS = r"version_0(/(events\.out\.tf.*|hparams.yaml|checkpoints|model|results.json))?"
say = rank_zero_only(functools.partial(print, flush=True))

# fmt: off
# Data
flags.DEFINE_string("dataset", "stanfordnlp/imdb",
    "Hub name, or folder with train and test files of text and label.")
flags.DEFINE_integer("percent", 5,
    "Whole per cent of train and test, stratified by class.", 1, 100)
flags.DEFINE_integer("seq_length", 256,
    "Word-pieces kept of a review, [CLS] and [SEP] included.", 3)
flags.DEFINE_enum("truncation", "tail", ["head", "tail", "head_tail"],
    "Part of a long review kept; head_tail: a quarter head, the rest tail [2].")
# Model
flags.DEFINE_string("model", "google-bert/bert-base-uncased",
    "Hub name or folder of a BERT to train; to predict, a trained one's folder.")
# Optimisation
flags.DEFINE_integer("epochs", 3,
    "Passes over train; the best by validation is tested and kept.", 1)
flags.DEFINE_integer("batch_size", 16,
    "Reviews a step on each device; halve it when memory runs out.", 1)
flags.DEFINE_enum("optimizer", "adamw", ["adamw", "sgd"],
    "AdamW with warm-up and linear decay [3], or SGD at a constant rate.")
flags.DEFINE_float("lr", 5e-5,
    "Learning rate at its peak; [1] tried 2e-5 to 5e-5.")
flags.DEFINE_float("momentum", 0.9,
    "Share of past gradients kept: SGD's momentum, AdamW's first beta.")
flags.DEFINE_float("weight_decay", 0.01,
    "Decay of matrices a step, times the rate; SGD ignores it.")
flags.DEFINE_float("warmup", 0.1,
    "Share of steps in which the rate rises to lr; SGD ignores it.")
# Run
flags.DEFINE_boolean("debug", False,
    "Walk the whole way on one batch of each sample, in LOGDIR/debug.")
flags.DEFINE_string("predict", None,
    "Csv, jsonl or parquet with text, or reviews by line; - is stdin.")
flags.DEFINE_boolean("resume", False,
    "Go on from the run's last checkpoint; give its training flags again.")
flags.DEFINE_integer("seed", 0,
    "Draws the samples, the order, the classifier and dropout.", 0, 2**32 - 1)
flags.DEFINE_string("logdir", "logs",
    "Folder of the run; the one before it moves to LOGDIR.old.")
flags.DEFINE_enum("precision", "auto", ["auto", "32-true", "bf16-mixed"],
    "Of matrix products; auto is bf16 where hardware has it, 32-true may be TF32.")
flags.DEFINE_integer("devices", 1,
    "GPUs, or CPU processes, a machine; the global batch grows with them.", 1)
flags.DEFINE_integer("num_nodes", 1,
    "Machines with LOGDIR on a disk they share; each by SLURM or torchrun.", 1)
flags.DEFINE_enum("strategy", "auto", ["auto", "ddp"],
    "auto takes ddp for more than one device.")
# fmt: on
# Comparisons also refuse NaN, which passes absl's bounds.
flags.register_validator("lr", lambda v: 0 < v < 1, "must be between 0 and 1")
for rate in ("momentum", "weight_decay", "warmup"):
    flags.register_validator(rate, lambda v: 0 <= v < 1, "must be at least 0, below 1")


def expect(met: object, otherwise: str) -> None:
    """Ends the program with one line and exit status 1 unless `met`."""
    if not met:
        sys.exit(f"main.py: {otherwise}")


def one_line(error: BaseException) -> str:
    return " ".join(str(error.__cause__ or error).split())[:300]


def stop(signum: int, *_: Any, saved: str = "") -> None:
    """Ends the program on a signal; tells what was saved and how to go on from it."""
    command = shlex.join([a for a in sys.argv if a != "--resume"] + ["--resume"])
    how = f"; {saved}; to go on from there: python {command}" if saved else ""
    say(f"\nStopped{how}", file=sys.stderr)
    sys.exit(128 + signum)


def on_signals(handler: Callable) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, handler)


def check_name(flag: str, name: str, look_up: Callable) -> None:
    """Refuses what is neither a local folder nor, within seconds, found on the Hub."""
    if os.path.isdir(name):
        return
    found = f"--{flag}={name}: no such folder, and"
    expect(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name), f"{found} no Hub name, owner/name")
    try:
        huggingface_hub.constants.HF_HUB_OFFLINE or look_up(name, timeout=5)
    except huggingface_hub.errors.RepositoryNotFoundError:
        expect(False, f"{found} no such {flag} on the Hub")
    except huggingface_hub.errors.HTTPError as error:
        why = f"the network does not reach the Hub ({one_line(error)}): give --dataset"
        how = "and --model local folders, or set HF_HUB_OFFLINE=1 to use the cache"
        expect(False, f"{found} {why} {how}")


def load_reviews(dataset: str) -> datasets.DatasetDict:
    """Loads and checks the splits train and test, `label` a `ClassLabel` in both."""
    flag, splits = f"--dataset={dataset}: expected", datasets.DatasetDict()
    try:
        found = datasets.load_dataset(dataset)
    except (*UNREADABLE, RuntimeError) as error:
        expect(False, f"{flag} a train and a test file of one kind: {one_line(error)}")
    for part in ("train", "test"):
        expect(part in found, f"{flag} the splits train and test, found {[*found]}")
        columns = found[part].column_names  # pandas calls a second text column text.1
        again = {"text.1", "label.1"} & {*columns}
        once = {"text", "label"} <= {*columns} and not again
        expect(once, f"{flag} one column text, one label; {part} has {columns}")
        splits[part] = split = found[part].select_columns(["text", "label"])
        for column, table in zip(split.column_names, split.data.columns, strict=True):
            empty = table.null_count
            row = table.to_pylist().index(None) + 1 if empty else None
            lacks = f"{part} lacks {empty} of {len(split)}, the first in row {row}"
            lacks += " (a csv's NA, None and null are taken for missing)"
            expect(not empty, f"{flag} a {column} in every row, {lacks}")
            kinds = r"(large_)?string" + (r"|u?int\d+" if column == "label" else "")
            wrong = f"strings, or whole numbers as labels; {column} is {table.type}"
            expect(re.fullmatch(kinds, str(table.type)), f"{flag} {wrong} in {part}")
    labels = sorted(splits["train"].unique("label"))
    unknown = {*splits["test"].unique("label")} - {*labels}
    expect(not unknown, f"{flag} labels that train has too, only test has {unknown}")
    expect(len(labels) > 1, f"{flag} two classes or more, train has only {labels}")
    if isinstance(splits["train"].features["label"], datasets.ClassLabel):
        expect(labels[0] >= 0, f"{flag} a label in every row, some of train have -1")
        return splits
    names = datasets.ClassLabel(names=[str(label) for label in labels])
    text = splits.cast_column("label", datasets.Value("string"))
    return text.cast_column("label", names)


def stratified(reviews: Reviews, percent: int, seed: int) -> tuple[Reviews, Reviews]:
    """Draws a percentage of reviews, stratified by class; returns it and the rest."""
    size, plan = round(len(reviews) * percent / 100), {"stratify_by_column": "label"}
    try:
        parts = reviews.train_test_split(train_size=size, seed=seed, **plan)
    except ValueError as error:
        few = f"too few reviews to draw {size} of {len(reviews)} ({error})"
        expect(False, f"{few}: give more, or raise --percent")
    return parts["train"], parts["test"]


def load_samples(dataset: str, percent: int, seed: int) -> datasets.DatasetDict:
    """Draws the samples train and test, and a tenth of train for validation."""
    splits = load_reviews(dataset)
    if percent < 100:
        splits = {k: stratified(v, percent, seed)[0] for k, v in splits.items()}
    val, train = stratified(splits["train"], 10, seed)
    return datasets.DatasetDict(train=train, val=val, test=splits["test"])


def head_room(seq_length: int, truncation: str) -> int:
    """Returns how many word-pieces the beginning of a long review gets."""
    room = seq_length - 2  # [CLS] and [SEP]
    return {"head": room, "tail": 0, "head_tail": room // 4}[truncation]


def tokenise(samples: Any, tokenizer: Any, seq_length: int, truncation: str) -> Any:
    """Turns texts into word-pieces, at most `seq_length`; cached on disk by `datasets`.

    Returns:
        `samples` with the columns `input_ids`, `length`, and `cut` (word-pieces cut
        away) instead of `text`.
    """
    room, head = seq_length - 2, head_room(seq_length, truncation)
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id

    # Its variables name the cache: `self` or FLAGS among them, it is not found again.
    def encode(batch: dict[str, list]) -> dict[str, list]:
        pieces = tokenizer(batch["text"], add_special_tokens=False, verbose=False)
        cuts = [max(0, len(review) - room) for review in pieces["input_ids"]]
        input_ids = [
            [cls, *review[:head], *review[head + cut :], sep]
            for review, cut in zip(pieces["input_ids"], cuts, strict=True)
        ]
        return {"input_ids": input_ids, "length": [*map(len, input_ids)], "cut": cuts}

    return samples.map(encode, batched=True, remove_columns="text", desc="Tokenising")


class LengthGroupedBatches(torch.utils.data.Sampler):
    """Draws batches of reviews of like length, each review once, the longest first.

    The plan follows from (seed, epoch) alone, which makes resuming exact. Each process
    takes every `world_size`-th batch of it; sizes differ by one review at most.

    Args:
        lengths: <int64>[N] word-pieces of each review.
        batch_size: Reviews in a batch, at most; batches of one may take two.
        rank: This process, of `world_size`.
        seed: Shuffles the batches, and like lengths among them; None, for evaluation.
        done: Tells, when an epoch starts, how many of its batches to skip.
    """

    def __init__(
        self, lengths: torch.Tensor, batch_size: int, rank: int = 0,
        world_size: int = 1, seed: int | None = None,
        done: Callable[[], int] = lambda: 0,
    ) -> None:  # fmt: skip
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.rank, self.world_size, self.done, self.epoch = rank, world_size, done, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        size, most = len(self.lengths), self.batch_size * self.world_size
        # The latter where batches of one would leave a process without its last.
        return min(math.ceil(size / most), size // self.world_size)

    def plan(self) -> list[list[int]]:
        """Returns this process's batches of the epoch, as rows of the sample."""
        lengths, order = self.lengths.double(), torch.arange(len(self))
        if self.seed is not None:
            # Unlike a string's, the hash of integers is the same in every process.
            mixed = hash((self.seed, self.epoch)) % 2**32
            generator = torch.Generator().manual_seed(mixed)
            # A jitter of 1 % makes new batches every epoch, for little padding.
            jitter = torch.rand(len(lengths), generator=generator, dtype=torch.double)
            lengths = lengths * (1 + jitter / 100)
            order[1:] = 1 + torch.randperm(len(self) - 1, generator=generator)
        rows = lengths.argsort(descending=True, stable=True)
        batches = rows.tensor_split(len(self) * self.world_size)
        return [batches[self.world_size * i + self.rank].tolist() for i in order]

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.plan()[self.done() :]


def check_model(model: str, seq_length: int) -> dict:
    """Returns the config of a BERT that takes `seq_length`; refuses anything else."""
    try:
        config, _ = transformers.PretrainedConfig.get_config_dict(model)
    except OSError as error:
        expect(False, f"--model={model}: expected a config.json: {one_line(error)}")
    kind, most = config.get("model_type"), config.get("max_position_embeddings", 512)
    found = f"--model={model}: expected a BERT's config.json, found model_type {kind}"
    expect(kind == "bert", found)
    short = f"--seq_length={seq_length}: {model} takes {most} at most"
    expect(seq_length <= most, short)
    return config


def load_tokenizer(model: str) -> transformers.BertTokenizer:
    """Loads a tokenizer that drops `<br />` tags and reads "[SEP]" as plain text."""
    load = transformers.BertTokenizer.from_pretrained
    try:
        tokenizer = load(model, split_special_tokens=True)
    except (OSError, ValueError) as error:
        expect(False, f"--model={model}: expected a tokenizer: {one_line(error)}")
    # With its files missing, transformers makes one that knows special tokens only.
    known = len(tokenizer) > len(tokenizer.all_special_tokens)
    expect(known, f"--model={model}: expected a tokenizer, found no vocabulary")
    backend = tokenizer.backend_tokenizer
    tags = tokenizers.normalizers.Replace(tokenizers.Regex(r"<br\s*/?>"), " ")
    backend.normalizer = tokenizers.normalizers.Sequence([tags, backend.normalizer])
    return tokenizer


class Dropout(torch.nn.Dropout):
    """Draws 16 random bits an element on a CPU, where PyTorch draws slowly."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64)
        bits = bits.random_(-(2**63), None).view(torch.int16)[: x.numel()].view_as(x)
        return x * ((bits >= round(self.p * 2**16) - 2**15).to(x.dtype) / (1 - self.p))


class ClsLayer(modeling_bert.BertLayer):
    """The last layer for [CLS] alone, which is all that the classifier reads."""

    def forward(
        self, hidden: torch.Tensor, mask: Any, *_: Any, **__: Any
    ) -> torch.Tensor:
        cls = hidden[:, :1]  # [B, 1, H] of [B, T, H]
        mask = None if mask is None else mask[:, :, :1]  # [B, 1, 1, T]
        # It takes the queries of [CLS], the keys and values of all; same weights.
        attend = modeling_bert.BertCrossAttention.forward
        context, _ = attend(self.attention.self, cls, hidden, mask)
        return self.feed_forward_chunk(self.attention.output(context, cls))


def cast_once(module: torch.nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
    """Casts the embeddings to bf16 on a CPU, so that no layer casts its own input."""
    return out.bfloat16() if torch.is_autocast_enabled("cpu") else out


def load_bert(model: str, names: list[str]) -> torch.nn.Module:
    """Loads float32 weights, ready to train; only classifier or pooler may be new."""
    labels, load = dict(enumerate(names)), modeling_bert.BertForSequenceClassification
    try:
        bert, info = load.from_pretrained(
            model, id2label=labels, label2id={v: k for k, v in labels.items()},
            problem_type="single_label_classification", dtype=torch.float32,
            attention_probs_dropout_prob=0.0,  # to draw it is slow on a CPU
            attn_implementation="sdpa",  # whatever its config names
            ignore_mismatched_sizes=True,  # of an earlier classifier
            use_safetensors=True, output_loading_info=True,
        )  # fmt: skip
    except (OSError, safetensors.SafetensorError, pickle.UnpicklingError) as error:
        expect(False, f"--model={model}: expected sound safetensors: {one_line(error)}")
    new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    lost = [key for key in new if not key.startswith(("classifier.", "bert.pooler."))]
    expect(not lost, f"--model={model}: {len(lost)} weights lack or misfit: {lost[:2]}")
    if "bert.pooler.dense.weight" in new:
        say("Model     its checkpoint has no pooler: that starts from random weights")
    for module in bert.modules():
        if type(module) is torch.nn.Dropout:
            module.__class__ = Dropout
    bert.bert.encoder.layer[-1].__class__ = ClsLayer
    bert.bert.embeddings.register_forward_hook(cast_once)
    return bert.train()  # it comes in eval mode, with dropout off


class IMDBSentimentClassifier(pl.LightningModule):
    """BERT with a classifier of [CLS], and its data, metrics and optimiser.

    The arguments are the flags of these names, and the names of the classes in order;
    those of the Trainer are noted among the hyper-parameters.
    """

    def __init__(
        self, *, dataset: str, percent: int, seq_length: int, truncation: str,
        model: str, label_names: list[str], batch_size: int, optimizer: str, lr: float,
        momentum: float, weight_decay: float, warmup: float, seed: int, **trainer: Any
    ) -> None:  # fmt: skip
        super().__init__()
        self.save_hyperparameters()
        self.tokenizer, self.bert = load_tokenizer(model), load_bert(model, label_names)
        known, rows = len(self.tokenizer), self.bert.config.vocab_size
        many = f"--model={model}: {known} word-pieces, but only {rows} embeddings"
        expect(known <= rows, many)
        kinds, classes = torchmetrics.classification, len(label_names)
        acc = kinds.MulticlassAccuracy(classes, average="micro")
        f1, ece = kinds.MulticlassF1Score, kinds.MulticlassCalibrationError
        scores = {"acc": acc, "f1": f1(classes), "ece": ece(classes)}
        self.scores, self.mean_loss = torch.nn.ModuleDict(), torch.nn.ModuleDict()
        for stage in ("val", "test"):
            each = torchmetrics.MetricCollection(scores, prefix=f"{stage}_")
            self.scores[stage] = each.clone()
            self.mean_loss[stage] = torchmetrics.MeanMetric()
        self.tested = torchmetrics.CatMetric()  # row, label, probabilities: [N, 2 + C]

    # Data: one process a machine fills the cache, all read it in `setup`.

    def load(self) -> datasets.DatasetDict:
        hp = self.hparams
        samples = load_samples(hp.dataset, hp.percent, hp.seed)
        return tokenise(samples, self.tokenizer, hp.seq_length, hp.truncation)

    def prepare_data(self) -> None:
        if not hasattr(self, "samples"):
            self.load()

    def setup(self, stage: str) -> None:
        if not hasattr(self, "samples"):
            self.samples = self.load()

    def class_counts(self) -> dict[str, dict[str, int]]:
        """Returns how many reviews of each class each sample has."""
        columns = {part: sample["label"][:] for part, sample in self.samples.items()}
        names = [*enumerate(self.hparams.label_names)]
        return {part: {n: c.count(i) for i, n in names} for part, c in columns.items()}

    def serve(self, part: str, **plan: Any) -> Loader:
        """Batches a sample; reading it costs less than a worker process would."""
        sample, size = self.samples[part], self.hparams.batch_size
        rank, world_size = self.global_rank, self.trainer.world_size
        lengths = torch.tensor(sample["length"][:])
        return Loader(
            sample.remove_columns(["length", "cut"]),
            sampler=LengthGroupedBatches(lengths, size, rank, world_size, **plan),
            batch_size=None,  # the sampler draws whole batches
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
        )

    def collate(self, rows: dict[str, list]) -> Batch:
        """Pads to the longest review: <int64>[B, T] word-pieces, <int64>[B] labels."""
        reviews, pad = rows.pop("input_ids"), self.tokenizer.pad_token_id
        padded = pad_sequence([torch.tensor(review) for review in reviews], True, pad)
        # To eights, as oneDNN keeps kernels, 20 MB and more, for each T.
        room = self.hparams.seq_length - padded.shape[1]
        padded = F.pad(padded, (0, min(-padded.shape[1] % 8, room)), value=pad)
        labels = {f"{name}s": torch.tensor(column) for name, column in rows.items()}
        return {"input_ids": padded, **labels}

    def train_dataloader(self) -> Loader:
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        plan = {"seed": self.hparams.seed, "done": lambda: progress.current.ready}
        return self.serve("train", **plan)

    def val_dataloader(self) -> Loader:
        return self.serve("val")

    def test_dataloader(self) -> Loader:
        loader = self.serve("test")
        self.test_plan = loader.sampler.plan()
        return loader

    def predict_dataloader(self) -> Loader:
        return self.serve("predict")

    # Steps.

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Returns the logits, <float32>[B, C], of word-pieces, <int64>[B, T]."""
        mask = input_ids.ne(self.tokenizer.pad_token_id)
        # The backward pass of the fused attention is slow on a CPU in bf16.
        slow = self.training and torch.is_autocast_enabled("cpu")
        self.bert.set_attn_implementation("eager" if slow else "sdpa")
        return self.bert(input_ids, attention_mask=mask).logits.float()

    def step(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the losses of the reviews, [B], and their logits, [B, C]."""
        logits = self(batch["input_ids"])
        return F.cross_entropy(logits, batch["labels"], reduction="none"), logits

    def on_train_start(self) -> None:
        self.pieces, self.clock = 0, time.perf_counter()

    on_train_epoch_start = on_train_start  # not called where an epoch is resumed

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Dropout follows from (seed, step), so that a resumed run draws the same.
        numbers = self.hparams.seed, self.global_step, self.global_rank
        torch.manual_seed(hash(numbers) % 2**32)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        losses, logits = self.step(batch)
        loss, acc = losses.mean(), logits.argmax(-1).eq(batch["labels"]).float().mean()
        self.pieces += batch["input_ids"].ne(self.tokenizer.pad_token_id).sum()
        step, every = self.global_step + 1, self.trainer.log_every_n_steps
        if step % every == 0 or self.trainer.is_last_batch:
            finite = loss.isfinite()
            expect(finite, f"the loss of step {step} is {loss:.0f}: try a lower --lr")
            speed = self.pieces / (time.perf_counter() - self.clock)
            self.log("speed", speed * self.trainer.world_size, prog_bar=True)
        self.log_dict({"train_loss": loss, "train_acc": acc}, prog_bar=True)
        self.log("lr", self.optimizers().param_groups[0]["lr"])
        return loss

    def evaluate(self, stage: str, batch: Batch) -> torch.Tensor:
        """Adds a batch to the stage's metrics; returns its probabilities, [B, C]."""
        losses, logits = self.step(batch)
        probabilities = logits.softmax(-1)
        self.mean_loss[stage].update(losses)
        self.scores[stage].update(probabilities, batch["labels"])
        self.log(f"{stage}_loss", self.mean_loss[stage], prog_bar=True)
        for name, score in self.scores[stage].items():
            self.log(name, score, prog_bar=name == "val_acc")
        return probabilities

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        rows = torch.tensor(self.test_plan[batch_idx], device=self.device)
        scored = [rows, batch["labels"], self.evaluate("test", batch)]
        self.tested.update(torch.column_stack(scored))

    def on_test_epoch_end(self) -> None:
        self.predictions = self.tested.compute().cpu()  # of all processes

    def predict_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return self(batch["input_ids"]).softmax(-1)

    def on_train_epoch_end(self) -> None:
        metrics = self.trainer.callback_metrics
        # No bar without a terminal; no metrics where a resumed run skips validation.
        if not sys.stdout.isatty() and "val_acc" in metrics:
            names = ("train_loss", "train_acc", "val_loss", "val_acc")
            figures = "  ".join(f"{name} {metrics[name]:.4f}" for name in names)
            speed = f"speed {metrics['speed']:,.0f}"
            say(f"Epoch {self.current_epoch}   {figures}  {speed}")

    # Optimiser.

    def configure_optimizers(self) -> Any:
        hp, parameters = self.hparams, [*self.parameters()]
        if hp.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=hp.lr, momentum=hp.momentum)
        matrices = {"params": [p for p in parameters if p.ndim > 1]}
        vectors = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
        own = {"betas": (hp.momentum, 0.999), "weight_decay": hp.weight_decay}
        optimizer = torch.optim.AdamW([matrices, vectors], hp.lr, fused=True, **own)
        steps = self.trainer.estimated_stepping_batches
        schedule = transformers.get_linear_schedule_with_warmup(
            optimizer, round(hp.warmup * steps), steps
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Lightning itself refuses to clip for a fused optimiser in mixed precision.
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        metrics = self.trainer.callback_metrics.items()
        checkpoint["val"] = {k: v.item() for k, v in metrics if k.startswith("val_")}

    def export(self, folder: pathlib.Path) -> None:
        """Saves model and tokenizer for `transformers.pipeline`, to cut as trained."""
        length, truncation = self.hparams.seq_length, self.hparams.truncation
        self.bert.config.update({"seq_length": length, "truncation": truncation})
        self.bert.save_pretrained(folder)
        # Loaded as a BertTokenizer it would no longer drop `<br />` tags.
        self.tokenizer.__class__ = transformers.PreTrainedTokenizerFast
        self.tokenizer.init_kwargs["truncation_side"] = None  # else it is not saved
        self.tokenizer.model_max_length = length
        self.tokenizer.truncation_side = "left" if truncation == "tail" else "right"
        self.tokenizer.save_pretrained(folder)


def wilson(share: float, n: int, z: float = 1.96) -> list[float]:
    """Returns the 95 % score interval of a share of `n` [4]."""
    middle, root = share + z * z / (2 * n), share * (1 - share) / n + (z / (2 * n)) ** 2
    return [(middle + sign * z * math.sqrt(root)) / (1 + z * z / n) for sign in (-1, 1)]


class WholeCheckpointIO(pl.plugins.TorchCheckpointIO):
    """Writes beside the earlier checkpoint and renames, so that one is always whole.

    Lightning's own writes to /tmp, and copies from there if that is another disk.
    """

    def save_checkpoint(self, checkpoint: dict, path: str, *_: Any, **__: Any) -> None:
        partial = pathlib.Path(f"{path}.partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


class LastCheckpoint(pl.callbacks.Checkpoint):
    """Writes `last.ckpt` every ten minutes, after each validation, and on a signal.

    Ctrl-C and SIGTERM end the run once the step, or the validation, is done and saved.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path, self.signum, self.saved = str(path), 0, time.monotonic()

    def on_train_start(self, *_: Any) -> None:
        on_signals(lambda signum, _: setattr(self, "signum", signum))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        # An epoch saved at its last step would be resumed without its validation.
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self.save(trainer, time.monotonic() - self.saved > SAVE_EVERY)

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer, True)

    def save(self, trainer: pl.Trainer, due: bool) -> None:
        """Saves if one of the processes is due or has a signal, which ends them all."""
        one = functools.partial(trainer.strategy.reduce_boolean_decision, all=False)
        if one(due or self.signum > 0):
            trainer.save_checkpoint(self.path)
            self.saved = time.monotonic()
            if one(self.signum > 0):
                saved = f"step {trainer.global_step} is done and saved in {self.path}"
                stop(self.signum or signal.SIGTERM, saved=saved)

    def on_test_start(self, *_: Any) -> None:
        saved = f"all steps are done and saved in {self.path}"
        on_signals(functools.partial(stop, saved=saved))


def check_processes(reviews: int) -> None:
    """Refuses more processes than reviews, or others than the flags say."""
    wanted = FLAGS.devices * FLAGS.num_nodes
    found = os.environ.get("WORLD_SIZE", wanted)  # of torchrun, or of Lightning
    other = f"{found} processes started, --devices times --num_nodes is {wanted}"
    expect(int(found) == wanted, other)
    few = f"{wanted} processes, the smallest sample has {reviews} reviews"
    expect(wanted <= reviews, f"{few}: lower --devices")


def check_logdir(run: pathlib.Path) -> None:
    """Refuses a log folder that cannot be written, or holds what no run has left."""
    logdir, link = run.parent, run.is_symlink()
    old = pathlib.Path(f"{os.path.abspath(logdir)}.old")
    for place in (logdir, old) if os.path.lexists(run) else (logdir,):
        above = (place, *place.absolute().parents)
        above = next(path for path in above if os.path.lexists(path))
        writable = above.is_dir() and os.access(above, os.W_OK | os.X_OK)
        found = f"--logdir={logdir}: expected a writable folder, found {above}"
        expect(writable, found)
    expect(link or not run.is_file(), f"--logdir={logdir}: {run} is a file, move it")
    for path in [] if link else [*run.glob("*"), *run.glob("version_0/*")]:
        ours = re.fullmatch(OURS, path.relative_to(run).as_posix())
        expect(ours, f"--logdir={logdir}: no run has left {path}, move it")


def clear(run: pathlib.Path) -> None:
    """Moves the earlier run to LOGDIR.old, under the time it was written."""
    if FLAGS.debug:
        sh.rm("-rf", "--", run)
    elif os.path.lexists(run):
        files = [run] if run.is_symlink() else [run, *run.glob("version_0/*")]
        written = max(path.lstat().st_mtime for path in files)
        stamp = datetime.datetime.fromtimestamp(written).strftime("%Y-%m-%d_%H-%M-%S")
        old = pathlib.Path(f"{os.path.abspath(run.parent)}.old", stamp)
        while os.path.lexists(old):
            old = old.with_name(f"{old.name}+")
        sh.mkdir("-p", "--", old.parent)
        sh.mv("--", run, old)


def check_resume(path: pathlib.Path, settings: dict) -> int:
    """Returns the step of a checkpoint; refuses a broken one, or another run's."""
    finished = (path.parents[1] / "results.json").exists()
    expect(not finished, "--resume: the run is finished; leave it out to start anew")
    expect(path.exists(), f"--resume: nothing to resume, found no {path}")
    try:
        checkpoint = torch.load(path, "cpu", mmap=True, weights_only=True)
        stored, step = dict(checkpoint["hyper_parameters"]), checkpoint["global_step"]
        checkpoint["optimizer_states"]
    except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, TypeError):
        expect(False, f"--resume: {path} is no whole checkpoint of a run; start anew")
    for name, value in settings.items():
        was = stored.get(name)
        expect(was == value, f"--resume: the run has --{name}={was}, not {value}")
    for state in checkpoint["callbacks"].values():  # Lightning would forget the best
        home, here = state.get("dirpath", ""), os.path.abspath(path.parent)
        expect(here == home, f"--resume: the run was moved, move it back to {home}")
    return step


def commas(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def describe(module: IMDBSentimentClassifier, trainer: pl.Trainer) -> None:
    """Says what is trained, on what, and where."""
    hp, samples, width = module.hparams, module.samples, trainer.world_size
    say(f"Data      {hp.dataset}, {hp.percent} %, seed {hp.seed}")
    for part, counts in module.class_counts().items():
        say(f"  {part:8}{len(samples[part]):,} reviews: {commas(counts)}")
    cuts = [cut > 0 for sample in samples.values() for cut in sample["cut"][:]]
    share = f"{100 * sum(cuts) / len(cuts):.0f} % are longer than {hp.seq_length}"
    say(f"          {share} word-pieces and cut ({hp.truncation})")
    size = sum(p.numel() for p in module.parameters()) / 1e6
    where = f"{width} x {trainer.strategy.root_device.type}, {hp.precision}"
    say(f"Model     {hp.model}\n          {size:.1f} M parameters, {where}")
    batch, lengths = hp.batch_size * width, samples["train"]["length"]
    batches = LengthGroupedBatches(lengths, hp.batch_size, world_size=width)
    steps = 1 if FLAGS.debug else len(batches)
    say(f"Training  {trainer.max_epochs} epochs of {steps} steps of {batch} reviews")


def draw(module: IMDBSentimentClassifier, confusion: list[list[int]]) -> None:
    """Shows the test sample in TensorBoard: curves, tables and the worst errors."""
    log, hp, step = module.logger.experiment, module.hparams, module.global_step
    names, probabilities = hp.label_names, module.predictions[:, 2:]  # [N, C]
    rows, labels = module.predictions[:, :2].int().unbind(1)  # [N], [N]
    for i, name in enumerate(names):
        own = labels == i
        log.add_pr_curve(f"test_pr/{name}", own, probabilities[:, i], step)
        if own.any():
            tag = f"test_probability_of_true_class/{name}"
            log.add_histogram(tag, probabilities[own, i], step)
    lines = [["true / predicted", *names], ["---"] * (1 + len(names))]
    lines += [[name, *row] for name, row in zip(names, confusion, strict=True)]
    table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    log.add_text("test_confusion", table, step)
    settings = "\n".join(f"    {name}={value}" for name, value in hp.items())
    log.add_text("train_settings", settings, step)
    certainty, predicted = probabilities.max(-1)
    wrong = (predicted != labels).nonzero().flatten()
    surest = wrong[certainty[wrong].argsort(descending=True)][:20]
    head, decode = head_room(hp.seq_length, hp.truncation), module.tokenizer.decode
    worst = []
    for i in surest.tolist():
        review = module.samples["test"][int(rows[i])]
        pieces, cut = review["input_ids"][1:-1], review["cut"]
        mark = f" **[{cut} word-pieces cut]** " if cut else " "
        seen = mark.join([decode(pieces[:head]), decode(pieces[head:])])
        verdict = f"{names[labels[i]]} taken for {names[predicted[i]]}"
        worst.append(f"1. **{verdict} at {100 * certainty[i]:.1f} %:** {seen}")
    log.add_text("test_worst", "\n".join(worst), step)


def model_card(hp: dict, results: dict) -> str:
    """Returns the model's README.md, with the metadata that the Hub reads."""
    scores, local = results["metrics"], os.path.isdir(hp["dataset"])
    name = os.path.basename(os.path.abspath(hp["dataset"]))
    card = huggingface_hub.ModelCardData(
        library_name="transformers", pipeline_tag="text-classification",
        base_model=None if os.path.isdir(hp["model"]) else hp["model"],
        datasets=None if local else [hp["dataset"]], metrics=["accuracy"],
        model_name="BERT", eval_results=huggingface_hub.EvalResult(
            "text-classification", name if local else hp["dataset"], name, "accuracy",
            scores["test_acc"], dataset_split="test"),
    )  # fmt: skip
    recipe = "\n".join(f"- {name}: {value}" for name, value in results["flags"].items())
    low, high = scores["test_acc_interval"]
    end = "end" if hp["truncation"] == "tail" else "beginning"
    return f"""---
{card.to_yaml()}
---
# BERT that tells {json.dumps(hp["label_names"])}

Test accuracy {scores["test_acc"]:.4f}, 95 % interval {low:.4f} to {high:.4f}.
`pipeline("text-classification", model=FOLDER, truncation=True)` loads it and keeps the
{end} of a long text; training kept its {hp["truncation"]}.

## How it was trained
{recipe}

## Limits
It has seen the texts of one dataset and was not measured on others; its
expected calibration error on the test sample is {scores["test_ece"]:.4f}.
"""


@rank_zero_only
def finish(module: IMDBSentimentClassifier, folder: pathlib.Path, start: float) -> None:
    """Exports the best epoch, writes results and pictures, and says the result."""
    hp, trainer, names = module.hparams, module.trainer, module.hparams.label_names
    file = folder / "checkpoints" / "best.ckpt"
    best = torch.load(file, "cpu", mmap=True, weights_only=True)
    scores = {k: v.item() for k, v in trainer.callback_metrics.items()}
    metrics = best["val"] | {k: v for k, v in scores.items() if k.startswith("test_")}
    labels, probabilities = module.predictions[:, 1].int(), module.predictions[:, 2:]
    low, high = metrics["test_acc_interval"] = wilson(metrics["test_acc"], len(labels))
    confusion = torchmetrics.functional.confusion_matrix(
        probabilities, labels, task="multiclass", num_classes=len(names)
    ).tolist()
    libraries = (torch, pl, transformers, datasets)
    results = {
        "metrics": metrics,
        "best_epoch": best["epoch"],
        "confusion": confusion,
        "samples": module.class_counts(),
        "seconds": time.perf_counter() - start,
        "flags": {name: value for name, value in hp.items() if name != "label_names"},
        "versions": {library.__name__: library.__version__ for library in libraries},
    }
    module.export(folder / "model")
    (folder / "model" / "README.md").write_text(model_card(hp, results))
    draw(module, confusion)
    shown = {f"hparams/{k}": metrics[k] for k in ("test_acc", "val_acc", "val_loss")}
    module.logger.log_hyperparams(hp, shown, trainer.global_step)
    module.logger.save()
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    share, size = f"{100 * metrics['test_acc']:.2f} %", f"{len(labels):,} reviews"
    interval = f"95 % interval {100 * low:.2f} to {100 * high:.2f} %"
    say(f"\nTest      accuracy {share} of {size} ({interval})")
    say(f"          scored once, on epoch {best['epoch']}, the best by validation")
    for name, row in zip(names, confusion, strict=True):
        say(f"          {name} taken for: {commas(dict(zip(names, row, strict=True)))}")
    call = f'"text-classification", model="{folder / "model"}", truncation=True'
    say(f"Model     {folder / 'model'}")
    say(f"Look      tensorboard --logdir {folder.parents[1]}")
    say("Use       from transformers import pipeline")
    say(f'          pipeline({call})("A fine film.")')


def make_module(settings: dict, label_names: list[str]) -> IMDBSentimentClassifier:
    pl.seed_everything(settings["seed"], verbose=False)
    return IMDBSentimentClassifier(label_names=label_names, **settings)


def make_trainer(folder: pathlib.Path, precision: str, step: int | None) -> pl.Trainer:
    """Returns the Trainer of a run; `step` is where a resumed one goes on."""
    logger = pl.loggers.TensorBoardLogger(
        folder.parents[1], f"{folder.parent.name}/{folder.name}", version="",
        default_hp_metric=False, purge_step=step,
    )  # fmt: skip
    best = pl.callbacks.ModelCheckpoint(
        filename="best", monitor="val_acc", mode="max", save_weights_only=True,
        save_on_train_epoch_end=False,  # after validation, before `last.ckpt`
        enable_version_counter=False,
    )  # fmt: skip
    # As an argument the folder would be resolved, and a link in it be written through.
    best.dirpath = os.path.abspath(folder / "checkpoints")
    callbacks = [best, LastCheckpoint(folder / "checkpoints" / "last.ckpt")]
    # To log, the CPU waits for the GPU.
    every = 10 if torch.cuda.is_available() and not FLAGS.debug else 1  # steps
    terminal = sys.stdout.isatty()
    if terminal:
        callbacks.append(pl.callbacks.TQDMProgressBar(every, leave=True))
    parts = ("train", "val", "test") if FLAGS.debug else ()
    return pl.Trainer(
        max_epochs=1 if FLAGS.debug else FLAGS.epochs, precision=precision,
        devices=FLAGS.devices, num_nodes=FLAGS.num_nodes, strategy=FLAGS.strategy,
        use_distributed_sampler=False,  # `LengthGroupedBatches` shares out
        logger=logger, log_every_n_steps=every, callbacks=callbacks,
        plugins=[WholeCheckpointIO()], enable_progress_bar=terminal,
        enable_model_summary=False, num_sanity_val_steps=0,
        **{f"limit_{part}_batches": 1 for part in parts},
    )  # fmt: skip


def train(settings: dict) -> None:
    """Checks all that can be known to be wrong, then trains, tests and exports."""
    start, hub = time.perf_counter(), huggingface_hub.HfApi()
    logdir = pathlib.Path(FLAGS.logdir).expanduser()  # as Lightning does
    run = logdir / ("debug" if FLAGS.debug else "imdb")
    folder, last, step = run / "version_0", None, None
    check_logdir(run)
    if FLAGS.resume:
        last = folder / "checkpoints" / "last.ckpt"
        step = check_resume(last, settings)
    check_name("model", FLAGS.model, hub.model_info)
    check_name("dataset", FLAGS.dataset, hub.dataset_info)
    check_model(FLAGS.model, FLAGS.seq_length)
    samples = load_samples(FLAGS.dataset, FLAGS.percent, FLAGS.seed)
    check_processes(min(map(len, samples.values())))
    module = make_module(settings, samples["train"].features["label"].names)
    try:
        trainer = make_trainer(folder, settings["precision"], step)
    except pl.utilities.exceptions.MisconfigurationException as error:
        expect(False, one_line(error))
    if rank_zero_only.rank == 0:
        module.setup("fit")
        describe(module, trainer)
        if not FLAGS.resume:
            clear(run)
    try:
        trainer.fit(module, ckpt_path=last, weights_only=True)
        best = folder / "checkpoints" / "best.ckpt"
        trainer.test(module, ckpt_path=best, weights_only=True, verbose=False)
        finish(module, folder, start)
    except torch.OutOfMemoryError:
        expect(False, "the GPU's memory is full: lower --batch_size or --seq_length")
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        # torch.save hides the system's error behind its own.
        full = os.strerror(errno.ENOSPC) in f"{error} {error.__context__}"
        expect(not full, f"no space left for {folder}: free some, go on with --resume")
        raise


def predict(settings: dict) -> None:
    """Writes the label and each class's probability of new reviews, as csv."""
    file, logdir = FLAGS.predict, os.path.expanduser(FLAGS.logdir)
    last = os.path.join(logdir, "imdb", "version_0", "model")
    model = FLAGS.model if FLAGS["model"].present else last
    expect(os.path.isdir(model), f"--predict: no model in {model}: name it by --model")
    config = check_model(model, 3)
    classifies = "BertForSequenceClassification" in (config.get("architectures") or [])
    expect(classifies, f"--predict: {model} has no trained classifier")
    kinds = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    kind = kinds.get(pathlib.Path(file).suffix.lower(), "text")
    try:
        if file == "-":
            reviews = Reviews.from_dict({"text": [s.rstrip("\n") for s in sys.stdin]})
        else:
            reviews = datasets.load_dataset(kind, data_files=file, split="train")
        reviews = reviews.select_columns("text")
    except UNREADABLE as error:
        expect(False, f"--predict={file}: expected reviews as text: {one_line(error)}")
    column = reviews.data.column("text")
    sound = not column.null_count and "string" in str(column.type)
    lacks = f"{column.null_count} of {len(reviews)} lack it, it is {column.type}"
    expect(sound, f"--predict={file}: expected text in every row, {lacks}")
    trained = {k: config.get(k, settings[k]) for k in ("seq_length", "truncation")}
    check_model(model, trained["seq_length"])
    labels = transformers.BertConfig(**config).id2label
    names = [labels[i] for i in sorted(labels)]
    module = make_module(settings | trained | {"model": model}, names)
    module.samples = {"predict": tokenise(reviews, module.tokenizer, *trained.values())}
    trainer = pl.Trainer(
        precision=settings["precision"], devices=1, enable_checkpointing=False,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    probabilities = torch.cat(trainer.predict(module))  # [N, C], in the order of plan
    order = torch.cat([*map(torch.tensor, trainer.predict_dataloaders.sampler.plan())])
    table = pandas.DataFrame(probabilities[order.argsort()], columns=names)
    table.insert(0, "label", table.idxmax(1), allow_duplicates=True)
    table.to_csv(sys.stdout, index=False, float_format="%.6f")


def quieten() -> None:
    """Silences what a newcomer need not read; `load_bert` checks what is loaded."""
    for logger in ("pytorch_lightning", "lightning_fabric", "httpx2", "sh"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it raises what it logs
    transformers.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    for decided in (
        ".*does not have many workers",  # see `serve`
        ".*Checkpoint directory .* exists and is not empty",  # it does when resuming
        ".*your dataloader is not resumable",  # it is: see `LengthGroupedBatches`
        ".*recommended to use `Trainer.devices=1",  # no review is tested twice
        ".*isinstance.treespec, LeafSpec",  # Lightning's own
    ):
        warnings.filterwarnings("ignore", decided)


def keep_freed_memory() -> None:
    """Has glibc keep what a step frees, and spares it the page faults."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # M_MMAP_THRESHOLD, in bytes; older ones take 32 MiB at most.
        libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, in bytes


def fastest_precision() -> str:
    """Returns bf16 where a GPU or an x86 CPU computes in it, else float32."""
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = torch.cpu.get_capabilities()
        bf16 = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return "bf16-mixed" if bf16 else "32-true"


def main(argv: list[str]) -> None:
    expect(not argv[1:], f"unexpected {argv[1:]}: flags are given as --name=value")
    quieten()
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    ours = {flag.name: flag.value for flag in FLAGS.get_key_flags_for_module(__name__)}
    settings = {name: v for name, v in ours.items() if name not in RUN_FLAGS}
    if FLAGS.precision == "auto":
        settings["precision"] = fastest_precision()
    on_signals(stop)
    (train if FLAGS.predict is None else predict)(settings)


if __name__ == "__main__":
    app.run(main)

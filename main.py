"""Fine-tunes BERT to tell positive from negative film reviews, or any labelled texts.

    python main.py --debug                     the whole way on one batch, in seconds
    python main.py --percent=50 --epochs=10    half of IMDB; the default is 5 %
    python main.py --dataset=FOLDER            own reviews: train.csv and test.csv (or
                                               tsv, jsonl, parquet) with text and label
    python main.py --resume                    go on with an interrupted run
    python main.py --predict=FILE              label new reviews with the last model
    tensorboard --logdir logs                  look at the run

Shapes: B reviews in a batch, N in a sample; T word-pieces of a batch's longest review,
with [CLS], [SEP] and padding to eights; H the width of the model; C classes.

[1] Devlin et al. 2019, BERT: https://arxiv.org/abs/1810.04805
[2] Sun et al. 2019, How to Fine-Tune BERT: https://arxiv.org/abs/1905.05583
[3] Loshchilov and Hutter 2019, AdamW: https://arxiv.org/abs/1711.05101
[4] Wilson 1927, the score interval: https://doi.org/10.2307/2276774
"""

import contextlib
import dataclasses
import errno
import functools
import glob
import hashlib
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
from typing import Any, NoReturn

if __name__ == "__main__":
    # Ctrl-C while the libraries load ends without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import datasets
import filelock
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
import yaml
from absl import app, flags
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch.nn.utils.rnn import pad_sequence
from transformers.models.bert import modeling_bert

Batch = dict[str, torch.Tensor]
Reviews = datasets.Dataset
Samples = datasets.DatasetDict  # train, val, test
FLAGS = flags.FLAGS
# Flags that do not belong to the experiment: a resumed run may have others.
RUN_FLAGS = ("debug", "predict", "resume", "logdir")
SAVE_EVERY = 600  # seconds after which the next step writes `last.ckpt`
LOG_EVERY = 10  # steps: to log, the host waits for the device
SAY_EVERY = 60  # seconds between two lines of progress, at least
SHOWN = 20  # classes that terminal and TensorBoard show, at most
READERS = {
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
UNREADABLE = (
    datasets.exceptions.DatasetsError,
    OSError,
    RuntimeError,
    StopIteration,
    ValueError,
    yaml.YAMLError,
)
TEXT = r"(large_)?string"  # Arrow's types
LABEL = TEXT + r"|u?int\d+"

# fmt: off
# Data
flags.DEFINE_string("dataset", "stanfordnlp/imdb",
    "Hub name, or folder with train.csv and test.csv of text and label.")
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
    "Csv, tsv, jsonl, parquet with text, or txt by line; - is stdin.")
flags.DEFINE_boolean("resume", False,
    "Go on with the run in LOGDIR, under its flags.")
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


def is_rate(value: float) -> bool:
    return 0 < value < 1  # refuses NaN too, which passes absl's bounds


def is_share(value: float) -> bool:
    return 0 <= value < 1


flags.register_validator("lr", is_rate, "must be between 0 and 1")
for name in ("momentum", "weight_decay", "warmup"):
    flags.register_validator(name, is_share, "must be at least 0, below 1")


# Refusals and lines on the terminal.


def refuse(why: str) -> NoReturn:
    """Ends the program with one line and exit status 1."""
    sys.exit(f"main.py: {why}")


@contextlib.contextmanager
def refusing(prefix: str, *errors: type[Exception]) -> Iterator[None]:
    """Turns these errors of a library into a refusal."""
    try:
        yield
    except errors as error:
        cause = error.__cause__ or error
        refuse(f"{prefix}: {' '.join(str(cause).split())[:300]}")


@rank_zero_only
def say(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:  # of `| head`: its reader has gone, the run goes on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


say_once = functools.cache(say)


# Data: from files or the Hub to samples, word-pieces and batches.


def check_name(flag: str, name: str, look_up: Callable) -> None:
    """Refuses what is neither a local folder nor, within seconds, found on the Hub."""
    if os.path.isdir(name):
        return
    if os.path.isfile(name):
        refuse(f"--{flag}={name}: no such folder: give the folder that holds it")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        refuse(f"--{flag}={name}: no such folder, and no Hub name, owner/name")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        look_up(name, timeout=5)
    except huggingface_hub.errors.RepositoryNotFoundError:
        refuse(f"--{flag}={name}: no such folder, and no such {flag} on the Hub")
    except huggingface_hub.errors.HTTPError as error:
        why = " ".join(str(error).split())
        refuse(
            f"--{flag}={name}: no such folder, and the Hub does not answer ({why}): "
            "give --dataset and --model local folders, or set HF_HUB_OFFLINE=1"
        )


def find_files(folder: str) -> dict[str, pathlib.Path]:
    """Returns the files `train.*` and `test.*` of a folder, and no neighbours."""
    files = {}
    for path in sorted(pathlib.Path(folder).iterdir()):
        part, _, ending = path.name.partition(".")
        if part not in ("train", "test") or f".{ending.lower()}" not in READERS:
            continue
        if part in files:
            names = [files[part].name, path.name]
            refuse(f"--dataset={folder}: expected one {part} file, found {names}")
        files[part] = path
    return files


def read_file(flag: str, path: pathlib.Path) -> Reviews:
    """Reads one file; its content names the cache, as times and names come again."""
    kind, options = READERS.get(path.suffix.lower(), ("text", {}))
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would ask the network
    with refusing(f"{flag}: expected reviews in {path}", *UNREADABLE):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        return datasets.load_dataset(
            kind,
            data_files=glob.escape(str(path)),
            split="train",
            cache_dir=os.path.join(datasets.config.HF_DATASETS_CACHE, content[:16]),
            **options,
        )


def select(flag: str, reviews: Reviews, **types: str) -> Reviews:
    """Returns these columns alone; refuses one that lacks, or lacks values."""
    found = reviews.column_names
    for column, type_ in types.items():
        # pandas calls a second column text text.1.
        if found.count(column) != 1 or f"{column}.1" in found:
            refuse(f"{flag}: expected one column {column}, found {found}")
        values = reviews.data.column(column)
        if values.null_count:
            lack = f"{values.null_count} of {len(reviews)} lack it"
            hint = "a csv's NA, None and null are taken for missing"
            refuse(f"{flag}: expected {column} in every row, {lack} ({hint})")
        if not re.fullmatch(type_, str(values.type)):
            kinds = "strings" if column == "text" else "strings or whole numbers"
            refuse(f"{flag}: expected {column} as {kinds}, found {values.type}")
    return reviews.select_columns([*types])


def name_labels(flag: str, split: Reviews) -> list[str]:
    """Returns the name of each review's label, without blanks around it."""
    labels = split["label"][:]
    kind = split.features["label"]
    if isinstance(kind, datasets.ClassLabel):
        if min(labels, default=0) < 0:
            refuse(f"{flag}: expected a label in every row, some have -1")
        return kind.int2str(labels)
    names = [str(label).strip() for label in labels]
    if {*names} != {str(label) for label in labels}:
        say_once("Data      labels that differ by blanks around them are one class")
    return names


def match_labels(flag: str, splits: Samples) -> Samples:
    """Makes `label` one and the same `ClassLabel` in both splits, matched by name."""
    names = {part: name_labels(f"{flag}: {part}", splits[part]) for part in splits}
    classes = splits["train"].features["label"]
    if not isinstance(classes, datasets.ClassLabel):
        in_order = sorted({*splits["train"]["label"]})  # 9 before 10
        unique = dict.fromkeys(str(label).strip() for label in in_order)
        classes = datasets.ClassLabel(names=[*unique])
    if len({*names["train"]}) < 2:
        found = sorted({*names["train"]})
        refuse(f"{flag}: expected two classes or more, train has only {found}")
    unknown = sorted({*names["test"]} - {*classes.names})
    if unknown:
        known = classes.names[:SHOWN]
        refuse(f"{flag}: expected labels of train's {known}, test has {unknown}")
    for part, split in splits.items():
        if split.features["label"] != classes:
            numbers = classes.str2int(names[part])
            texts = split.select_columns("text")
            splits[part] = texts.add_column("label", numbers, feature=classes)
    return splits


def load_splits(dataset: str) -> Samples:
    """Loads and checks train and test, of a folder's own files or of the Hub."""
    flag = f"--dataset={dataset}"
    is_folder = os.path.isdir(dataset)
    files = find_files(dataset) if is_folder else {}
    if files:
        found = {part: read_file(flag, path) for part, path in files.items()}
    elif is_folder and glob.escape(dataset) != dataset:
        refuse(f"{flag}: expected a train and a test file, or a name without *, ? or [")
    else:
        with refusing(f"{flag}: expected a train and a test file", *UNREADABLE):
            found = datasets.load_dataset(dataset)
    splits = Samples()
    for part in ("train", "test"):
        if part not in found:
            refuse(f"{flag}: expected the splits train and test, found {[*found]}")
        splits[part] = select(f"{flag}: {part}", found[part], text=TEXT, label=LABEL)
    return match_labels(flag, splits)


def stratified(reviews: Reviews, percent: int, seed: int) -> tuple[Reviews, Reviews]:
    """Draws a percentage of reviews, stratified by class; returns it and the rest."""
    size = round(len(reviews) * percent / 100)
    few = "too few reviews, give more of them or raise --percent"
    with refusing(f"{few}: cannot draw {size} of {len(reviews)}", ValueError):
        parts = reviews.train_test_split(
            train_size=size, seed=seed, stratify_by_column="label"
        )
    return parts["train"], parts["test"]


def load_samples(dataset: str, percent: int, seed: int) -> Samples:
    """Draws the samples train and test, and a tenth of train for validation."""
    splits = load_splits(dataset)
    if percent < 100:
        for part, split in splits.items():
            splits[part], _ = stratified(split, percent, seed)
    val, train = stratified(splits["train"], 10, seed)
    return Samples(train=train, val=val, test=splits["test"])


def count_leaks(samples: Samples) -> int:
    """Returns how many test reviews stand in train or val word for word."""
    known = {*samples["train"]["text"], *samples["val"]["text"]}
    return sum(text in known for text in samples["test"]["text"])


def fingerprint(samples: Samples) -> str:
    """Returns a hash of all texts and labels in order."""
    digest = hashlib.sha256()
    for sample in samples.values():
        rows = [sample["text"][:], sample["label"][:]]
        digest.update(json.dumps(rows).encode())
    return digest.hexdigest()


def tokenise(samples: Any, tokenizer: Any, seq_length: int, truncation: str) -> Any:
    """Turns texts into word-pieces, at most `seq_length`; cached on disk by `datasets`.

    Returns:
        `samples` with the columns `row` (number of the review), `input_ids`, `length`,
        and `cut` (word-pieces cut away) instead of `text`.
    """
    room = seq_length - 2  # [CLS] and [SEP]
    head = {"head": room, "tail": 0, "head_tail": room // 4}[truncation]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id

    # Its variables name the cache: `self` or FLAGS among them, it is not found again.
    def encode(batch: dict[str, list], rows: list[int]) -> dict[str, list]:
        pieces = tokenizer(batch["text"], add_special_tokens=False, verbose=False)
        cuts = [max(0, len(review) - room) for review in pieces["input_ids"]]
        input_ids = [
            [cls, *review[:head], *review[head + cut :], sep]
            for review, cut in zip(pieces["input_ids"], cuts, strict=True)
        ]
        lengths = [len(review) for review in input_ids]
        return {"row": rows, "input_ids": input_ids, "length": lengths, "cut": cuts}

    return samples.map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns="text",
        desc="Tokenising",
    )


@dataclasses.dataclass(eq=False)
class LengthGroupedBatches(torch.utils.data.Sampler):
    """Draws batches of reviews of like length, each review once, the longest first.

    Two of them lead, as the first step has no optimiser's state yet: so the first
    steps hold about as much memory as any that follows.

    The plan follows from (seed, epoch) alone, so a resumed epoch makes it again and
    skips what is done: that makes resuming exact. Each process takes every
    `world_size`-th batch of it; sizes differ by one review at most.
    """

    lengths: torch.Tensor  # <int64>[N] word-pieces of each review
    batch_size: int  # reviews, at most; batches of one may take two
    rank: int = 0  # this process, of `world_size`
    world_size: int = 1
    seed: int | None = None  # shuffles batches, and like lengths among them; or neither
    progress: Any = None  # Lightning's count of the epoch's batches, `ready` of them
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        size = len(self.lengths)
        batches = math.ceil(size / (self.batch_size * self.world_size))
        # The latter where batches of one would leave a process without its last.
        return min(batches, size // self.world_size)

    def plan(self) -> list[list[int]]:
        """Returns this process's batches of the epoch, as rows of the sample."""
        lengths = self.lengths.double()
        order = torch.arange(len(self))
        if self.seed is not None:
            # Unlike a string's, the hash of integers is the same in every process.
            mixed = hash((self.seed, self.epoch)) % 2**32
            generator = torch.Generator().manual_seed(mixed)
            # A jitter of 1 % makes new batches every epoch, for little padding.
            jitter = torch.rand(len(lengths), generator=generator, dtype=torch.double)
            lengths = lengths * (1 + jitter / 100)
            shuffled = torch.randperm(max(0, len(self) - 2), generator=generator)
            order[2:] = 2 + shuffled
        rows = lengths.argsort(descending=True, stable=True)
        batches = rows.tensor_split(len(self) * self.world_size)
        return [batches[self.world_size * i + self.rank].tolist() for i in order]

    def __iter__(self) -> Iterator[list[int]]:
        # A generator on purpose: Lightning makes the iterator first and restores its
        # counters afterwards, and nothing below runs before the first batch is asked.
        done = self.progress.current.ready if self.progress else 0
        yield from self.plan()[done:]


# Model.


def check_config(model: str, seq_length: int) -> dict:
    """Returns the config of a BERT that takes `seq_length`; refuses anything else."""
    with refusing(f"--model={model}: expected a config.json", OSError):
        config, _ = transformers.PretrainedConfig.get_config_dict(model)
    kind = config.get("model_type")
    if kind != "bert":
        refuse(f"--model={model}: expected a BERT's config.json, found {kind}'s")
    if config.get("is_decoder") or config.get("add_cross_attention"):
        refuse(f"--model={model}: expected an encoder, found a decoder")
    positions = config.get("position_embedding_type") or "absolute"
    if positions != "absolute":
        refuse(f"--model={model}: expected absolute positions, found {positions}")
    most = config.get("max_position_embeddings", 512)
    if seq_length > most:
        refuse(f"--seq_length={seq_length}: {model} takes {most} at most")
    return config


def load_tokenizer(model: str, config: dict) -> transformers.BertTokenizer:
    """Loads a tokenizer that drops `<br />` tags and reads "[SEP]" as plain text."""
    with refusing(f"--model={model}: expected a tokenizer", OSError, ValueError):
        tokenizer = transformers.BertTokenizer.from_pretrained(
            model, split_special_tokens=True
        )
    # With its files missing, transformers makes one that knows special tokens only.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        refuse(f"--model={model}: expected a tokenizer, found no vocabulary")
    pad = config.get("pad_token_id", 0)
    own = tokenizer.pad_token_id
    if own != pad:
        refuse(f"--model={model}: its pad_token_id is {pad}, its tokenizer's {own}")
    size = config.get("vocab_size", 30522)
    if len(tokenizer) > size:
        refuse(f"--model={model}: {len(tokenizer)} word-pieces, {size} embeddings")
    backend = tokenizer.backend_tokenizer
    tags = tokenizers.normalizers.Replace(tokenizers.Regex(r"<br\s*/?>"), " ")
    backend.normalizer = tokenizers.normalizers.Sequence([tags, backend.normalizer])
    return tokenizer


def load_bert(model: str, names: list[str], trained: bool) -> torch.nn.Module:
    """Loads float32 weights, ready to train, with a classifier of the named classes.

    Args:
        trained: Whether the classifier must be there; else one may start anew.
    """
    flag = f"--model={model}"
    broken = (OSError, safetensors.SafetensorError, pickle.UnpicklingError)
    with refusing(f"{flag}: expected sound safetensors", *broken):
        bert, info = modeling_bert.BertForSequenceClassification.from_pretrained(
            model,
            id2label=dict(enumerate(names)),
            label2id={name: number for number, name in enumerate(names)},
            problem_type="single_label_classification",
            dtype=torch.float32,
            attention_probs_dropout_prob=0.0,  # to draw it is slow on a CPU
            attn_implementation="sdpa",  # whatever its config names
            ignore_mismatched_sizes=True,  # of an earlier classifier
            use_safetensors=True,
            output_loading_info=True,
        )
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    new = sorted({*info["missing_keys"], *mismatched})
    may_be_new = () if trained else ("classifier.", "bert.pooler.")
    lost = [key for key in new if not key.startswith(may_be_new)]
    if lost:
        refuse(f"{flag}: {len(lost)} weights lack or misfit: {lost[:2]}")
    for key, weights in bert.named_parameters():
        if not weights.isfinite().all():
            refuse(f"{flag}: expected numbers as weights, found NaN or inf in {key}")
    if "bert.pooler.dense.weight" in new:
        say("Model     its checkpoint has no pooler: that starts from random weights")
    earlier = transformers.BertConfig.from_pretrained(model).id2label
    had_head = "classifier.weight" not in info["missing_keys"]
    if had_head and not trained and earlier != dict(enumerate(names)):
        say(f"Model     its classes are others: a new classifier of {names[:SHOWN]}")
        torch.nn.init.normal_(bert.classifier.weight, std=bert.config.initializer_range)
        torch.nn.init.zeros_(bert.classifier.bias)
    return bert.train()  # it comes in eval mode, with dropout off


# Faster on a CPU. Without this section, and the line that calls `speed_up`, the same
# model trains. The gains are those of training steps with MiniLM at 256 in bf16, on two
# cores with AMX: medians of five rounds in turn.


class Dropout(torch.nn.Dropout):
    """Draws 16 random bits an element, where PyTorch draws slowly: 1.16 times."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64)
        bits = bits.random_(-(2**63), None).view(torch.int16)[: x.numel()].view_as(x)
        kept = bits >= round(self.p * 2**16) - 2**15
        return x * (kept.to(x.dtype) / (1 - self.p))


class ClsLayer(modeling_bert.BertLayer):
    """The last layer for [CLS] alone, all that the classifier reads: 1.14 times."""

    def forward(
        self, hidden: torch.Tensor, mask: Any, *_: Any, **__: Any
    ) -> torch.Tensor:
        cls = hidden[:, :1]  # [B, 1, H] of [B, T, H]
        # It takes the queries of [CLS], the keys and values of all; same weights.
        cross_attend = modeling_bert.BertCrossAttention.forward
        context, _ = cross_attend(self.attention.self, cls, hidden, mask)
        return self.feed_forward_chunk(self.attention.output(context, cls))


def cast_once(module: torch.nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
    """Casts the embeddings to bf16, so that no layer casts its input: 1.11 times."""
    return out.bfloat16() if torch.is_autocast_enabled("cpu") else out


class Recomputed(torch.autograd.Function):
    """Attention whose probabilities are computed again for the gradient, by review.

    Those of one review stay in the cache; those of a batch of 512 word-pieces would
    be a third of a step's memory.
    """

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, bias: Any) -> torch.Tensor:
        ctx.save_for_backward(q, k, v, bias)
        out = torch.empty_like(q)  # [B, heads, T, H / heads], as q, k and v
        for i in range(len(q)):
            p = (q[i] @ k[i].mT + bias[i]).softmax(-1)  # [heads, T, T]
            torch.matmul(p, v[i], out=out[i])
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        q, k, v, bias = ctx.saved_tensors
        dq = torch.empty_like(q)
        dk = torch.empty_like(k)
        dv = torch.empty_like(v)
        for i in range(len(q)):
            p = (q[i] @ k[i].mT + bias[i]).softmax(-1)
            dp = grad[i] @ v[i].mT
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            torch.matmul(ds, k[i], out=dq[i])
            torch.matmul(ds.mT, q[i], out=dk[i])
            torch.matmul(p.mT, grad[i], out=dv[i])
        return dq, dk, dv, None


def attend(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any
) -> tuple[torch.Tensor, None]:
    """Attention in bf16: of all that it computes, only probabilities are kept."""
    query = query * scaling
    bias = torch.where(mask, 0.0, -torch.inf).to(query.dtype)  # [B, 1, 1, T]
    if query.shape[2] > 256:
        context = Recomputed.apply(query, key, value, bias)
    else:
        scores = query @ key.mT  # [B, heads, T, T]
        scores += bias
        context = scores.softmax(-1) @ value
    return context.transpose(1, 2), None


def choose_attention(bert: torch.nn.Module, args: Any) -> None:
    """Trains without fused attention, whose gradient is slow in bf16: 1.33 times."""
    slow = bert.training and torch.is_autocast_enabled("cpu")
    attention = "plain" if slow else "sdpa"
    if bert.config._attn_implementation != attention:
        bert.set_attn_implementation(attention)


def speed_up(bert: torch.nn.Module) -> None:
    transformers.AttentionInterface.register("plain", attend)
    for name, module in [*bert.named_modules()]:
        if type(module) is torch.nn.Dropout:
            bert.set_submodule(name, Dropout(module.p))
    bert.bert.encoder.layer[-1].__class__ = ClsLayer
    bert.bert.embeddings.register_forward_hook(cast_once)
    bert.register_forward_pre_hook(choose_attention)


# The network, how it learns, and what is measured of it.


class IMDBSentimentClassifier(pl.LightningModule):
    """BERT with a classifier of [CLS], and its data, metrics and optimiser.

    Args:
        tokenizer: The model's.
        bert: A `BertForSequenceClassification` with one logit a class.
        label_names: Names of the classes, in the order of their numbers.
        settings: The flags by name, those of the Trainer too, to be noted.
    """

    def __init__(
        self,
        tokenizer: Any,
        bert: torch.nn.Module,
        *,
        label_names: list[str],
        **settings: Any,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["tokenizer", "bert"])
        self.tokenizer = tokenizer
        self.bert = bert
        self.samples = None
        # Of the epoch so far; they are saved, so that a resumed epoch has its mean.
        self.mean_loss = torchmetrics.MeanMetric(nan_strategy="disable")
        self.mean_acc = torchmetrics.MeanMetric(nan_strategy="disable")
        self.mean_loss.persistent(True)
        self.mean_acc.persistent(True)
        # Row, label and logits of each review: <float32>[N, 2 + C].
        self.scored = torchmetrics.CatMetric(nan_strategy="disable")

    # Data: one process a machine fills the cache, all read it in `setup`.

    def prepare_data(self) -> None:
        if self.samples is None and not self.trainer.predicting:
            self.encode(self.load())

    def setup(self, stage: str) -> None:
        if self.samples is None and not self.trainer.predicting:
            samples = self.load()
            self.leaks = count_leaks(samples)
            self.fingerprint = fingerprint(samples)
            self.samples = self.encode(samples)

    def load(self) -> Samples:
        hp = self.hparams
        return load_samples(hp.dataset, hp.percent, hp.seed)

    def encode(self, samples: Any) -> Any:
        hp = self.hparams
        return tokenise(samples, self.tokenizer, hp.seq_length, hp.truncation)

    def batches(self, sample: Reviews, **plan: Any) -> torch.utils.data.DataLoader:
        """Batches a sample; reading it costs less than a worker process would."""
        lengths = torch.tensor(sample["length"][:])
        return torch.utils.data.DataLoader(
            sample.remove_columns(["length", "cut"]),
            sampler=LengthGroupedBatches(lengths, self.hparams.batch_size, **plan),
            batch_size=None,  # the sampler draws whole batches
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
        )

    def collate(self, columns: dict[str, list]) -> Batch:
        """Pads to the longest review: <int64>[B, T] input_ids; <int64>[B] others."""
        reviews = [torch.tensor(review) for review in columns.pop("input_ids")]
        pad = self.tokenizer.pad_token_id
        input_ids = pad_sequence(reviews, batch_first=True, padding_value=pad)
        # To few lengths, as oneDNN keeps kernels, 20 MB and more, for each.
        limit = self.hparams.seq_length
        length = input_ids.shape[1]
        more = min(-length % max(8, limit // 32), limit - length)
        input_ids = F.pad(input_ids, (0, more), value=pad)
        others = {f"{name}s": torch.tensor(column) for name, column in columns.items()}
        return {"input_ids": input_ids, **others}

    def share(self) -> dict[str, int]:
        return {"rank": self.global_rank, "world_size": self.trainer.world_size}

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        plan = {"seed": self.hparams.seed, "progress": progress}
        return self.batches(self.samples["train"], **self.share(), **plan)

    def val_dataloader(self) -> torch.utils.data.DataLoader:
        return self.batches(self.samples["val"], **self.share())

    def test_dataloader(self) -> torch.utils.data.DataLoader:
        return self.batches(self.samples["test"], **self.share())

    # Steps.

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Returns the logits, <float32>[B, C], of word-pieces, <int64>[B, T]."""
        mask = input_ids.ne(self.tokenizer.pad_token_id)[:, None, None]  # [B, 1, 1, T]
        return self.bert(input_ids, attention_mask=mask).logits.float()

    def on_train_start(self) -> None:
        self.pieces = 0
        self.clock = time.perf_counter()

    on_train_epoch_start = on_train_start  # not called where an epoch is resumed

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Dropout follows from (seed, step), so that a resumed run draws the same.
        numbers = (self.hparams.seed, self.global_step, self.global_rank)
        torch.manual_seed(hash(numbers) % 2**32)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        logits = self(batch["input_ids"])
        loss = F.cross_entropy(logits, batch["labels"])
        right = logits.argmax(-1).eq(batch["labels"]).float()
        size = len(right)
        self.mean_loss.update(loss.detach(), size)
        self.mean_acc.update(right.mean(), size)
        self.pieces += batch["input_ids"].ne(self.tokenizer.pad_token_id).sum()
        # To read a number, the host waits for the device: not at every step.
        step = self.global_step + 1
        if step % self.trainer.log_every_n_steps == 0 or self.trainer.is_last_batch:
            self.log_step(step, loss, right.mean())
        return loss

    def log_step(self, step: int, loss: torch.Tensor, acc: torch.Tensor) -> None:
        if not loss.isfinite():
            refuse(f"the loss is {loss:.0f} at step {step}: try a lower --lr")
        seconds = time.perf_counter() - self.clock
        speed = self.pieces / seconds * self.trainer.world_size
        figures = {"train_loss": loss, "train_acc": acc, "speed": speed}
        self.log_dict(figures)
        self.log("lr", self.optimizers().param_groups[0]["lr"])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self(batch["input_ids"])
        columns = [batch["rows"], batch["labels"], logits]
        self.scored.update(torch.column_stack(columns))

    test_step = validation_step

    def log_scores(self, stage: str, logger: bool) -> torch.Tensor:
        """Logs the stage's metrics over reviews, of all processes; returns `scored`."""
        scored = self.scored.compute()
        self.scored.reset()
        labels = scored[:, 1].long()
        logits = scored[:, 2:]
        probabilities = logits.softmax(-1)
        kinds = torchmetrics.functional.classification
        each = (probabilities, labels, logits.shape[1])
        scores = {
            "loss": F.cross_entropy(logits, labels),
            "acc": kinds.multiclass_accuracy(*each, average="micro"),
            "f1": kinds.multiclass_f1_score(*each),
            "ece": kinds.multiclass_calibration_error(*each),
        }
        for name, value in scores.items():
            self.log(f"{stage}_{name}", value, logger=logger, sync_dist=True)
        return scored

    def on_validation_epoch_end(self) -> None:
        self.log_scores("val", logger=True)
        self.log("train_loss_epoch", self.mean_loss.compute(), sync_dist=True)
        self.log("train_acc_epoch", self.mean_acc.compute(), sync_dist=True)
        self.mean_loss.reset()
        self.mean_acc.reset()

    def on_test_epoch_end(self) -> None:
        # To TensorBoard they go with the hyper-parameters, at the end.
        self.predictions = self.log_scores("test", logger=False).cpu()

    def predict_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Returns rows and probabilities, <float32>[B, 1 + C]."""
        probabilities = self(batch["input_ids"]).softmax(-1)
        return torch.column_stack([batch["rows"], probabilities])

    # Optimiser.

    def configure_optimizers(self) -> Any:
        hp = self.hparams
        parameters = [*self.parameters()]
        if hp.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=hp.lr, momentum=hp.momentum)
        matrices = [p for p in parameters if p.ndim > 1]
        vectors = [p for p in parameters if p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
            lr=hp.lr,
            betas=(hp.momentum, 0.999),
            weight_decay=hp.weight_decay,
            fused=True,
        )
        steps = self.trainer.estimated_stepping_batches
        schedule = transformers.get_linear_schedule_with_warmup(
            optimizer, round(hp.warmup * steps), steps
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Lightning itself refuses to clip for a fused optimiser in mixed precision.
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)

    # Checkpoints and export.

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        figures = self.trainer.callback_metrics.items()
        checkpoint["val"] = {k: v.item() for k, v in figures if k.startswith("val_")}
        checkpoint["fingerprint"] = self.fingerprint

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        if checkpoint["fingerprint"] != self.fingerprint:
            refuse(f"--dataset={self.hparams.dataset}: not the reviews of this run")

    def export(self, folder: pathlib.Path) -> None:
        """Saves model and tokenizer for `transformers.pipeline`, to cut as trained."""
        length = self.hparams.seq_length
        truncation = self.hparams.truncation
        self.bert.config.update({"seq_length": length, "truncation": truncation})
        self.bert.save_pretrained(folder)
        # Loaded as a BertTokenizer it would no longer drop `<br />` tags.
        self.tokenizer.__class__ = transformers.PreTrainedTokenizerFast
        self.tokenizer.init_kwargs["truncation_side"] = None  # else it is not saved
        self.tokenizer.model_max_length = length
        self.tokenizer.truncation_side = "left" if truncation == "tail" else "right"
        self.tokenizer.save_pretrained(folder)


# Checkpoints and runs: saved whole, saved on signals, resumed, one at a time.


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


class BestCheckpoint(pl.callbacks.ModelCheckpoint):
    """Writes `best.ckpt`: weights of the epoch with the best `val_acc`.

    Of equals the later is taken: its rate has fallen further.
    """

    def __init__(self) -> None:
        super().__init__(
            filename="best",
            monitor="val_acc",
            mode="max",
            save_weights_only=True,
            save_on_train_epoch_end=False,  # after validation, before `last.ckpt`
            enable_version_counter=False,
        )

    def check_monitor_top_k(
        self, trainer: pl.Trainer, current: torch.Tensor | None = None
    ) -> bool:
        return self.best_model_score is None or bool(current >= self.best_model_score)

    def load_state_dict(self, state: dict) -> None:
        # Of a run that was moved, or is named otherwise, Lightning forgets the best.
        super().load_state_dict(state | {"dirpath": self.dirpath})


def stop(signum: int, *_: Any, how: str = "") -> None:
    """Ends the program on a signal, with the status that a shell gives it."""
    if rank_zero_only.rank == 0:
        print(f"\nStopped{how}", file=sys.stderr, flush=True)
    sys.exit(128 + signum)


def on_signals(handler: Callable) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, handler)


class LastCheckpoint(pl.callbacks.Checkpoint):
    """Writes `last.ckpt` every ten minutes, after each validation, and on a signal.

    A signal ends the run once the step, or the validation, is done and saved.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = str(path)
        self.signum = 0
        self.saved = time.monotonic()

    def note(self, signum: int, _: Any) -> None:
        self.signum = signum

    def on_train_start(self, *_: Any) -> None:
        on_signals(self.note)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        # An epoch saved at its last step would be resumed without its validation.
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self.save(trainer, time.monotonic() - self.saved > SAVE_EVERY)

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.save(trainer, True)

    def save(self, trainer: pl.Trainer, due: bool) -> None:
        """Saves if a process is due or has a signal, which ends them all."""
        any_process = functools.partial(
            trainer.strategy.reduce_boolean_decision, all=False
        )
        if any_process(due or self.signum > 0):
            trainer.save_checkpoint(self.path)
            self.saved = time.monotonic()
            if any_process(self.signum > 0):
                self.done = f"step {trainer.global_step} is done"
                self.stop(self.signum or signal.SIGTERM)

    def on_test_start(self, *_: Any) -> None:
        self.done = "all steps are done"
        on_signals(self.stop)

    def stop(self, signum: int, *_: Any) -> None:
        logdir = shlex.quote(str(pathlib.Path(self.path).parents[3]))
        stop(
            signum,
            how=f"; {self.done} and saved in {self.path}; "
            f"to go on from there: python main.py --resume --logdir={logdir}",
        )


@contextlib.contextmanager
def only_run(run: pathlib.Path) -> Iterator[None]:
    """Refuses a second run in the folder while the first one's process lives."""
    if rank_zero_only.rank > 0:
        yield
        return
    flag = f"--logdir={run.parent}"
    lock = filelock.FileLock(run.with_name(f"{run.name}.lock"), timeout=0)
    holder = pathlib.Path(lock.lock_file)
    with refusing(f"{flag}: expected a writable folder", OSError):
        holder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except filelock.Timeout:
            refuse(f"{flag}: process {holder.read_text()} is running in {run}")
        holder.write_text(f"{os.getpid()} on {os.uname().nodename}")
    try:
        yield
    finally:
        lock.release()
        holder.unlink(missing_ok=True)


def clear(run: pathlib.Path, debug: bool) -> None:
    """Moves the earlier run to LOGDIR.old, under the time of now; drops a debug run."""
    if rank_zero_only.rank > 0 or not os.path.lexists(run):
        return
    with refusing(f"--logdir={run.parent}: cannot move {run}", sh.ErrorReturnCode):
        if debug:
            sh.rm("-rf", "--", run if run.is_symlink() else run / "version_0")
        else:
            old = pathlib.Path(f"{os.path.abspath(run.parent)}.old")
            sh.mkdir("-p", "--", old)
            sh.mv("--", run, old / time.strftime("%Y-%m-%d_%H-%M-%S"))


def check_resume(checkpoints: pathlib.Path, given: dict) -> tuple[dict, int]:
    """Returns the flags and the step of a checkpoint that a run can go on from."""
    last = checkpoints / "last.ckpt"
    if (checkpoints.parent / "results.json").exists():
        refuse("--resume: the run is finished; leave it out to start anew")
    if not last.exists():
        refuse(f"--resume: nothing to resume, found no {last}")
    broken = (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, TypeError)
    with refusing(f"--resume: {last} is no whole checkpoint of a run", *broken):
        checkpoint = {**torch.load(last, "cpu", mmap=True, weights_only=True)}
        stored = dict(checkpoint["hyper_parameters"])
        step = checkpoint["global_step"]
        scored = checkpoint["val"]  # unless it was saved in the first epoch
        checkpoint["optimizer_states"], checkpoint["fingerprint"], stored["model"]
    if scored and not (checkpoints / "best.ckpt").exists():
        refuse(f"--resume: found no best.ckpt beside {last}")
    for name, value in given.items():
        if stored[name] != value:
            refuse(f"--resume: the run has --{name}={stored[name]}, not {value}")
    del stored["label_names"]
    return stored, step


def check_processes(wanted: int, num_nodes: int) -> None:
    """Refuses other processes than the flags say: they would wait for ever."""
    started = os.environ.get("WORLD_SIZE")  # of torchrun, or of Lightning
    if SLURMEnvironment.detect():
        started = os.environ["SLURM_NTASKS"]
    stray = [name for name in ("RANK", "LOCAL_RANK") if name in os.environ]
    if started is None and rank_zero_only.rank > 0:
        stray.append("SLURM_PROCID")
    if started is None and stray:
        refuse(f"{stray[0]} is set, but not WORLD_SIZE: unset it, or use torchrun")
    if started is None and num_nodes > 1:
        refuse(f"--num_nodes={num_nodes}: start each by torchrun or SLURM")
    if started not in (None, str(wanted)):
        refuse(f"WORLD_SIZE is {started}, but --devices times --num_nodes is {wanted}")


# Results: said at the start, on the way and at the end; drawn, written and computed.


def commas(counts: dict[str, int]) -> str:
    shown = [f"{name} {count:,}" for name, count in counts.items()][:SHOWN]
    return ", ".join(shown) + ", …" * (len(counts) > SHOWN)


def class_counts(module: IMDBSentimentClassifier) -> dict[str, dict[str, int]]:
    """Returns how many reviews of each class each sample has."""
    counts = {}
    for part, sample in module.samples.items():
        labels = torch.tensor(sample["label"][:])
        names = module.hparams.label_names
        sizes = labels.bincount(minlength=len(names)).tolist()
        counts[part] = dict(zip(names, sizes, strict=True))
    return counts


def describe(module: IMDBSentimentClassifier, trainer: pl.Trainer) -> None:
    """Says what is trained, on what, and where."""
    hp = module.hparams
    say(f"Data      {hp.dataset}, {hp.percent} %, seed {hp.seed}")
    for part, counts in class_counts(module).items():
        say(f"  {part:8}{sum(counts.values()):,} reviews: {commas(counts)}")
    say(f"          {module.leaks:,} of test stand in train word for word")
    cuts = [cut > 0 for sample in module.samples.values() for cut in sample["cut"][:]]
    share = 100 * sum(cuts) / len(cuts)
    limit = hp.seq_length
    how = hp.truncation
    say(f"          {share:.0f} % are longer than {limit} word-pieces and cut ({how})")
    size = sum(p.numel() for p in module.parameters()) / 1e6
    processes = trainer.world_size
    device = trainer.strategy.root_device.type
    say(f"Model     {hp.model}")
    say(f"          {size:.1f} M parameters, {processes} x {device}, {hp.precision}")
    steps = trainer.num_training_batches
    batch = hp.batch_size * processes
    say(f"Training  {trainer.max_epochs} epochs of {steps:,} steps of {batch} reviews")


class Terminal(pl.callbacks.Callback):
    """Says what a run does, and where there are no bars, how far it is."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        describe(module, trainer)
        curves = {
            "loss": ["Multiline", ["train_loss", "val_loss"]],
            "accuracy": ["Multiline", ["train_acc", "val_acc"]],
        }
        trainer.logger.experiment.add_custom_scalars({"Learning curves": curves})
        self.begin()

    def begin(self, *_: Any) -> None:
        self.began = time.monotonic()
        self.said = self.began
        self.steps = 0  # since then

    on_train_epoch_start = begin  # not called where an epoch is resumed
    on_test_start = begin

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        steps = trainer.num_training_batches
        self.tell(trainer, f"Epoch {trainer.current_epoch}", args[3] + 1, steps)

    def on_test_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.tell(trainer, "Test   ", args[3] + 1, trainer.num_test_batches[0])

    def tell(self, trainer: pl.Trainer, name: str, done: int, steps: int) -> None:
        """Says a line each tenth of the way, or each minute if that is rarer."""
        now = time.monotonic()
        self.steps += 1
        is_tenth = done % math.ceil(steps / 10) == 0
        if sys.stdout.isatty() or not is_tenth or now - self.said < SAY_EVERY:
            return
        self.said = now
        minutes = (now - self.began) / self.steps * (steps - done) / 60
        line = f"{name}   step {done:,} of {steps:,}"
        figures = trainer.callback_metrics
        if name.startswith("Epoch") and "train_loss" in figures:
            line += f"  train_loss {figures['train_loss']:.4f}"
            line += f"  speed {figures['speed']:,.0f}"
        say(f"{line}  {minutes:.0f} min left")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        figures = trainer.callback_metrics
        # There are none where a resumed run skips validation.
        if sys.stdout.isatty() or "val_acc" not in figures:
            return
        line = ""
        for name in ("train_loss", "train_acc", "val_loss", "val_acc"):
            value = figures.get(f"{name}_epoch", figures[name])
            line += f"  {name} {value:.4f}"
        line += f"  speed {figures['speed']:,.0f}"
        say(f"Epoch {trainer.current_epoch} {line}")


class ProgressBar(pl.callbacks.TQDMProgressBar):
    def get_metrics(self, trainer: pl.Trainer, *_: Any) -> dict:
        # Asked when the bar is drawn; `prog_bar=True` would wait at every step.
        figures = trainer.callback_metrics
        names = ("train_loss", "train_acc", "speed", "val_loss", "val_acc")
        return {name: figures[name].item() for name in names if name in figures}

    def on_train_epoch_start(self, *args: Any) -> None:
        # Of the run's start there is a bar without a step, which would stay.
        self.train_progress_bar.leave = self.train_progress_bar.n > 0
        self.train_progress_bar.close()
        super().on_train_epoch_start(*args)


class TensorBoardLogger(pl.loggers.TensorBoardLogger):
    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        metrics.pop("epoch", None)  # Lightning's own, a card that says nothing
        super().log_metrics(metrics, step)


def wilson(share: float, n: int, z: float = 1.96) -> list[float]:
    """Returns the 95 % score interval of a share of `n` [4]."""
    middle = share + z * z / (2 * n)
    root = math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return [(middle + sign * z * root) / (1 + z * z / n) for sign in (-1, 1)]


def summarise(module: IMDBSentimentClassifier, best: dict, seconds: float) -> dict:
    """Returns all that a run reports, of the checkpoint of its best epoch."""
    labels = module.predictions[:, 1].long()  # [N]
    logits = module.predictions[:, 2:]  # [N, C]
    scores = {k: v.item() for k, v in module.trainer.callback_metrics.items()}
    metrics = best["val"] | {k: v for k, v in scores.items() if k.startswith("test_")}
    metrics["test_acc_interval"] = wilson(metrics["test_acc"], len(labels))
    counts = class_counts(module)
    commonest = labels.mode().values.item()
    confusion = torchmetrics.functional.classification.multiclass_confusion_matrix(
        logits, labels, logits.shape[1]
    )
    flags = {name: v for name, v in module.hparams.items() if name != "label_names"}
    return {
        "metrics": metrics,
        "baseline": {
            "label": module.hparams.label_names[commonest],
            "test_acc": labels.eq(commonest).double().mean().item(),
        },
        "leaks": module.leaks,
        "best_epoch": best["epoch"],
        "confusion": confusion.tolist() if len(confusion) <= SHOWN else None,
        "samples": counts,
        "seconds": seconds,
        "flags": flags,
        "versions": {
            library.__name__: library.__version__
            for library in (torch, pl, transformers, datasets)
        },
    }


def say_results(results: dict, folder: pathlib.Path) -> None:
    scores = results["metrics"]
    low, high = scores["test_acc_interval"]
    size = sum(results["samples"]["test"].values())
    accuracy = f"accuracy {100 * scores['test_acc']:.2f} % of {size:,} reviews"
    say(f"\nTest      {accuracy} (95 % interval {100 * low:.2f} to {100 * high:.2f} %)")
    epoch = results["best_epoch"]
    say(f"          scored once, on epoch {epoch}, the best by validation")
    baseline = results["baseline"]
    say(f"          always {baseline['label']}: {100 * baseline['test_acc']:.2f} %")
    say(f"          {results['leaks']:,} of them stand in train word for word")
    names = [*results["samples"]["test"]]
    for name, row in zip(names, results["confusion"] or [], strict=False):
        taken = commas(dict(zip(names, row, strict=True)))
        say(f"          {name} taken for: {taken}")
    model = folder / "model"
    call = f'"text-classification", model="{model}", truncation=True'
    say(f"Model     {model}")
    say(f"Look      tensorboard --logdir {folder.parents[1]}")
    say("Use       from transformers import pipeline")
    say(f'          pipeline({call})("A fine film.")')


def draw(module: IMDBSentimentClassifier, results: dict) -> None:
    """Shows the test sample in TensorBoard: curves and tables of its classes."""
    log = module.logger.experiment
    step = module.global_step
    names = module.hparams.label_names[:SHOWN]
    labels = module.predictions[:, 1].long()  # [N]
    probabilities = module.predictions[:, 2:].softmax(-1)  # [N, C]
    for number, name in enumerate(names):
        own = labels == number
        log.add_pr_curve(f"test_pr/{name}", own, probabilities[:, number], step)
        if own.any():
            true = probabilities[own, number]
            log.add_histogram(f"test_probability_of_true_class/{name}", true, step)
    lines = [["true / predicted", *names], ["---"] * (1 + len(names))]
    for name, row in zip(names, results["confusion"] or [], strict=False):
        lines.append([name, *row])
    table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    log.add_text("test_confusion", table, step)
    log.add_text("test_worst", worst_errors(module, labels, probabilities), step)


def worst_errors(
    module: IMDBSentimentClassifier, labels: torch.Tensor, probabilities: torch.Tensor
) -> str:
    """Returns the twenty errors of which the model is surest, as it saw the reviews.

    Args:
        labels: <int64>[N], in the order of `module.predictions`.
        probabilities: <float32>[N, C], likewise.
    """
    names = module.hparams.label_names
    rows = module.predictions[:, 0].long()
    certainty, predicted = probabilities.max(-1)
    wrong = (predicted != labels).nonzero().flatten()
    surest = wrong[certainty[wrong].argsort(descending=True)][:20]
    worst = []
    for i in surest.tolist():
        review = module.samples["test"][int(rows[i])]
        seen = module.tokenizer.decode(review["input_ids"][1:-1])
        verdict = f"{names[labels[i]]} taken for {names[predicted[i]]}"
        share = f"{100 * certainty[i]:.1f} %"
        cut = f" [{review['cut']} word-pieces cut]" if review["cut"] else ""
        worst.append(f"1. **{verdict} at {share}{cut}:** {seen}")
    return "\n".join(worst)


def model_card(results: dict) -> str:
    """Returns the model's README.md, with the metadata that the Hub reads."""
    scores = results["metrics"]
    recipe = results["flags"]
    is_local = os.path.isdir(recipe["dataset"])
    name = os.path.basename(os.path.abspath(recipe["dataset"]))
    dataset = name if is_local else recipe["dataset"]
    result = huggingface_hub.EvalResult(
        "text-classification", dataset, name, "accuracy", scores["test_acc"]
    )
    result.dataset_split = "test"
    card = huggingface_hub.ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        base_model=None if os.path.isdir(recipe["model"]) else recipe["model"],
        datasets=None if is_local else [dataset],
        metrics=["accuracy"],
        model_name="BERT",
        eval_results=result,
    )
    settings = "\n".join(f"- {name}: {value}" for name, value in recipe.items())
    low, high = scores["test_acc_interval"]
    end = "end" if recipe["truncation"] == "tail" else "beginning"
    return f"""---
{card.to_yaml()}
---
# BERT that tells {json.dumps([*results["samples"]["test"]])}

Test accuracy {scores["test_acc"]:.4f}, 95 % interval {low:.4f} to {high:.4f}.
`pipeline("text-classification", model=FOLDER, truncation=True)` loads it and keeps the
{end} of a long text; training kept its {recipe["truncation"]}.

## How it was trained
{settings}

## Limits
It has seen the texts of one dataset and was not measured on others; its
expected calibration error on the test sample is {scores["test_ece"]:.4f}.
"""


def finish(module: IMDBSentimentClassifier, folder: pathlib.Path, start: float) -> None:
    """Exports the best epoch, and writes, draws and says its results."""
    file = folder / "checkpoints" / "best.ckpt"
    best = torch.load(file, "cpu", mmap=True, weights_only=True)
    results = summarise(module, best, time.perf_counter() - start)
    module.export(folder / "model")
    (folder / "model" / "README.md").write_text(model_card(results), "utf-8")
    draw(module, results)
    names = ("test_acc", "val_acc", "test_loss", "test_f1", "test_ece")
    figures = {name: results["metrics"][name] for name in names}
    module.logger.log_hyperparams(module.hparams, figures, best["global_step"] - 1)
    module.logger.save()
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    say_results(results, folder)


# The story: check, make, fit, test, finish.


def make_module(
    settings: dict, names: list[str], trained: bool = False
) -> IMDBSentimentClassifier:
    pl.seed_everything(settings["seed"], verbose=False)
    config = check_config(settings["model"], settings["seq_length"])
    tokenizer = load_tokenizer(settings["model"], config)
    bert = load_bert(settings["model"], names, trained)
    speed_up(bert)
    return IMDBSentimentClassifier(tokenizer, bert, label_names=names, **settings)


def make_trainer(
    settings: dict, run: pathlib.Path, debug: bool, step: int | None
) -> pl.Trainer:
    """Returns the Trainer of a run; `step` is where a resumed one goes on."""
    logger = TensorBoardLogger(
        run.parent,
        name=run.name,
        version="version_0",
        default_hp_metric=False,
        purge_step=step,
    )
    every = 1 if debug else LOG_EVERY
    last = run / "version_0" / "checkpoints" / "last.ckpt"
    callbacks = [BestCheckpoint(), LastCheckpoint(last), Terminal()]
    if sys.stdout.isatty():
        callbacks.append(ProgressBar(every, leave=True))
    limits = ("limit_train_batches", "limit_val_batches", "limit_test_batches")
    return pl.Trainer(
        max_epochs=1 if debug else settings["epochs"],
        precision=settings["precision"],
        devices=settings["devices"],
        num_nodes=settings["num_nodes"],
        strategy=settings["strategy"],
        use_distributed_sampler=False,  # `LengthGroupedBatches` shares out
        logger=logger,
        log_every_n_steps=every,
        callbacks=callbacks,
        plugins=[WholeCheckpointIO()],
        enable_progress_bar=sys.stdout.isatty(),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **dict.fromkeys(limits, 1 if debug else None),
    )


def train(settings: dict, run: pathlib.Path, debug: bool, step: int | None) -> None:
    """Checks all that can be known to be wrong, then trains, tests and exports."""
    start = time.perf_counter()
    hub = huggingface_hub.HfApi()
    processes = settings["devices"] * settings["num_nodes"]
    check_processes(processes, settings["num_nodes"])
    check_name("model", settings["model"], hub.model_info)
    check_name("dataset", settings["dataset"], hub.dataset_info)
    for flag in ("model", "dataset"):
        path = pathlib.Path(settings[flag]).resolve()
        if step is None and path.is_relative_to(run.resolve()):
            refuse(f"--{flag}={settings[flag]}: {run} is to move, copy it elsewhere")
    check_config(settings["model"], settings["seq_length"])
    samples = load_samples(settings["dataset"], settings["percent"], settings["seed"])
    smallest = min(len(sample) for sample in samples.values())
    if processes > smallest:
        few = "reviews in the smallest sample: lower --devices"
        refuse(f"{processes} processes, but {smallest} {few}")
    module = make_module(settings, samples["train"].features["label"].names)
    with refusing("--devices", pl.utilities.exceptions.MisconfigurationException):
        trainer = make_trainer(settings, run, debug, step)
    folder = run / "version_0"
    last = folder / "checkpoints" / "last.ckpt"
    best = folder / "checkpoints" / "best.ckpt"
    with only_run(run), running(folder):
        if step is None:
            clear(run, debug)
        resumed = None if step is None else last
        trainer.fit(module, ckpt_path=resumed, weights_only=True)
        trainer.test(module, ckpt_path=best, weights_only=True, verbose=False)
        if trainer.is_global_zero:
            finish(module, folder, start)


@contextlib.contextmanager
def running(folder: pathlib.Path) -> Iterator[None]:
    """Says in one line when memory or disk are full."""
    try:
        yield
    except torch.OutOfMemoryError:
        refuse("the GPU's memory is full: lower --batch_size or --seq_length")
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        # torch.save hides the system's error behind its own.
        if os.strerror(errno.ENOSPC) not in f"{error} {error.__context__}":
            raise
        can_resume = (folder / "checkpoints" / "last.ckpt").exists()
        how = "go on with --resume" if can_resume else "start again"
        refuse(f"no space left for {folder}: free some, then {how}")


def read_texts(file: str) -> Reviews:
    """Reads the reviews to label: a file, or lines of stdin for -."""
    flag = f"--predict={file}"
    if file == "-":
        with refusing(f"{flag}: expected reviews by line", ValueError):
            lines = [line.rstrip("\n") for line in sys.stdin]
        reviews = Reviews.from_dict({"text": lines})
    else:
        path = pathlib.Path(file)
        if path.suffix.lower() not in (*READERS, ".txt", ""):
            kinds = ", ".join([*READERS, ".txt"])
            refuse(f"{flag}: expected one of {kinds}, found {path.suffix}")
        reviews = read_file(flag, path)
    return select(flag, reviews, text=TEXT)


def predict(settings: dict, file: str) -> None:
    """Writes the label and each class's probability of new reviews, as csv."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # of `| head`: ends without a word
    model = settings["model"]
    if not os.path.isdir(model):
        refuse(f"--predict: no model in {model}: name it by --model")
    config = check_config(model, seq_length=3)
    if "BertForSequenceClassification" not in (config.get("architectures") or []):
        refuse(f"--predict: {model} has no trained classifier")
    reviews = read_texts(file)
    for name in ("seq_length", "truncation"):
        settings[name] = config.get(name, settings[name])
    labels = transformers.BertConfig(**config).id2label
    names = [labels[number] for number in sorted(labels)]
    module = make_module(settings, names, trained=True)
    trainer = pl.Trainer(
        precision=settings["precision"],
        devices=1,
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = trainer.predict(module, module.batches(module.encode(reviews)))
    predictions = torch.cat(batches)
    in_order = predictions[predictions[:, 0].argsort(), 1:]
    table = pandas.DataFrame(in_order, columns=names)
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
        ".*does not have many workers",  # see `batches`
        ".*Checkpoint directory .* exists and is not empty",  # it does when resuming
        ".*your dataloader is not resumable",  # it is: see `LengthGroupedBatches`
        ".*recommended to use `Trainer.devices=1",  # no review is tested twice
        ".*smaller than the logging interval",  # the epoch's means are logged
        ".*isinstance.treespec, LeafSpec",  # Lightning's own
    ):
        warnings.filterwarnings("ignore", decided)


def fastest_precision() -> str:
    """Returns bf16 where a GPU or an x86 CPU computes in it, else float32."""
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = torch.cpu.get_capabilities()
        bf16 = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return "bf16-mixed" if bf16 else "32-true"


def main(argv: list[str]) -> None:
    """Reads the flags, and trains or predicts."""
    if argv[1:]:
        refuse(f"unexpected {argv[1:]}: flags are given as --name=value")
    if "://" in FLAGS.logdir:
        refuse(f"--logdir={FLAGS.logdir}: expected a folder of this machine")
    on_signals(stop)
    say_once.cache_clear()
    sys.stdout.reconfigure(errors="backslashreplace")  # of a name on an ascii terminal
    quieten()
    torch.set_float32_matmul_precision("high")
    ours = FLAGS.get_key_flags_for_module(__name__)
    settings = {f.name: f.value for f in ours if f.name not in RUN_FLAGS}
    if FLAGS.precision == "auto":
        settings["precision"] = fastest_precision()
    given = {k: v for k, v in settings.items() if not FLAGS[k].using_default_value}
    logdir = pathlib.Path(FLAGS.logdir).expanduser()  # as Lightning does
    run = logdir / ("debug" if FLAGS.debug else "imdb")
    step = None
    if FLAGS.predict is not None:
        last_model = str(logdir / "imdb" / "version_0" / "model")
        settings["model"] = given.get("model", last_model)
        predict(settings, FLAGS.predict)
        return
    if FLAGS.resume:
        settings, step = check_resume(run / "version_0" / "checkpoints", given)
    train(settings, run, FLAGS.debug, step)


if __name__ == "__main__":
    app.run(main)

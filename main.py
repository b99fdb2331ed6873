"""Fine-tunes BERT to tell good film reviews from bad, or any labelled texts.

    python main.py --debug                     one batch, all the way
    python main.py --percent=50 --epochs=10    half of IMDB, not 5 %
    python main.py --dataset=FOLDER            own train.csv and test.csv
    python main.py --resume                    go on where it stopped
    python main.py --predict=FILE              label new reviews
    tensorboard --logdir logs                  look at the run

A sample is what --percent draws of a split: train, val, test. Shapes: N reviews
in a sample, B in a batch, each of T word-pieces; H the model's width; C classes.

[1] Devlin et al. 2019, BERT: https://arxiv.org/abs/1810.04805
[2] Sun et al. 2019, How to Fine-Tune BERT: https://arxiv.org/abs/1905.05583
[3] Loshchilov and Hutter 2019, AdamW: https://arxiv.org/abs/1711.05101
[4] Wilson 1927, the score interval: https://doi.org/10.2307/2276774
[5] Breiman et al. 1984, Classification and Regression Trees: the rule of one
    standard error, section 3.4.3
"""

import contextlib
import ctypes
import dataclasses
import functools
import glob
import hashlib
import json
import logging
import math
import os
import pickle
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Ctrl-C while the libraries load ends without a word.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import datasets
import filelock
import pandas
import pytorch_lightning as pl
import safetensors
import sh
import tokenizers
import torch
import torch.nn.functional as F
import torchmetrics
import tqdm
import transformers
import yaml
from absl import app, flags
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional import classification
from transformers.integrations import sdpa_attention
from transformers.models.bert import modeling_bert

Batch = dict[str, Tensor]
Reviews = datasets.Dataset
Samples = datasets.DatasetDict  # train, val, test
FLAGS = flags.FLAGS
# Flags in which a resumed run may differ.
RUN_FLAGS = ("debug", "predict", "resume", "logdir")
SAVE_EVERY = 600  # seconds after which the next step writes `last.ckpt`
LOG_EVERY = 10  # steps; to read a number, the CPU waits for the GPU
SAY_EVERY = 60  # seconds between two lines of progress, at least
SHOWN = 20  # classes, and errors, shown at most
KINDS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
KINDS[".parquet"] = "parquet"
# What libraries raise of files that cannot be read or written.
UNSOUND = (OSError, pickle.UnpicklingError, safetensors.SafetensorError)
UNREADABLE = (
    datasets.exceptions.DatasetsError,
    OSError,
    RuntimeError,
    StopIteration,
    ValueError,
    yaml.YAMLError,
)

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
    "Hub name or folder of a BERT; to predict, folder of a trained one.")
# Optimisation
flags.DEFINE_integer("epochs", 3,
    "Passes over train; the one that validation chooses is tested.", 1)
flags.DEFINE_integer("batch_size", 16,
    "Reviews a step on each device; halve it when memory runs out.", 1)
flags.DEFINE_enum("optimizer", "adamw", ["adamw", "sgd"],
    "AdamW with warm-up and linear decay [3], or SGD at a constant rate.")
flags.DEFINE_float("lr", 5e-5,
    "Learning rate at its peak; [1] tried 2e-5 to 5e-5.")
flags.DEFINE_float("momentum", 0.9,
    "Share of past gradients kept: SGD's momentum, AdamW's first beta.")
flags.DEFINE_float("weight_decay", 0.01,
    "Decay of weight matrices, times the rate; SGD ignores it.")
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
    "auto is bf16 on GPUs and x86 CPUs that have it; 32-true may be TF32.")
flags.DEFINE_integer("devices", 1,
    "GPUs, or CPU processes, a machine; the global batch grows with them.", 1)
flags.DEFINE_integer("num_nodes", 1,
    "Machines with LOGDIR on a disk they share; each by SLURM or torchrun.", 1)
flags.DEFINE_enum("strategy", "auto", ["auto", "ddp"],
    "auto takes ddp for more than one device.")
# fmt: on


@flags.multi_flags_validator(
    ["lr", "momentum", "weight_decay", "warmup"],
    "each is at least 0 and below 1, lr above 0",
)
def are_shares(values: dict[str, float]) -> bool:
    # NaN, which passes absl's bounds, is refused too.
    return values["lr"] > 0 and all(0 <= value < 1 for value in values.values())


# Refusals, and lines on the terminal.


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
def say(head: str, text: str) -> None:
    """Prints a line, above the bars if there are any."""
    try:
        tqdm.tqdm.write(f"{head:10}{text}".rstrip(), file=sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:  # of `| head`: the run goes on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


say_once = functools.cache(say)


# Data: from files or the Hub to samples, word-pieces and batches.


def check_name(flag: str, name: str) -> None:
    """Refuses what is neither a folder nor a name for the Hub."""
    if os.path.isfile(name):
        refuse(f"--{flag}={name}: expected a folder, give the one that holds it")
    if not os.path.isdir(name) and not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        refuse(f"--{flag}={name}: expected a folder, or owner/name on the Hub")


def name_cache(*paths: Path) -> str:
    """Names a cache by content, as files may change under their name and time."""
    content = hashlib.sha256()
    for path in paths:
        content.update(path.read_bytes())
    return os.path.join(
        datasets.config.HF_DATASETS_CACHE, content.hexdigest()[:16]
    )


def read_file(flag: str, path: Path) -> Reviews:
    kind = KINDS.get(path.suffix.lower(), "text")
    # Else pandas takes the first cell of rows longer than the header for an index.
    options = {"index_col": False} if kind == "csv" else {}
    if path.suffix.lower() == ".tsv":
        options["sep"] = "\t"
    with refusing(f"{flag}: expected reviews in {path}", *UNREADABLE):
        return datasets.load_dataset(
            kind,
            data_files=glob.escape(str(path)),
            split="train",
            cache_dir=name_cache(path),
            **options,
        )


def check_columns(flag: str, reviews: Reviews, columns: dict) -> Reviews:
    """Returns these columns alone, each there and of its type."""
    if not len(reviews):
        refuse(f"{flag}: expected reviews, found none")
    found = reviews.column_names
    for column, expected in columns.items():
        # pandas renames a second column `text` to `text.1`.
        if column not in found or f"{column}.1" in found:
            refuse(f"{flag}: expected one column {column}, found {found}")
        values = reviews[column][:]
        if None in values:
            lack = f"{values.count(None)} of {len(values)} rows lack {column}"
            refuse(f"{flag}: {lack} (a csv's NA, None and null count as missing)")
        kinds = sorted({type(value).__name__ for value in values})
        if not {*kinds} <= expected or len(kinds) > 1:
            refuse(f"{flag}: expected {column} of {expected}, found {kinds}")
    return reviews.select_columns([*columns])


def match_labels(flag: str, splits: Samples) -> Samples:
    """Makes `label` the same `ClassLabel` in both splits, matched by name."""
    names = {}
    for part, split in splits.items():
        labels = split["label"][:]
        classes = split.features["label"]
        if isinstance(classes, datasets.ClassLabel):
            with refusing(f"{flag}: {part}", ValueError):  # of -1, no label
                labels = classes.int2str(labels)
        names[part] = [str(label).strip() for label in labels]
        if "" in names[part]:
            refuse(f"{flag}: {part}: a label is blank")
        if len({*names[part]}) < len({*labels}):
            say_once("Data", "labels that differ by blanks alone are one class")
    # In the order of train's numbers or words: 9 before 10.
    numbers = splits["train"]["label"][:]
    pairs = sorted({*zip(numbers, names["train"], strict=True)})
    classes = datasets.ClassLabel(
        names=[*dict.fromkeys(name for _, name in pairs)]
    )
    if classes.num_classes < 2:
        refuse(f"{flag}: expected two classes or more, found {classes.names}")
    unknown = sorted({*names["test"]} - {*classes.names})
    if unknown:
        known = classes.names[:SHOWN]
        refuse(f"{flag}: train's labels are {known}, test has {unknown}")
    for part, split in splits.items():
        numbers = classes.str2int(names[part])
        texts = split.select_columns("text")
        splits[part] = texts.add_column("label", numbers, feature=classes)
    return splits


def load_splits(dataset: str) -> Samples:
    """Loads a folder's train.* and test.*, no other file; or the Hub's splits."""
    flag = "--dataset=" + dataset
    files = [
        path
        for path in sorted(Path(dataset).glob("*"))
        if path.stem in ("train", "test") and path.suffix.lower() in KINDS
    ]
    found = {path.stem: read_file(flag, path) for path in files}
    if len(found) < len(files):
        refuse(f"{flag}: expected one file each, found {[p.name for p in files]}")
    if not files:
        if glob.escape(dataset) != dataset:
            refuse(f"{flag}: expected train.csv and test.csv, or no *?[")
        with refusing(f"{flag}: expected a train and a test file", *UNREADABLE):
            everything = sorted(Path(dataset).rglob("*"))
            inside = [path for path in everything if path.suffix.lower() in KINDS]
            cache = name_cache(*inside) if inside else None
            found = datasets.load_dataset(dataset, cache_dir=cache)
    splits = Samples()
    columns = {"text": {"str"}, "label": {"str", "int"}}
    for part in ("train", "test"):
        if part not in found:
            refuse(f"{flag}: expected train and test, found {[*found]}")
        splits[part] = check_columns(f"{flag}: {part}", found[part], columns)
    return match_labels(flag, splits)


def stratified(
    reviews: Reviews, percent: int, seed: int
) -> tuple[Reviews, Reviews]:
    """Returns a drawn percentage of each class, and the rest."""
    size = round(len(reviews) * percent / 100)
    with refusing(f"too few reviews: {size} of {len(reviews)}", ValueError):
        parts = reviews.train_test_split(
            train_size=size, seed=seed, stratify_by_column="label"
        )
    return parts["train"], parts["test"]


def load_samples(dataset: str, percent: int, seed: int, **_: Any) -> Samples:
    """Draws train and test, and a tenth of train for validation."""
    splits = load_splits(dataset)
    if percent < 100:
        for part, split in splits.items():
            splits[part], _ = stratified(split, percent, seed)
    val, train = stratified(splits["train"], 10, seed)
    return Samples(train=train, val=val, test=splits["test"])


def tokenise(
    samples: Any, tokenizer: Any, seq_length: int, truncation: str, **_: Any
) -> Any:
    """Turns texts into word-pieces, at most `seq_length`; cached by `datasets`.

    `row` numbers the reviews, `cut` counts the word-pieces cut away.
    """
    room = seq_length - 2  # [CLS] and [SEP]
    head = {"head": room, "tail": 0, "head_tail": room // 4}[truncation]
    cls = tokenizer.cls_token_id
    sep = tokenizer.sep_token_id

    # datasets caches by the variables used here: no `self`, no FLAGS.
    def encode(batch: dict[str, list], rows: list[int]) -> dict[str, list]:
        columns = {"row": rows, "input_ids": [], "length": [], "cut": []}
        encoded = tokenizer(
            batch["text"], add_special_tokens=False, verbose=False
        )
        for pieces in encoded["input_ids"]:
            cut = max(0, len(pieces) - room)
            review = [cls, *pieces[:head], *pieces[head + cut :], sep]
            columns["input_ids"].append(review)
            columns["length"].append(len(review))
            columns["cut"].append(cut)
        return columns

    options = {
        "with_indices": True,
        "remove_columns": "text",
        "desc": "Tokenising",
    }
    return samples.map(encode, batched=True, **options)


@dataclasses.dataclass(eq=False)
class LengthGroupedBatches(torch.utils.data.Sampler):
    """Draws batches of reviews of like length, each review once.

    The two longest lead, so that too large a batch fails at once: by the second, as
    AdamW allocates its state in the first step.

    The plan follows from (seed, epoch) alone. A resumed epoch makes it again and
    skips what is done. That makes resuming exact, with dropout that follows from
    (seed, step), running means that are saved, and Lightning's own state.

    Each process takes every `world_size`-th batch; sizes differ by one at most.
    """

    lengths: Tensor  # <int64>[N] word-pieces of each review
    batch_size: int  # reviews, at most; batches of one may take two
    rank: int = 0  # this process, of `world_size`
    world_size: int = 1
    seed: int | None = None  # shuffles batches, and like lengths among them
    progress: Any = None  # Lightning's count of batches done
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        size = len(self.lengths)
        batches = math.ceil(size / (self.batch_size * self.world_size))
        # Fewer where batches of one would leave a process without its last.
        return min(batches, size // self.world_size)

    def plan(self) -> list[list[int]]:
        """Returns this process's batches of the epoch, as rows."""
        lengths = self.lengths.double()
        order = torch.arange(len(self))
        if self.seed is not None:
            # The hash of integers, unlike a string's, is always the same.
            mixed = hash((self.seed, self.epoch)) % 2**32
            generator = torch.Generator().manual_seed(mixed)
            # A jitter of 1 % makes new batches every epoch, for little padding.
            jitter = torch.rand(
                len(lengths), generator=generator, dtype=torch.double
            )
            lengths *= 1 + jitter / 100
            shuffled = torch.randperm(max(0, len(self) - 2), generator=generator)
            order[2:] = 2 + shuffled
        rows = lengths.argsort(descending=True, stable=True)
        batches = rows.tensor_split(len(self) * self.world_size)
        return [batches[self.world_size * i + self.rank].tolist() for i in order]

    def __iter__(self) -> Iterator[list[int]]:
        # Lazy on purpose: Lightning makes the iterator first, then restores its
        # counters, and nothing below runs before the first batch is asked for.
        done = self.progress.current.ready if self.progress else 0
        yield from self.plan()[done:]


# Model.


def check_config(model: str, seq_length: int) -> dict:
    """Returns the config of a BERT that takes `seq_length`."""
    flag = "--model=" + model
    with refusing(f"{flag}: expected a config.json", OSError):
        config, _ = transformers.PretrainedConfig.get_config_dict(model)
    # transformers would load each of these as if it were a BERT.
    if config.get("model_type") != "bert":
        refuse(f"{flag}: expected a BERT's config.json")
    expected = {"position_embedding_type": "absolute"}
    expected |= {"is_decoder": False, "add_cross_attention": False}
    for name, value in expected.items():
        if (config.get(name) or value) != value:
            refuse(f"{flag}: expected {name} {value}, found {config[name]}")
    most = config.get("max_position_embeddings", 512)
    if seq_length > most:
        refuse(f"--seq_length={seq_length}: {model} takes {most} at most")
    return config


def load_tokenizer(model: str, config: dict) -> transformers.BertTokenizer:
    """Loads a tokenizer that drops `<br />`, and reads "[SEP]" as text."""
    flag = "--model=" + model
    load = transformers.BertTokenizer.from_pretrained
    with refusing(f"{flag}: expected a tokenizer", OSError, ValueError):
        tokenizer = load(model, split_special_tokens=True)
    # If its files are missing, transformers makes one without words.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        refuse(f"{flag}: expected a tokenizer, found no vocabulary")
    pad = config.get("pad_token_id", 0)
    if tokenizer.pad_token_id != pad:
        refuse(
            f"{flag}: [PAD] is {tokenizer.pad_token_id}, its pad_token_id {pad}"
        )
    size = config.get("vocab_size", 30522)
    if len(tokenizer) > size:
        refuse(f"{flag}: {len(tokenizer)} word-pieces, {size} embeddings")
    backend = tokenizer.backend_tokenizer
    tags = tokenizers.normalizers.Replace(tokenizers.Regex(r"<br\s*/?>"), " ")
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tags, backend.normalizer]
    )
    return tokenizer


def load_bert(model: str, names: list[str], trained: bool) -> torch.nn.Module:
    """Loads float32 weights; if `trained`, the classifier must be among them."""
    flag = "--model=" + model
    classes = dict(enumerate(names))
    with refusing(f"{flag}: expected sound safetensors", *UNSOUND):
        earlier = transformers.BertConfig.from_pretrained(model).id2label
        bert, info = modeling_bert.BertForSequenceClassification.from_pretrained(
            model,
            id2label=classes,
            label2id={name: number for number, name in classes.items()},
            problem_type="single_label_classification",
            dtype=torch.float32,
            attention_probs_dropout_prob=0.0,  # to draw it is slow on a CPU
            attn_implementation="sdpa",  # whatever its config names
            ignore_mismatched_sizes=True,  # of an earlier classifier
            use_safetensors=True,
            output_loading_info=True,
        )
    new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    may_be_new = () if trained else ("classifier.", "bert.pooler.")
    lost = sorted(key for key in new if not key.startswith(may_be_new))
    if lost:
        refuse(f"{flag}: {len(lost)} weights missing or misshapen: {lost[:2]}")
    for key, weights in bert.named_parameters():
        if not weights.isfinite().all():
            refuse(f"{flag}: found NaN or inf in {key}")
    if "bert.pooler.dense.weight" in new:
        say("Model", "no pooler in the checkpoint: random weights")
    had_head = "classifier.weight" not in info["missing_keys"]
    if had_head and not trained and earlier != classes:
        say("Model", f"a new classifier: its own is not of {names[:SHOWN]}")
        std = bert.config.initializer_range
        torch.nn.init.normal_(bert.classifier.weight, std=std)
        torch.nn.init.zeros_(bert.classifier.bias)
    return bert.train()  # it comes in eval mode, with dropout off


# Faster on a CPU. Without this section and the call of `speed_up` the same network
# trains, with other dropout masks and rounding, but slower; a GPU gains from ClsLayer
# alone. Gains are medians of rounds in turn, in training steps of MiniLM at 256 on two
# cores, in bf16 where no other is said.


class Dropout(torch.nn.Dropout):
    """Draws 16 bits an element, saves a boolean: in float32 1.06 times as fast."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        bits = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64)
        bits.random_(-(2**63), None)
        bits = bits.view(torch.int16)[: x.numel()].view_as(x)
        dropped = bits < round(self.p * 2**16) - 2**15
        return x.masked_fill(dropped, 0).mul_(1 / (1 - self.p))


class ClsLayer(modeling_bert.BertLayer):
    """The last layer for [CLS], all that the classifier reads: 1.14 times as fast."""

    def forward(self, hidden: Tensor, mask: Any, *_: Any, **__: Any) -> Tensor:
        cls = hidden[:, :1]  # [B, 1, H] of [B, T, H]
        # Attends from [CLS] to all, by the weights of its self-attention.
        cross_attend = modeling_bert.BertCrossAttention.forward
        context, _ = cross_attend(self.attention.self, cls, hidden, mask)
        return self.feed_forward_chunk(self.attention.output(context, cls))


def cast_once(module: torch.nn.Module, args: Any, out: Tensor) -> Tensor:
    """Casts to bf16, so that no layer casts its input: 1.11 times as fast."""
    return out.bfloat16() if torch.is_autocast_enabled("cpu") else out


def attend_plainly(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor
) -> Tensor:
    scores = query @ key.mT  # [..., heads, T, T]
    scores += bias
    return scores.softmax(-1) @ value


def attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attends without fused attention, slow in bf16: trains 1.33 times as fast.

    Above 256 word-pieces the probabilities, a third of a step's memory,
    are computed again for the gradient, by review.
    """
    if not torch.is_autocast_enabled("cpu"):
        fused = sdpa_attention.sdpa_attention_forward
        return fused(module, query, key, value, mask, scaling=scaling)
    bias = torch.where(mask, 0.0, -torch.inf).to(query.dtype)  # [B, 1, 1, T]
    inputs = (query * scaling, key, value, bias)
    if query.shape[2] > 256:
        again = torch.utils.checkpoint.checkpoint
        options = {"use_reentrant": False, "preserve_rng_state": False}
        reviews = zip(*inputs, strict=True)
        context = torch.stack(
            [again(attend_plainly, *r, **options) for r in reviews]
        )
    else:
        context = attend_plainly(*inputs)
    return context.transpose(1, 2), None


def keep_freed_memory() -> None:
    """Has glibc keep what a step frees for the next: 1.10 times as fast.

    Else the kernel takes it back, and gives it out again zeroed, page by page.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
    # Blocks below 32 MB, the most that older ones take, are cut from the heap
    # (M_MMAP_THRESHOLD), which never shrinks (M_TRIM_THRESHOLD).
    if mallopt and mallopt(-3, 2**25):
        mallopt(-1, -1)


def speed_up(bert: torch.nn.Module) -> None:
    keep_freed_memory()
    for name, module in [*bert.named_modules()]:
        if type(module) is torch.nn.Dropout:
            bert.set_submodule(name, Dropout(module.p))
    bert.bert.encoder.layer[-1].__class__ = ClsLayer
    bert.bert.embeddings.register_forward_hook(cast_once)
    transformers.AttentionInterface.register("attend", attend)
    bert.set_attn_implementation("attend")


# The network, how it learns, and what is measured of it.


class IMDBSentimentClassifier(pl.LightningModule):
    """BERT with a classifier of [CLS], its data, metrics and optimiser.

    `settings` are the `label_names`, in the order of their numbers, and the flags.
    """

    def __init__(
        self, tokenizer: Any, bert: torch.nn.Module, **settings: Any
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["tokenizer", "bert"])
        self.tokenizer = tokenizer
        self.pad = tokenizer.pad_token_id
        self.bert = bert
        self.samples = None
        # Of the epoch so far; saved for a resumed epoch. To look for NaN would make
        # the CPU wait; without, MeanMetric ignores weights: it takes each review.
        self.mean_loss = torchmetrics.MeanMetric(nan_strategy="disable")
        self.mean_acc = torchmetrics.MeanMetric(nan_strategy="disable")
        self.mean_loss.persistent(True)
        self.mean_acc.persistent(True)
        # Row, label and logits of each review: <float32>[N, 2 + C].
        self.scored = torchmetrics.CatMetric(nan_strategy="disable")

    # Data: one process a machine tokenises, all read its cache in `setup`.

    def prepare_data(self) -> None:
        if self.samples is None and not self.trainer.predicting:
            tokenise(load_samples(**self.hparams), self.tokenizer, **self.hparams)

    def setup(self, stage: str) -> None:
        if self.samples is None and stage != "predict":
            samples = load_samples(**self.hparams)
            known = {*samples["train"]["text"][:], *samples["val"]["text"][:]}
            self.leaks = sum(text in known for text in samples["test"]["text"][:])
            columns = [[s["text"][:], s["label"][:]] for s in samples.values()]
            columns.append(self.tokenizer.backend_tokenizer.to_str())
            content = json.dumps(columns).encode()
            self.fingerprint = hashlib.sha256(content).hexdigest()
            self.samples = tokenise(samples, self.tokenizer, **self.hparams)

    def batches(self, sample: Reviews, **plan: Any) -> DataLoader:
        """Batches a sample, which is too fast to need worker processes."""
        lengths = torch.tensor(sample["length"][:])
        return DataLoader(
            sample.remove_columns(["length", "cut"]),
            sampler=LengthGroupedBatches(
                lengths, self.hparams.batch_size, **plan
            ),
            batch_size=None,  # the sampler draws whole batches
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
        )

    def collate(self, columns: dict[str, list]) -> Batch:
        """Pads input_ids to <int64>[B, T]; the others are <int64>[B]."""
        reviews = [torch.tensor(review) for review in columns.pop("input_ids")]
        longest = max(len(review) for review in reviews)
        # Rounded up to few lengths: oneDNN keeps 16 MB of kernels for each.
        limit = self.hparams.seq_length
        multiple = max(8, limit // 32)
        length = min(math.ceil(longest / multiple) * multiple, limit)
        # Columns row and label become rows and labels.
        batch = {
            f"{name}s": torch.tensor(column) for name, column in columns.items()
        }
        batch["input_ids"] = torch.full((len(reviews), length), self.pad)
        for row, review in enumerate(reviews):
            batch["input_ids"][row, : len(review)] = review
        return batch

    def share(self, part: str, **plan: Any) -> DataLoader:
        """Batches this process's share of a sample."""
        own = {"rank": self.global_rank, "world_size": self.trainer.world_size}
        return self.batches(self.samples[part], **own, **plan)

    def train_dataloader(self) -> DataLoader:
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        return self.share("train", seed=self.hparams.seed, progress=progress)

    def val_dataloader(self) -> DataLoader:
        return self.share("val")

    def test_dataloader(self) -> DataLoader:
        return self.share("test")

    # Steps.

    def forward(self, input_ids: Tensor) -> Tensor:
        """Returns the logits, <float32>[B, C], of word-pieces, <int64>[B, T]."""
        mask = input_ids.ne(self.pad)[:, None, None]  # [B, 1, 1, T]
        return self.bert(input_ids, attention_mask=mask).logits.float()

    def on_train_start(self) -> None:
        self.pieces = 0
        self.clock = time.perf_counter()

    on_train_epoch_start = on_train_start  # Lightning skips it in a resumed epoch

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Dropout follows from (seed, step): a resumed run draws the same.
        numbers = (self.hparams.seed, self.global_step, self.global_rank)
        seed = hash(numbers) % 2**32
        if self.device.type == "cpu":
            # torch.manual_seed takes a millisecond for GPUs that are not there.
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self(batch["input_ids"])
        losses = F.cross_entropy(logits, batch["labels"], reduction="none")  # [B]
        right = logits.argmax(-1).eq(batch["labels"]).float()  # [B]
        loss = losses.mean()
        self.mean_loss.update(losses.detach())
        self.mean_acc.update(right)
        self.pieces += batch["input_ids"].ne(self.pad).sum()
        # To read a number, the CPU waits for the GPU: at few steps.
        step = self.global_step
        is_due = (step + 1) % self.trainer.log_every_n_steps == 0
        if is_due or self.trainer.is_last_batch:
            if not loss.isfinite():
                refuse(f"loss {loss:.0f} at step {step + 1}: try a lower --lr")
            seconds = time.perf_counter() - self.clock
            figures = {
                "train_loss": loss,
                "train_acc": right.mean(),
                "speed": self.pieces / seconds * self.trainer.world_size,
                "lr": self.optimizers().param_groups[0]["lr"],
                "step": float(step),  # the x-axis; else Lightning draws `epoch`
            }
            self.log_dict(figures)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        columns = [batch["rows"], batch["labels"], self(batch["input_ids"])]
        self.scored.update(torch.column_stack(columns))

    test_step = validation_step

    def score(self, stage: str) -> Tensor:
        """Logs the metrics over all processes' reviews; returns `scored`."""
        scored = self.scored.compute()
        self.scored.reset()
        labels = scored[:, 1].long()
        logits = scored[:, 2:]
        each = (logits.softmax(-1), labels, logits.shape[1])
        figures = {
            f"{stage}_loss": F.cross_entropy(logits, labels),
            f"{stage}_acc": classification.multiclass_accuracy(
                *each, average="micro"
            ),
            f"{stage}_f1": classification.multiclass_f1_score(*each),
            f"{stage}_ece": classification.multiclass_calibration_error(*each),
        }
        # Those of test go to TensorBoard at the end.
        self.log_dict(figures, logger=stage == "val", sync_dist=True)
        return scored

    def on_validation_epoch_end(self) -> None:
        self.score("val")
        figures = {
            "train_loss_epoch": self.mean_loss.compute(),
            "train_acc_epoch": self.mean_acc.compute(),
            "step": self.global_step - 1.0,
        }
        self.log_dict(figures, sync_dist=True)
        self.mean_loss.reset()
        self.mean_acc.reset()

    def on_test_epoch_end(self) -> None:
        self.predictions = self.score("test").cpu()

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns rows and probabilities, <float32>[B, 1 + C]."""
        probabilities = self(batch["input_ids"]).softmax(-1)
        return torch.column_stack([batch["rows"], probabilities])

    # Optimiser.

    def configure_optimizers(self) -> Any:
        hp = self.hparams
        if hp.optimizer == "sgd":
            return torch.optim.SGD(
                self.parameters(), lr=hp.lr, momentum=hp.momentum
            )
        matrices = [p for p in self.parameters() if p.ndim > 1]
        vectors = [p for p in self.parameters() if p.ndim < 2]
        optimizer = torch.optim.AdamW(
            [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
            lr=hp.lr,
            betas=(hp.momentum, 0.999),
            weight_decay=hp.weight_decay,
            fused=True,
        )
        steps = self.trainer.estimated_stepping_batches
        warmup = round(hp.warmup * steps)
        linear = transformers.get_linear_schedule_with_warmup(
            optimizer, warmup, steps
        )
        return [optimizer], [{"scheduler": linear, "interval": "step"}]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Lightning refuses to clip for a fused optimiser in mixed precision.
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)

    # Checkpoints and export.

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        figures = self.trainer.callback_metrics.items()
        checkpoint["val"] = {
            k: v.item() for k, v in figures if k.startswith("val_")
        }
        checkpoint["fingerprint"] = self.fingerprint

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        if checkpoint["fingerprint"] != self.fingerprint:
            refuse(
                "--resume: other reviews, or another tokenizer, than the run's"
            )

    def export(self, folder: Path) -> None:
        """Saves model and tokenizer for `transformers.pipeline`."""
        cut = {name: self.hparams[name] for name in ("seq_length", "truncation")}
        self.bert.config.update(cut)
        self.bert.save_pretrained(folder)
        # As a BertTokenizer it would no longer drop `<br />`.
        self.tokenizer.__class__ = transformers.PreTrainedTokenizerFast
        self.tokenizer.init_kwargs["truncation_side"] = None  # or it is not saved
        self.tokenizer.model_max_length = cut["seq_length"]
        side = "left" if cut["truncation"] == "tail" else "right"
        self.tokenizer.truncation_side = side
        self.tokenizer.save_pretrained(folder)


# Checkpoints and runs: saved whole, resumed, one at a time.


class WholeCheckpointIO(pl.plugins.TorchCheckpointIO):
    """Writes to .partial, then renames: a crash leaves the earlier one whole.

    Lightning's own builds it in memory, then in /tmp, perhaps another disk.
    """

    def save_checkpoint(
        self, checkpoint: dict, path: str, *_: Any, **__: Any
    ) -> None:
        partial = Path(f"{path}.partial")
        with refusing(f"cannot save {path}, disk full?", OSError, RuntimeError):
            partial.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("wb", buffering=0) as file:
                    torch.save(checkpoint, file)
                    os.fsync(file.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)


def stop(signum: int, *_: Any, how: str = "") -> None:
    """Ends the program on a signal, with a shell's status for it."""
    if rank_zero_only.rank == 0:
        print(f"\nStopped{how}", file=sys.stderr, flush=True)
    sys.exit(128 + signum)


def on_signals(handler: Callable) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(signum, handler)


class Checkpoints(pl.callbacks.Checkpoint):
    """Writes `best.ckpt`, which is tested, and `last.ckpt`, to go on from.

    It writes `last.ckpt` every ten minutes, after each validation, and on a signal,
    which ends the run once the step, or the validation, is done and saved.
    """

    def __init__(self, folder: Path) -> None:
        self.best = folder / "best.ckpt"
        self.last = folder / "last.ckpt"
        self.best_acc = 0.0
        self.signum = 0
        self.saved = time.monotonic()

    def state_dict(self) -> dict:
        return {"best_acc": self.best_acc}

    def load_state_dict(self, state: dict) -> None:
        self.best_acc = state["best_acc"]

    def note(self, signum: int, _: Any) -> None:
        self.signum = signum

    def stop(self, signum: int, *_: Any) -> None:
        stop(signum, how=f"; all is saved in {self.last}: --resume goes on")

    def on_train_start(self, *_: Any) -> None:
        on_signals(self.note)

    def on_test_start(self, *_: Any) -> None:
        on_signals(self.stop)  # Lightning took back those of training

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        # One of an epoch's last step would be resumed after the validation.
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self.save(trainer, time.monotonic() - self.saved > SAVE_EVERY)

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        acc = trainer.callback_metrics["val_acc"].item()
        self.best_acc = max(self.best_acc, acc)
        # As rates fall, a later epoch is the better, unless it is worse than the
        # best by a standard error [5].
        variance = self.best_acc * (1 - self.best_acc)
        error = math.sqrt(variance / len(module.samples["val"]))
        if acc >= self.best_acc - error:
            trainer.save_checkpoint(self.best, weights_only=True)
        self.save(trainer, True)

    def save(self, trainer: pl.Trainer, due: bool) -> None:
        """Saves if a process is due or has a signal, which ends all."""
        decide = trainer.strategy.reduce_boolean_decision
        if decide(due or self.signum > 0, all=False):
            trainer.save_checkpoint(self.last)
            self.saved = time.monotonic()
            if decide(self.signum > 0, all=False):
                self.stop(self.signum or signal.SIGTERM)


@contextlib.contextmanager
def only_run(run: Path) -> Iterator[None]:
    """Refuses a second run in the folder while the first lives."""
    run.parent.mkdir(parents=True, exist_ok=True)
    holder = run.with_name(f".{run.name}.lock")
    try:
        with filelock.FileLock(holder, timeout=0):
            holder.write_text(f"{os.getpid()} on {os.uname().nodename}")
            try:
                yield
            finally:
                holder.unlink()
    except filelock.Timeout:
        refuse(
            f"--logdir={run.parent}: process {holder.read_text()} runs in {run}"
        )


@rank_zero_only
def clear(run: Path, debug: bool) -> None:
    """Moves the earlier run to LOGDIR.old; drops a debug run."""
    with refusing(
        f"--logdir={run.parent}: cannot move {run}", sh.ErrorReturnCode
    ):
        if debug:
            sh.rm("-rf", "--", run if run.is_symlink() else run / "version_0")
        elif os.path.lexists(run):
            old = Path(f"{os.path.abspath(run.parent)}.old")
            sh.mkdir("-p", "--", old)
            sh.mv("--", run, old / time.strftime("%Y-%m-%d_%H-%M-%S"))


def check_resume(checkpoints: Path, given: dict) -> tuple[dict, int]:
    """Returns the flags and the step of the run to go on with."""
    last = checkpoints / "last.ckpt"
    if (checkpoints.parent / "results.json").exists():
        refuse("--resume: the run is finished, start a new one")
    if not last.exists():
        refuse(f"--resume: nothing to resume, no {last}")
    broken = (
        RuntimeError,
        pickle.UnpicklingError,
        EOFError,
        LookupError,
        TypeError,
    )
    with refusing(f"--resume: {last} is no whole checkpoint of a run", *broken):
        checkpoint = {**torch.load(last, "cpu", mmap=True, weights_only=True)}
        stored = dict(checkpoint["hyper_parameters"])
        step = checkpoint["global_step"]
        best_acc = checkpoint["callbacks"]["Checkpoints"]["best_acc"]
        if not {"optimizer_states", "fingerprint"} <= checkpoint.keys():
            raise LookupError("no state to go on with")
    if best_acc and not (checkpoints / "best.ckpt").exists():
        refuse(f"--resume: found no best.ckpt beside {last}")
    for name, value in given.items():
        if stored[name] != value:
            refuse(f"--resume: the run has --{name}={stored[name]}, not {value}")
    del stored["label_names"]
    return stored, step


def check_processes(devices: int, num_nodes: int) -> None:
    """Refuses processes that would wait for others for ever."""
    slurm = SLURMEnvironment.detect()
    started = os.environ.get("SLURM_NTASKS" if slurm else "WORLD_SIZE")
    ranks = {"RANK", "LOCAL_RANK", "SLURM_PROCID"} & {*os.environ}
    if started is None and (ranks or num_nodes > 1):
        why = ", ".join(sorted(ranks)) or f"--num_nodes={num_nodes}"
        refuse(f"{why} without WORLD_SIZE: unset it, or use torchrun or SLURM")
    processes = devices * num_nodes
    if rank_zero_only.rank >= processes:
        refuse(f"{sorted(ranks)} say rank {rank_zero_only.rank} of {processes}")
    if started not in (None, str(processes)):
        refuse(f"WORLD_SIZE is {started}, --devices x --num_nodes {processes}")


# Results: said on the way and at the end, computed, drawn and written.


def commas(counts: dict[str, int]) -> str:
    shown = [f"{name} {count:,}" for name, count in counts.items()][:SHOWN]
    return ", ".join(shown) + ", …" * (len(counts) > SHOWN)


def count_classes(sample: Reviews) -> dict[str, int]:
    classes = sample.features["label"]
    labels = torch.tensor(sample["label"][:])
    counts = labels.bincount(minlength=classes.num_classes)
    return dict(zip(classes.names, counts.tolist(), strict=True))


def spell(trainer: pl.Trainer, *names: str) -> str:
    """Returns what there is: "  train_loss 0.6027  speed 8,465"."""
    line = ""
    for name in names:
        if name in trainer.callback_metrics:
            form = ",.0f" if name == "speed" else ".4f"
            line += f"  {name} {trainer.callback_metrics[name]:{form}}"
    return line


class Terminal(pl.callbacks.Callback):
    """Says what a run does, and, where no bar does, how far it is."""

    def on_train_start(
        self, trainer: pl.Trainer, module: pl.LightningModule
    ) -> None:
        hp = module.hparams
        say("Data", f"{hp.dataset}, {hp.percent} %, seed {hp.seed}")
        cuts = []
        for part, sample in module.samples.items():
            counts = commas(count_classes(sample))
            say(f"  {part}", f"{len(sample):,} reviews: {counts}")
            cuts += [cut > 0 for cut in sample["cut"][:]]
        share = sum(cuts) / len(cuts)
        say("", f"{module.leaks:,} of test are in train or val, word for word")
        limit = hp.seq_length
        say("", f"{share:.0%} have over {limit} word-pieces: {hp.truncation}")
        size = sum(p.numel() for p in module.parameters()) / 1e6
        processes = trainer.world_size
        device = trainer.strategy.root_device.type
        say("Model", hp.model)
        say(
            "", f"{size:.1f} M parameters, {processes} x {device}, {hp.precision}"
        )
        epochs = trainer.max_epochs
        steps = trainer.num_training_batches
        batch = hp.batch_size * processes
        say("Training", f"{epochs} epochs of {steps:,} steps of {batch} reviews")
        curves = {
            "loss": ["Multiline", ["train_loss$", "val_loss"]],
            "accuracy": ["Multiline", ["train_acc$", "val_acc"]],
        }
        trainer.logger.experiment.add_custom_scalars({"Learning curves": curves})
        self.begin()

    def begin(self, *_: Any) -> None:
        self.began = time.monotonic()
        self.said = 0.0  # seconds after that
        self.steps = 0

    on_train_epoch_start = begin  # Lightning skips it in a resumed epoch
    on_test_start = begin

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        name = f"Epoch {trainer.current_epoch}"
        self.tell(name, args[-1] + 1, trainer.num_training_batches, trainer)

    def on_test_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.tell("Test", args[3] + 1, trainer.num_test_batches[0], trainer)

    def tell(self, name: str, done: int, steps: int, trainer: pl.Trainer) -> None:
        """Says a line each tenth of the way, once a minute at most."""
        self.steps += 1
        seconds = time.monotonic() - self.began
        is_due = (
            done % math.ceil(steps / 10) == 0 and seconds - self.said >= SAY_EVERY
        )
        if is_due and not sys.stdout.isatty():
            self.said = seconds
            earlier = done - self.steps  # where an epoch was resumed
            way = tqdm.tqdm.format_meter(done, steps, seconds, initial=earlier)
            say(name, way + spell(trainer, "train_loss", "speed"))

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        names = (
            "train_loss_epoch",
            "train_acc_epoch",
            "val_loss",
            "val_acc",
            "speed",
        )
        # A resumed run skips a validation that was done.
        if "val_acc" in trainer.callback_metrics:
            say(f"Epoch {trainer.current_epoch}", spell(trainer, *names).strip())


class ProgressBar(pl.callbacks.TQDMProgressBar):
    def get_metrics(self, trainer: pl.Trainer, *_: Any) -> dict:
        # `prog_bar=True` would wait for the device at every step.
        figures = trainer.callback_metrics
        names = ("train_loss", "speed", "val_loss", "val_acc")
        return {name: figures[name].item() for name in names if name in figures}


def wilson(share: float, n: int, z: float = 1.96) -> list[float]:
    """Returns the 95 % score interval of a share of `n` [4]."""
    middle = share + z * z / (2 * n)
    root = math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return [(middle + sign * z * root) / (1 + z * z / n) for sign in (-1, 1)]


def summarise(
    module: IMDBSentimentClassifier, best: dict, seconds: float
) -> dict:
    """Returns all that a run reports, of its best epoch."""
    hp = module.hparams
    labels = module.predictions[:, 1].long()  # [N]
    logits = module.predictions[:, 2:]  # [N, C]
    metrics = dict(best["val"])
    for name, value in module.trainer.callback_metrics.items():
        if name.startswith("test_"):
            metrics[name] = value.item()
    metrics["test_acc_interval"] = wilson(metrics["test_acc"], len(labels))
    commonest = labels.mode().values.item()
    confuse = classification.multiclass_confusion_matrix
    confusion = confuse(logits, labels, logits.shape[1])
    libraries = (torch, pl, transformers, datasets)
    return {
        "metrics": metrics,
        "baseline": {
            "label": hp.label_names[commonest],
            "test_acc": labels.eq(commonest).double().mean().item(),
        },
        "leaks": module.leaks,
        "best_epoch": best["epoch"],
        "tested": len(labels),  # reviews; with --debug fewer than the sample
        "confusion": confusion.tolist() if len(confusion) <= SHOWN else None,
        "samples": {k: count_classes(v) for k, v in module.samples.items()},
        "seconds": seconds,
        "flags": {name: v for name, v in hp.items() if name != "label_names"},
        "versions": {
            library.__name__: library.__version__ for library in libraries
        },
    }


def say_results(results: dict, folder: Path) -> None:
    scores = results["metrics"]
    test = results["samples"]["test"]
    low, high = scores["test_acc_interval"]
    say("", "")
    accuracy = f"accuracy {scores['test_acc']:.2%}"
    say("Test", f"{accuracy} of {results['tested']:,} reviews")
    say("", f"95 % interval {low:.2%} to {high:.2%}")
    epoch = results["best_epoch"]
    say("", f"scored once, on epoch {epoch}, chosen by validation")
    baseline = results["baseline"]
    say("", f"always {baseline['label']}: {baseline['test_acc']:.2%}")
    say("", f"{results['leaks']:,} of test are in train or val, word for word")
    for name, row in zip(test, results["confusion"] or [], strict=False):
        say("", f"{name} taken for: {commas(dict(zip(test, row, strict=True)))}")
    say("Model", f"{folder}/model")
    say("Look", f"tensorboard --logdir {folder.parents[1]}")
    say("", "http://localhost:6006/#custom_scalars shows the learning curves")
    say("Use", f"python main.py --model={folder}/model --predict=FILE")


def draw(module: IMDBSentimentClassifier, results: dict) -> None:
    """Shows the test sample in TensorBoard: curves, table, errors."""
    log = module.logger.experiment
    step = module.global_step
    names = module.hparams.label_names
    labels = module.predictions[:, 1].long()  # [N]
    probabilities = module.predictions[:, 2:].softmax(-1)  # [N, C]
    for number, name in enumerate(names[:SHOWN]):
        own = probabilities[:, number]
        log.add_pr_curve(f"test_pr/{name}", labels == number, own, step)
    shown = names if results["confusion"] else []
    lines = [["true / predicted", *shown], ["---"] * (1 + len(shown))]
    for name, row in zip(shown, results["confusion"] or [], strict=True):
        lines.append([name, *row])
    table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    log.add_text("test_confusion", table, step)

    certainty, predicted = probabilities.max(-1)
    wrong = (predicted != labels).nonzero().flatten()
    worst = []
    for i in wrong[certainty[wrong].argsort(descending=True)][:SHOWN]:
        review = module.samples["test"][int(module.predictions[i, 0])]
        seen = module.tokenizer.decode(review["input_ids"][1:-1])
        verdict = f"{names[labels[i]]} taken for {names[predicted[i]]}"
        cut = f" [{review['cut']} word-pieces cut]" if review["cut"] else ""
        worst.append(f"1. **{verdict} at {certainty[i]:.1%}{cut}:** {seen}")
    log.add_text("test_worst", "\n".join(worst), step)


def model_card(results: dict) -> str:
    """Returns the model's README.md."""
    return f"""---
library_name: transformers
pipeline_tag: text-classification
metrics:
- accuracy
---
# BERT that labels texts

`pipeline("text-classification", model=FOLDER, truncation=True)` loads it. It was
scored once, on the test sample, and on no texts of other origin:

```json
{json.dumps(results, indent=2)}
```
"""


def finish(module: IMDBSentimentClassifier, folder: Path, start: float) -> None:
    """Exports the best epoch, and writes, draws and says its results."""
    file = folder / "checkpoints" / "best.ckpt"
    best = torch.load(file, "cpu", mmap=True, weights_only=True)
    results = summarise(module, best, time.perf_counter() - start)
    module.export(folder / "model")
    (folder / "model" / "README.md").write_text(model_card(results), "utf-8")
    draw(module, results)
    names = ("test_acc", "val_acc", "test_loss", "test_f1", "test_ece")
    figures = {name: results["metrics"][name] for name in names}
    module.logger.log_hyperparams(
        module.hparams, figures, best["global_step"] - 1
    )
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
    settings: dict, run: Path, debug: bool, step: int | None
) -> pl.Trainer:
    """Returns the Trainer of a run, or of one resumed at `step`."""
    logger = pl.loggers.TensorBoardLogger(
        run.parent,
        name=run.name,
        version="version_0",
        default_hp_metric=False,
        purge_step=step,
    )
    every = 1 if debug else LOG_EVERY
    bar = ProgressBar(every if sys.stdout.isatty() else 0)
    checkpoints = Checkpoints(run / "version_0" / "checkpoints")
    chosen = ("precision", "devices", "num_nodes", "strategy")
    limits = ("limit_train_batches", "limit_val_batches", "limit_test_batches")
    return pl.Trainer(
        max_epochs=1 if debug else settings["epochs"],
        use_distributed_sampler=False,  # `LengthGroupedBatches` shares out
        logger=logger,
        log_every_n_steps=every,
        callbacks=[checkpoints, Terminal(), bar],
        plugins=[WholeCheckpointIO()],
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{name: settings[name] for name in chosen},
        **dict.fromkeys(limits, 1 if debug else None),
    )


def train(settings: dict, run: Path, debug: bool, step: int | None) -> None:
    """Checks what can be wrong, then trains and tests."""
    start = time.perf_counter()
    check_processes(settings["devices"], settings["num_nodes"])
    for flag in ("model", "dataset"):
        check_name(flag, settings[flag])
        path = Path(settings[flag]).resolve()
        if step is None and path.is_relative_to(run.resolve()):
            refuse(f"--{flag}={settings[flag]}: {run} will be moved, copy it")
    check_config(settings["model"], settings["seq_length"])
    samples = load_samples(**settings)
    smallest = min(len(sample) for sample in samples.values())
    if settings["devices"] * settings["num_nodes"] > smallest:
        refuse(f"--devices: one sample has only {smallest} reviews")
    module = make_module(settings, samples["train"].features["label"].names)
    with refusing("--devices", pl.utilities.exceptions.MisconfigurationException):
        trainer = make_trainer(settings, run, debug, step)
    folder = run / "version_0"
    best = folder / "checkpoints" / "best.ckpt"
    last = None if step is None else folder / "checkpoints" / "last.ckpt"
    memory = "memory is full: lower --batch_size or --seq_length"
    with (
        refusing(memory, torch.OutOfMemoryError),
        refusing(f"cannot write to {folder}", *UNSOUND),
        only_run(run) if rank_zero_only.rank == 0 else contextlib.nullcontext(),
    ):
        if step is None:
            clear(run, debug)
        trainer.fit(module, ckpt_path=last, weights_only=True)
        trainer.test(module, ckpt_path=best, weights_only=True, verbose=False)
        if trainer.is_global_zero:
            finish(module, folder, start)


def read_texts(file: str) -> Reviews:
    """Reads the reviews to label: a file, or lines of stdin for -."""
    flag = f"--predict={file}"
    path = Path(file)
    if file == "-":
        with refusing(f"{flag}: expected reviews by line", ValueError):
            lines = [line.rstrip("\n") for line in sys.stdin]
            reviews = Reviews.from_dict({"text": lines})
    elif path.suffix.lower() in (*KINDS, ".txt", ""):
        reviews = read_file(flag, path)
    else:
        refuse(f"{flag}: expected one of {', '.join(KINDS)}, .txt")
    return check_columns(flag, reviews, {"text": {"str"}})


def predict(settings: dict, file: str) -> None:
    """Prints label and probabilities of new reviews as csv."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # of `| head`
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
    reviews = tokenise(reviews, module.tokenizer, **settings)
    predictions = torch.cat(trainer.predict(module, module.batches(reviews)))
    in_order = predictions[predictions[:, 0].argsort(), 1:]
    table = pandas.DataFrame(in_order, columns=names)
    table.insert(0, "label", table.idxmax(1), allow_duplicates=True)
    table.to_csv(sys.stdout, index=False, float_format="%.6f")


def quieten() -> None:
    """Silences what a newcomer need not read."""
    for logger in ("pytorch_lightning", "lightning_fabric", "httpx2", "sh"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it raises what it logs
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # no network for files
    transformers.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    for decided in (
        "does not have many workers",  # see `batches`
        "your dataloader is not resumable",  # it is
        "recommended to use `Trainer.devices=1",  # no review is tested twice
        "smaller than the logging interval",  # the epoch's means are logged
        "isinstance.treespec, LeafSpec",  # Lightning's own
    ):
        warnings.filterwarnings("ignore", f".*{decided}")
    # A row of a csv that is longer than its header.
    warnings.filterwarnings("error", category=pandas.errors.ParserWarning)


def fastest_precision() -> str:
    """Returns bf16 where the hardware computes in it, else float32."""
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
    sys.stdout.reconfigure(errors="backslashreplace")  # on an ascii terminal
    quieten()
    torch.set_float32_matmul_precision("high")
    ours = FLAGS.get_key_flags_for_module(__name__)
    settings = {f.name: f.value for f in ours if f.name not in RUN_FLAGS}
    if FLAGS.precision == "auto":
        settings["precision"] = fastest_precision()
    given = {
        k: v for k, v in settings.items() if not FLAGS[k].using_default_value
    }
    logdir = Path(FLAGS.logdir).expanduser()  # as Lightning does
    run = logdir / ("debug" if FLAGS.debug else "imdb")
    if FLAGS.predict is not None:
        last_model = str(logdir / "imdb" / "version_0" / "model")
        settings["model"] = given.get("model", last_model)
        predict(settings, FLAGS.predict)
    elif FLAGS.resume:
        settings, step = check_resume(run / "version_0" / "checkpoints", given)
        train(settings, run, FLAGS.debug, step)
    else:
        train(settings, run, FLAGS.debug, step=None)


if __name__ == "__main__":
    app.run(main)

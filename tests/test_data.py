"""What happens to reviews on their way to the model: samples, word-pieces, batches."""

import json
import types
from typing import Any

import datasets
import hypothesis
import pytest
import torch
import transformers
from conftest import command, piece_ids, write_reviews
from hypothesis import strategies

import main

TRUNCATIONS = ("head", "tail", "head_tail")
few = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
quick = hypothesis.settings(max_examples=100, deadline=None, derandomize=True)


def counts(sample: datasets.Dataset) -> list[int]:
    return torch.tensor(sample["label"][:]).bincount().tolist()


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A folder of 1,200 and 400 reviews, each its own text, a quarter of them pos."""
    columns = {
        part: {
            "text": [f"{part} {i}" for i in range(size)],
            "label": [0] * (size * 3 // 4) + [1] * (size // 4),
        }
        for part, size in (("train", 1200), ("test", 400))
    }
    folder = tmp_path_factory.mktemp("uneven")
    return write_reviews(folder, "parquet", **columns, names=["neg", "pos"])


# Samples


@pytest.mark.parametrize("percent", [5, 40, 100])
def test_every_sample_has_each_class_in_its_share(uneven, percent):
    samples = main.load_samples(uneven, percent, seed=3)
    assert counts(samples["test"]) == [3 * percent, percent]
    train, val = counts(samples["train"]), counts(samples["val"])
    assert [a + b for a, b in zip(train, val, strict=True)] == [
        9 * percent,
        3 * percent,
    ]
    assert sum(val) == round(1.2 * percent)
    assert abs(val[1] - sum(val) / 4) < 1


@pytest.mark.parametrize("percent", [40, 100])
def test_no_review_is_in_two_samples(uneven, percent):
    samples = main.load_samples(uneven, percent, seed=3)
    train, val, test = (
        samples[part]["text"][:] for part in ("train", "val", "test")
    )
    assert len({*train, *val, *test}) == len(train) + len(val) + len(test)
    assert {text.split()[0] for text in train} == {"train"}
    assert {text.split()[0] for text in val} == {"train"}  # never test
    assert {text.split()[0] for text in test} == {"test"}


@pytest.mark.parametrize("percent", [40, 100])
def test_the_seed_alone_draws_the_samples(uneven, percent):
    first, again, other = (
        main.load_samples(uneven, percent, s) for s in (3, 3, 4)
    )
    for part in first:
        assert first[part]["text"][:] == again[part]["text"][:]
        if part == "val" or percent < 100:
            assert {*first[part]["text"]} != {*other[part]["text"]}


# Own reviews


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    "labels, names",
    [
        (["so-so", "bad", "good", "bad"], ["bad", "good", "so-so"]),
        ([10, 3, 7, 3], ["3", "7", "10"]),
    ],
)
def test_labels_of_own_reviews_become_classes(tmp_path, kind, labels, names):
    texts = ['a "fine", film', "an awful\nfilm", "it was", "ünd"]
    train = {"text": texts, "label": labels, "stars": [1, 2, 3, 4]}
    test = {"label": labels[2:0:-1], "text": texts[2:0:-1]}
    splits = main.load_splits(write_reviews(tmp_path, kind, train, test))
    assert splits["train"]["text"][:] == texts
    assert splits["test"]["text"][:] == texts[2:0:-1]
    for part, expected in (("train", labels), ("test", labels[2:0:-1])):
        classes = splits[part].features["label"]
        assert classes.names == names
        got = [classes.int2str(label) for label in splits[part]["label"]]
        assert got == [str(label) for label in expected]


def test_class_labels_of_a_parquet_keep_their_order(tmp_path):
    reviews = {"text": ["a", "b", "c"], "label": [1, 0, 1]}
    folder = write_reviews(tmp_path, "parquet", reviews, reviews, ["pos", "neg"])
    splits = main.load_splits(folder)
    assert splits["train"].features["label"].names == ["pos", "neg"]
    assert splits["train"]["label"][:] == [1, 0, 1]


# Word-pieces


def tokenised(texts: list[str], *arguments: Any) -> datasets.Dataset:
    reviews = datasets.Dataset.from_dict(
        {"text": texts, "label": [0] * len(texts)}
    )
    return main.tokenise(reviews, *arguments)


@pytest.mark.parametrize(
    "truncation, kept",
    [
        ("head", "a fine the film that plot it song"),
        ("tail", "it song had hour of ##s was city"),
        (
            "head_tail",
            "a fine had hour of ##s was city",
        ),  # a quarter, three quarters
    ],
)
def test_seq_length_and_truncation_hold_to_the_word_piece(
    tokenizer, truncation, kept
):
    text = "a fine the film that plot it song had hour ofs was city"
    review = tokenised([text, "a fine film"], tokenizer, 10, truncation)
    pieces = [tokenizer.convert_ids_to_tokens(ids) for ids in review["input_ids"]]
    assert pieces[0] == ["[CLS]", *kept.split(), "[SEP]"]
    assert pieces[1] == ["[CLS]", "a", "fine", "film", "[SEP]"]
    assert review["length"][:] == [10, 5]
    assert review["cut"][:] == [6, 0]
    assert review["row"][:] == [0, 1]
    assert "text" not in review.column_names


words = strategies.sampled_from(
    ["fine", "films", "awfully", "it", "zzz", "<br />", "!?"]
)
texts = strategies.lists(words, max_size=40).map(" ".join)


@few
@hypothesis.given(
    reviews=strategies.lists(texts, min_size=1, max_size=4),
    seq_length=strategies.integers(3, 30),
    truncation=strategies.sampled_from(TRUNCATIONS),
)
def test_truncation_equals_a_plain_loop_over_word_pieces(
    tokenizer, bert, reviews, seq_length, truncation
):
    got = tokenised(reviews, tokenizer, seq_length, truncation)
    plain = transformers.BertTokenizer.from_pretrained(bert)
    expected = [
        piece_ids(plain, text, seq_length, truncation) for text in reviews
    ]
    assert got["input_ids"][:] == expected
    assert got["length"][:] == [len(ids) for ids in expected]
    whole = [len(piece_ids(plain, text, 999, "head")) for text in reviews]
    assert got["cut"][:] == [
        n - len(k) for n, k in zip(whole, expected, strict=True)
    ]


def test_line_break_tags_are_removed(tokenizer):
    text = "fine<br /><br />film <br/> a<br>plot<br />"
    ids = tokenised([text], tokenizer, 24, "head")["input_ids"][0]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert pieces == ["[CLS]", "fine", "film", "a", "plot", "[SEP]"]


def test_special_tokens_in_a_text_are_plain_text(tokenizer):
    text = "fine [SEP] film [PAD] a [CLS] plot [MASK]"
    ids = tokenised([text], tokenizer, 24, "head")["input_ids"][0]
    special = {
        tokenizer.sep_token_id,
        tokenizer.cls_token_id,
        tokenizer.mask_token_id,
    }
    assert not {*ids[1:-1]} & {*special, tokenizer.pad_token_id}
    words = tokenizer.convert_ids_to_tokens(ids)
    assert [word for word in words if word in ("fine", "film", "a", "plot")] == (
        ["fine", "film", "a", "plot"]
    )


def test_an_empty_review_is_cls_and_sep(tokenizer):
    both = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    for truncation in TRUNCATIONS:
        reviews = tokenised(["", " ", "<br />"], tokenizer, 24, truncation)
        assert reviews["input_ids"][:] == [both] * 3
        assert reviews["cut"][:] == [0, 0, 0]


def test_a_second_process_with_another_lr_tokenises_nothing(tmp_path, commanded):
    cache, arguments = commanded[0] / "cache", commanded[1]
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")}
    tables = [
        datasets.Dataset.from_file(str(path)).column_names for path in before
    ]
    assert (
        sum("input_ids" in columns for columns in tables) == 3
    )  # train, val, test
    logdir = f"--logdir={tmp_path}/logs"
    changed = [*arguments, logdir, "--lr=5e-3", "--batch_size=9", "--debug"]
    assert command(*changed, HF_DATASETS_CACHE=str(cache)).returncode == 0
    results = json.loads(
        (tmp_path / "logs/debug/version_0/results.json").read_text()
    )
    assert results["flags"]["lr"] == 5e-3
    after = {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")}
    assert after == before


# Batches

lengths_like = strategies.lists(
    strategies.integers(2, 512), min_size=8, max_size=80
)


def whole_plan(
    world_size: int, epoch: int = 0, **plan: Any
) -> list[list[list[int]]]:
    """Returns the plan of every process."""
    ranks = []
    for rank in range(world_size):
        sampler = main.LengthGroupedBatches(
            rank=rank, world_size=world_size, **plan
        )
        sampler.set_epoch(epoch)
        ranks.append(sampler.plan())
        assert len(sampler) == len(ranks[-1])
    return ranks


@quick
@hypothesis.given(
    lengths=lengths_like.map(torch.tensor),
    batch_size=strategies.integers(1, 9),
    world_size=strategies.integers(1, 3),
    seed=strategies.none() | strategies.integers(0, 2**32 - 1),
    epoch=strategies.integers(0, 9),
)
def test_a_plan_holds_each_review_once_and_shares_evenly(
    lengths, batch_size, world_size, seed, epoch
):
    ranks = whole_plan(
        world_size, epoch, lengths=lengths, batch_size=batch_size, seed=seed
    )
    batches = sum(ranks, [])
    assert sorted(sum(batches, [])) == list(range(len(lengths)))
    assert (
        len({len(batches) for batches in ranks}) == 1
    )  # or processes would hang
    sizes = {len(batch) for batch in batches}
    # Processes with batches of one cannot share an odd review, so one takes two.
    most = max(batch_size, 1 if world_size == 1 else 2)
    assert min(sizes) >= 1 and max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    # Lengths are jittered by 1 %, so the longest may stand that far behind.
    first = max(lengths[i] for batches in ranks for i in batches[0])
    assert first * (1 if seed is None else 1.01) >= lengths.max()


@quick
@hypothesis.given(
    seed=strategies.integers(0, 2**32 - 1), epoch=strategies.integers(0, 9)
)
def test_a_plan_follows_from_seed_and_epoch_alone(seed, epoch):
    lengths = torch.arange(60) % 23 + 2
    plain = {"lengths": lengths, "batch_size": 4}
    first = whole_plan(2, epoch, **plain, seed=seed)
    torch.rand(1)  # what else draws random numbers
    used = main.LengthGroupedBatches(lengths, 4, rank=1, world_size=2, seed=seed)
    for earlier in range(epoch + 1):
        used.set_epoch(earlier)
        list(used)
    assert used.plan() == first[1]
    assert whole_plan(2, epoch, **plain, seed=seed) == first
    assert whole_plan(2, epoch + 1, **plain, seed=seed) != first
    assert whole_plan(2, epoch, **plain, seed=seed + 1) != first


@pytest.mark.parametrize("longest", [256, 512])
def test_batches_of_like_length_need_little_padding_and_come_shuffled(longest):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(2250).log_normal_(5.45, 0.65, generator=generator)
    lengths = lengths.clamp(
        10, longest
    ).long()  # in mean and shares cut like IMDB's
    plans = []
    for epoch in (0, 1):
        (plan,) = whole_plan(1, epoch, lengths=lengths, batch_size=16, seed=3)
        eights = [lengths[batch].max().item() + 7 & ~7 for batch in plan]
        padded = sum(
            len(batch) * T for batch, T in zip(plan, eights, strict=True)
        )
        assert 1 - lengths.sum().item() / padded < 0.02
        means = torch.tensor(
            [lengths[batch].double().mean() for batch in plan[1:]]
        )
        places = torch.arange(len(means)).double()
        assert torch.corrcoef(torch.stack([means, places]))[0, 1].abs() < 0.5
        plans.append({frozenset(batch) for batch in plan})
    assert (
        len(plans[0] & plans[1]) < len(plans[0]) / 2
    )  # other company each epoch


def test_evaluation_goes_from_long_to_short_in_every_epoch():
    lengths = torch.tensor([5, 9, 2, 7, 9, 3, 4])
    sampler = main.LengthGroupedBatches(lengths, 3)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        assert [*sampler] == [[1, 4, 3], [0, 6], [5, 2]]


def test_a_resumed_epoch_skips_what_was_done():
    progress = types.SimpleNamespace(current=types.SimpleNamespace(ready=0))
    lengths = torch.arange(50)
    sampler = main.LengthGroupedBatches(lengths, 4, seed=3, progress=progress)
    whole = [*sampler]
    assert len(whole) == len(sampler.plan()) == 13
    for done in (1, 5, 13):
        progress.current.ready = 0
        batches = iter(sampler)
        progress.current.ready = (
            done  # as Lightning restores it, after the iterator
        )
        assert [*batches] == whole[done:]

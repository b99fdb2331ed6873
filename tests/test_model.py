"""What the network computes, how it is trained, and what is measured of it."""

import contextlib
import ctypes
import dataclasses
import itertools
import json
import math
import pathlib
import resource
from collections.abc import Callable, Iterator
from types import SimpleNamespace as Stub
from typing import Any

import pytest
import torch
import transformers
from conftest import SETTINGS, call, load_samples, piece_ids
from torch.nn import functional as F
from torch.optim import optimizer as optimizers

import main

Run = Callable[..., pathlib.Path]
Module = main.IMDBSentimentClassifier
EPOCHS, TRAIN = SETTINGS["epochs"], 117  # half of 260 reviews, less a tenth
STEPS = EPOCHS * math.ceil(TRAIN / SETTINGS["batch_size"])


@pytest.fixture
def module(bert, reviews):
    values = SETTINGS | {"dataset": reviews, "model": bert, "optimizer": "adamw"}
    values |= {"text_column": "text", "label_column": "label"}
    return main.IMDBSentimentClassifier(["neg", "pos"], **values)


def draw_ids(module: Module, rows: int, length: int) -> torch.Tensor:
    """Returns <int64>[rows, length] of [CLS], random word-pieces, [SEP]."""
    ids = torch.randint(5, len(module.tokenizer), (rows, length))
    ids[:, 0], ids[:, -1] = (
        module.tokenizer.cls_token_id,
        module.tokenizer.sep_token_id,
    )
    return ids


# Forward


def attend(module: Module, attention: str, patch: pytest.MonkeyPatch) -> None:
    """Has the module, which chooses it itself otherwise, use this attention."""
    module.eval().bert.set_attn_implementation(attention)
    patch.setattr(module.bert, "set_attn_implementation", lambda _: None)


@pytest.mark.parametrize("attention", ["sdpa", "attend"])
def test_padding_does_not_change_logits(module, attention, monkeypatch):
    attend(module, attention, monkeypatch)
    ids = draw_ids(module, 3, 9)
    longer = torch.full((4, 20), module.tokenizer.pad_token_id)
    longer[:3, :9], longer[3] = ids, draw_ids(module, 1, 20)
    with torch.no_grad():
        alone = torch.cat([module(row[None]) for row in ids])
        among = module(longer)
    torch.testing.assert_close(among[:3], alone, atol=1e-5, rtol=0)
    assert (alone[0] - alone[1]).abs().max() > 1e-2  # the weights do tell them apart
    assert among.shape == (4, 2) and among.dtype == torch.float32


@pytest.mark.parametrize("attention", ["sdpa", "attend"])
@pytest.mark.parametrize("padded", [False, True])
def test_logits_and_gradients_equal_those_of_plain_transformers(
    module, tmp_path, attention, padded, monkeypatch
):
    module.export(tmp_path)
    plain = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path, attn_implementation="eager"
    ).eval()
    attend(module, attention, monkeypatch)
    ids, labels = draw_ids(module, 5, 12), torch.tensor([0, 1, 1, 0, 1])
    if padded:
        ids[1, 7:] = ids[4, 3:] = module.tokenizer.pad_token_id
    mask = ids.ne(module.tokenizer.pad_token_id)
    ours, theirs = module(ids), plain(ids, attention_mask=mask).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    for logits in (ours, theirs):
        F.cross_entropy(logits, labels).backward()
    names = dict(plain.named_parameters())
    assert names.keys() == dict(module.bert.named_parameters()).keys()
    for name, parameter in module.bert.named_parameters():
        torch.testing.assert_close(
            parameter.grad, names[name].grad, atol=1e-5, rtol=1e-3, msg=name
        )


@pytest.mark.parametrize("length, keeps", [(256, True), (257, False)])
def test_attention_of_long_reviews_keeps_no_probabilities(length, keeps):
    torch.manual_seed(3)
    shape = (2, 2, length, 3)  # [B, heads, T, H / heads]
    q, k, v, grad = torch.randn(4, *shape, dtype=torch.double)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    mask = torch.arange(length) < torch.tensor([length, 200])[:, None]
    mask = mask[:, None, None]  # [B, 1, 1, T]
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks
    keep = hooks(lambda x: kept.append(x.numel()) or x, lambda x: x)
    with keep, torch.autocast("cpu", torch.bfloat16):
        ours, _ = main.attend(Stub(training=True), *inputs, mask, 0.7)
    assert (max(kept) == 2 * 2 * length * length) == keeps
    ours.transpose(1, 2).backward(grad)
    plain = [x.clone().requires_grad_() for x in (q, k, v)]
    theirs = F.scaled_dot_product_attention(*plain, mask, scale=0.7)
    theirs.backward(grad)
    torch.testing.assert_close(ours.transpose(1, 2), theirs)
    for one, other in zip(inputs, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_the_first_two_batches_are_the_longest_and_the_others_shuffled(module):
    lengths = torch.arange(200)
    plan = main.LengthGroupedBatches(lengths, 8, seed=3).plan()
    means = [lengths[batch].double().mean().item() for batch in plan]
    assert means[:2] == sorted(means, reverse=True)[:2]
    assert means[2:] != sorted(means[2:], reverse=True)


@pytest.mark.parametrize(
    "precision, kind", [("bf16-mixed", "plain"), ("32-true", "fused")]
)
def test_fused_attention_is_left_out_only_where_a_cpu_computes_in_bf16(
    run, monkeypatch, precision, kind
):
    used = set()
    fused = main.sdpa_attention.sdpa_attention_forward
    plain = main.attend_plainly

    def note(name, function):
        def noted(*args, **options):
            used.add((torch.is_grad_enabled(), name))
            return function(*args, **options)

        return noted

    monkeypatch.setattr(
        main.sdpa_attention, "sdpa_attention_forward", note("fused", fused)
    )
    monkeypatch.setattr(main, "attend_plainly", note("plain", plain))
    run(debug=True, precision=precision)
    assert used == {(True, kind), (False, kind)}


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's alone")
def test_freed_memory_is_used_again_without_asking_the_kernel(module):
    def page_faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(5 * 2**20) for _ in range(4)]  # 20 MB each
        del blocks
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(page_faults() for _ in range(5)) < 100  # else 20,000


def test_parameters_are_float32_even_from_a_bfloat16_checkpoint(bert, tmp_path):
    half = transformers.BertModel.from_pretrained(bert, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    settings = {"model": str(tmp_path), "label_names": ["a", "b"], "seq_length": 3}
    kinds = {p.dtype for p in main.load_bert(settings, trained=False).parameters()}
    assert kinds == {torch.float32}


@pytest.mark.parametrize("longest, padded", [(8, 8), (9, 16), (33, 40), (41, 43)])
def test_batches_are_padded_to_eights_but_not_beyond_the_limit(module, longest, padded):
    module.hparams.seq_length = 43
    rows = {"input_ids": [[7] * longest, [7] * 3], "label": [1, 0], "row": [5, 2]}
    batch = module.collate(rows)
    assert batch["input_ids"].shape == (2, padded)
    pad = module.tokenizer.pad_token_id
    assert batch["input_ids"].ne(pad).sum(1).tolist() == [longest, 3]
    assert batch["labels"].tolist() == [1, 0] and batch["rows"].tolist() == [5, 2]


def test_logits_are_float32_also_where_the_network_computes_in_bf16(module):
    with torch.autocast("cpu", torch.bfloat16):
        assert module(draw_ids(module, 2, 9)).dtype == torch.float32


def test_the_seed_draws_the_classifier(bert):
    seeds = [SETTINGS | {"model": bert, "seed": seed} for seed in (3, 3, 4)]
    modules = [
        main.IMDBSentimentClassifier(["neg", "pos"], **settings) for settings in seeds
    ]
    first, again, other = (module.bert.classifier.weight for module in modules)
    assert first.equal(again) and not first.equal(other)


@pytest.mark.parametrize(
    "truncation, side",
    [("tail", "left"), ("head", "right")],
)
def test_an_export_cuts_on_the_side_that_training_cut(bert, tmp_path, truncation, side):
    settings = SETTINGS | {"model": bert, "truncation": truncation}
    main.IMDBSentimentClassifier(["neg", "pos"], **settings).export(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["truncation_side"] == side


# Dropout


def test_our_dropout_follows_each_hidden_layer_and_none_the_attention(module):
    shares = {
        name: dropout.p
        for name, dropout in module.named_modules()
        if isinstance(dropout, torch.nn.Dropout)
    }
    assert {type(module.get_submodule(name)) for name in shares} == {main.Dropout}
    of_attention = [name for name in shares if name.endswith("self.dropout")]
    assert len(of_attention) == 2  # layers
    for name, share in shares.items():
        assert share == (0 if name in of_attention else 0.1)


def test_dropout_is_drawn_anew_for_each_seed_step_and_process(module):
    drawn = set()
    for seed, step, rank in itertools.product((3, 4), (0, 1), (0, 1)):
        module.hparams.seed = seed
        module.trainer = Stub(global_step=step, global_rank=rank)
        module.on_train_batch_start({}, 0)
        drawn.add(torch.initial_seed())
    assert len(drawn) == 8


def test_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(3)
    for share in (0.0, 0.1, 0.5):
        x = torch.full((401, 501), 2.0)  # 200,901 elements, not a multiple of four
        out = main.Dropout(share)(x)
        zeros = out == 0
        assert zeros.double().mean().item() == pytest.approx(share, abs=0.005)
        assert zeros.double().mean(0).max() < share + 0.2  # in no place more
        assert out.double().mean().item() == pytest.approx(2, abs=0.02)
        torch.testing.assert_close(out[~zeros], x[~zeros] / (1 - share))


def test_dropout_passes_gradients_where_it_passes_values():
    x = torch.ones(999, requires_grad=True)
    out = main.Dropout(0.3)(x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, out.detach())


def test_dropout_saves_one_byte_an_element_for_the_gradient():
    x = torch.ones(999, requires_grad=True)
    saved = []
    note = torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x)
    with note:
        main.Dropout(0.3)(x)
    assert [tensor.dtype for tensor in saved] == [torch.bool]


def test_dropout_follows_from_the_torch_seed():
    dropout, x = main.Dropout(0.3), torch.ones(999)
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(dropout(x))
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])
    assert dropout.eval()(x).equal(x)


# A real run, watched


@dataclasses.dataclass
class Notes:
    """What was seen of a run, a list's item for each step."""

    batches: list[torch.Tensor] = dataclasses.field(default_factory=list)
    train_differs: list[bool] = dataclasses.field(default_factory=list)
    val_differs: list[bool] = dataclasses.field(default_factory=list)
    groups: list[list[dict]] = dataclasses.field(default_factory=list)
    norms: list[float] = dataclasses.field(default_factory=list)  # of the gradient
    before: list[list[torch.Tensor]] = dataclasses.field(default_factory=list)
    after: list[list[torch.Tensor]] = dataclasses.field(default_factory=list)
    names: dict[torch.Tensor, str] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def watched() -> Iterator[Notes]:
    """Takes notes of a run's batches, and of what each step does to the parameters."""
    notes, train, validate = Notes(), Module.training_step, Module.validation_step

    def differs(module: Module, batch: dict[str, torch.Tensor]) -> bool:
        """Whether two forward passes differ; leaves the run's random numbers alone."""
        with torch.no_grad(), torch.random.fork_rng():
            return not module(batch["input_ids"]).equal(module(batch["input_ids"]))

    def training_step(module: Module, batch: dict, batch_idx: int) -> torch.Tensor:
        notes.names = {p: name for name, p in module.named_parameters()}
        notes.batches.append(batch["input_ids"])
        notes.train_differs.append(differs(module, batch))
        return train(module, batch, batch_idx)

    def validation_step(module: Module, batch: dict, batch_idx: int) -> None:
        notes.val_differs.append(differs(module, batch))
        validate(module, batch, batch_idx)

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        notes.groups.append([{**group} for group in optimizer.param_groups])
        own = [p for group in optimizer.param_groups for p in group["params"]]
        notes.before.append([p.detach().clone() for p in own])

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        own = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in own if p.grad is not None]
        notes.norms.append(torch.nn.utils.get_total_norm(gradients).item())
        notes.after.append([p.detach().clone() for p in own])

    with (
        pytest.MonkeyPatch.context() as patch,
        optimizers.register_optimizer_step_pre_hook(before),
        optimizers.register_optimizer_step_post_hook(after),
    ):
        patch.setattr(Module, "training_step", training_step)
        patch.setattr(Module, "validation_step", validation_step)
        yield notes


@pytest.fixture(scope="module")
def notes(tmp_path_factory, bert, reviews):
    """Notes of a whole run under `SETTINGS`."""
    logdir = str(tmp_path_factory.mktemp("watched") / "logs")
    with watched() as notes:
        call(dataset=reviews, model=bert, logdir=logdir)
    return notes


def test_dropout_is_on_in_training_and_off_in_validation(notes):
    assert all(notes.train_differs) and len(notes.train_differs) == STEPS
    assert not any(notes.val_differs) and len(notes.val_differs) == 3 * EPOCHS


def test_training_drops_nothing(notes):
    assert sum(map(len, notes.batches)) == EPOCHS * TRAIN
    assert max(map(len, notes.batches)) <= SETTINGS["batch_size"]


def test_the_rate_rises_and_falls_linearly_by_step(notes, trained):
    rates = [[group["lr"] for group in groups] for groups in notes.groups]
    peak, rise = (
        SETTINGS["lr"],
        SETTINGS["warmup"] * STEPS,
    )  # 48 steps, 12 of them up
    for step, factor in (
        (0, 0),
        (1, 1 / 12),
        (6, 0.5),
        (12, 1),
        (30, 0.5),
        (47, 1 / 36),
    ):
        assert rates[step] == [pytest.approx(peak * factor)] * 2
    assert (STEPS, rise, len(rates)) == (48, 12, 48)


def test_weight_decay_spares_vectors_and_momentum_is_the_first_beta(notes):
    for group in notes.groups[0]:
        assert group["betas"] == (SETTINGS["momentum"], 0.999)
        for parameter in group["params"]:
            decay = SETTINGS["weight_decay"] if parameter.ndim > 1 else 0
            assert group["weight_decay"] == decay
    parameters = [p for group in notes.groups[0] for p in group["params"]]
    assert sorted(map(id, parameters)) == sorted(map(id, notes.names))  # each, once


def test_gradients_are_clipped_to_norm_1(notes):
    assert max(notes.norms) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_one_step_moves_every_parameter_and_all_are_float32(run, precision):
    with watched() as notes:
        run(debug=True, warmup=0.0, weight_decay=0.0, precision=precision)
    assert len(notes.batches) == len(notes.before) == 1
    batch = notes.batches[0]
    used = {  # rows of the embeddings; decay being off, the others must stay
        "word": batch[batch != 0].unique(),
        "position": torch.arange(batch.shape[1]),
        "token_type": torch.tensor([0]),
    }
    parameters = [p for group in notes.groups[0] for p in group["params"]]
    assert {*parameters} == {*notes.names}
    moves = zip(parameters, notes.before[0], notes.after[0], strict=True)
    for parameter, before, after in moves:
        assert after.dtype == torch.float32
        moved, name = before != after, notes.names[parameter]
        if "embeddings" in name and "LayerNorm" not in name:
            rows = used[name.split(".")[-2].removesuffix("_embeddings")]
            assert moved.any(1).nonzero()[:, 0].tolist() == rows.tolist(), name
            moved = moved[rows]
        assert moved.double().mean() > 0.9, name


def test_sgd_has_a_constant_rate_and_momentum(run):
    with watched() as notes:
        run(optimizer="sgd", lr=0.011, epochs=1)
    assert len(notes.groups) == STEPS // EPOCHS
    for (group,) in notes.groups:
        assert (group["lr"], group["momentum"]) == (0.011, SETTINGS["momentum"])
        assert group["weight_decay"] == 0 and "betas" not in group


def test_each_process_trains_on_its_share_in_an_order_of_the_seed(module):
    progress = Stub(current=Stub(ready=0))
    loop = Stub(epoch_loop=Stub(batch_progress=progress))
    module.trainer = Stub(predicting=False, fit_loop=loop, world_size=2, global_rank=1)
    module.setup("fit")
    train = module.train_dataloader().sampler
    assert (train.rank, train.world_size, train.seed) == (1, 2, SETTINGS["seed"])
    assert train.progress is progress
    for loader in (module.val_dataloader(), module.test_dataloader()):
        sampler = loader.sampler
        assert (sampler.rank, sampler.world_size, sampler.seed) == (1, 2, None)


def test_the_host_waits_for_the_device_at_logging_steps_only(run, monkeypatch):
    steps, waits = [], []

    def count(name):
        original = getattr(torch.Tensor, name)

        def counted(tensor, *arguments, **options):
            waits.append((len(steps), name))
            return original(tensor, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, counted)

    def training_step(module, batch, batch_idx):
        steps.append(batch_idx)
        return train(module, batch, batch_idx)

    for name in (
        "item",
        "cpu",
        "tolist",
        "numpy",
        "__bool__",
        "__float__",
        "__int__",
    ):
        count(name)
    train = Module.training_step
    monkeypatch.setattr(Module, "training_step", training_step)
    run(epochs=1)
    assert len(steps) == STEPS // EPOCHS
    # From the beginning of step 11 to that of step 20; it is logged at 10 and 20.
    assert [name for step, name in waits if 10 < step < 20] == []
    assert [name for step, name in waits if step == 20]  # it does count


# Metrics


def test_the_loss_is_a_mean_and_the_accuracy_a_share_of_reviews(module, monkeypatch):
    margins = torch.tensor([1.0, 2.0, -3.0, 0.5])  # of neg, which is right
    logits = torch.stack([margins, torch.zeros(4)], 1)
    monkeypatch.setattr(Module, "forward", lambda *_: logits)
    module.trainer = Stub(
        global_step=0, global_rank=0, log_every_n_steps=10, is_last_batch=False
    )
    module.on_train_start()
    labels = torch.zeros(4, dtype=torch.long)
    batch = {"input_ids": draw_ids(module, 4, 9), "labels": labels}
    loss = module.training_step(batch, 0).item()
    mean = sum(math.log(1 + math.exp(-margin)) for margin in margins) / 4
    assert loss == pytest.approx(mean)
    # A second batch of two: the epoch's figures are means over all six reviews.
    pair = {"input_ids": draw_ids(module, 2, 9), "labels": 1 - labels[:2]}
    monkeypatch.setattr(Module, "forward", lambda *_: logits[:2])
    second = module.training_step(pair, 1).item()
    epoch = (4 * mean + 2 * second) / 6
    assert module.mean_loss.compute().item() == pytest.approx(epoch)
    assert module.mean_acc.compute().item() == pytest.approx(3 / 6)


def test_speed_counts_the_word_pieces_of_all_processes_without_padding(
    module, monkeypatch
):
    shown = {}
    optimizer = Stub(param_groups=[{"lr": 0.0}])
    module.trainer = Stub(
        world_size=3,
        global_step=9,
        global_rank=0,
        log_every_n_steps=10,
        is_last_batch=False,
        loggers=[],
    )
    monkeypatch.setattr(Module, "log_dict", lambda _, kept, **__: shown.update(kept))
    monkeypatch.setattr(Module, "logger", None)
    monkeypatch.setattr(Module, "optimizers", lambda _: optimizer)
    monkeypatch.setattr("time.perf_counter", lambda: 100.0)
    module.on_train_start()
    ids = draw_ids(module, 2, 20)
    ids[1, 12:] = module.tokenizer.pad_token_id
    monkeypatch.setattr("time.perf_counter", lambda: 102.0)
    module.training_step({"input_ids": ids, "labels": torch.tensor([0, 1])}, 9)
    assert shown["speed"] == 3 * (20 + 12) / 2


def test_metrics_equal_a_plain_loop_over_reviews(trained, bert, reviews):
    results = json.loads((trained / "results.json").read_text())
    samples = load_samples(reviews, SETTINGS["percent"], SETTINGS["seed"])
    assert (len(samples["val"]), len(samples["test"])) == (
        13,
        47,
    )  # ragged, by tens
    tokenizer = transformers.BertTokenizer.from_pretrained(bert)
    model = transformers.BertForSequenceClassification.from_pretrained(
        trained / "model"
    ).eval()
    cut = SETTINGS["seq_length"], SETTINGS["truncation"]
    for part in ("val", "test"):
        losses, sure, right = [], [], []
        confusion = [[0, 0], [0, 0]]
        for review in samples[part]:
            ids = torch.tensor([piece_ids(tokenizer, review["text"], *cut)])
            with torch.no_grad():
                probabilities = model(ids).logits[0].softmax(-1).tolist()
            label, predicted = (
                review["label"],
                probabilities[1] > probabilities[0],
            )
            losses.append(-math.log(probabilities[label]))
            sure.append(max(probabilities))
            right.append(label == predicted)
            confusion[label][predicted] += 1
        f1 = [
            2
            * confusion[k][k]
            / (sum(confusion[k]) + confusion[0][k] + confusion[1][k])
            for k in (0, 1)
        ]
        ece = 0.0  # over 15 bins of certainty
        for low in range(15):
            inside = [i for i, p in enumerate(sure) if low / 15 < p <= (low + 1) / 15]
            ece += abs(sum(sure[i] - right[i] for i in inside)) / len(sure)
        plain = {
            f"{part}_loss": sum(losses) / len(losses),
            f"{part}_acc": sum(right) / len(right),
            f"{part}_f1": sum(f1) / 2,
            f"{part}_ece": ece,
        }
        got = {name: results["metrics"][name] for name in plain}
        assert got == pytest.approx(plain, rel=1e-5)
        assert part == "val" or results["confusion"] == confusion

"""BERTs in the shapes that the Hub has: the same word-pieces, the same verdicts."""

import csv
import json
import pathlib
import shutil
from collections.abc import Callable

import datasets
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from conftest import SETTINGS

import main

PIECES = "[PAD] [UNK] [CLS] [SEP] [MASK] . , ! ##s ##ly a the Film film FILM fine Fine"
PIECES += (
    " Café café cafe caf ##é ##e 东 京 東 Zoë Zoe zoe awful Awful ##ness is Is was"
)
SPECIAL = ("PAD", "UNK", "CLS", "SEP", "MASK")
VOCABULARY = {piece: number for number, piece in enumerate(PIECES.split())}
TEXTS = [
    "The Film was fine, Café Zoë is awful!",
    "a FILM is films  finely , awfulness",
    "东京 the film café\tcafe\u0301 Was fine",
    "unknown wörds [MASK] is Is",
    "film fine " * 60,
]
Change = Callable[[pathlib.Path], None]


def build(cased: bool, accents: bool) -> tokenizers.Tokenizer:
    """Returns a tokenizer as its tokenizer.json describes it."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(VOCABULARY, unk_token="[UNK]")
    )
    backend.normalizer = tokenizers.normalizers.BertNormalizer(
        lowercase=not cased, strip_accents=not accents, handle_chinese_chars=True
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", VOCABULARY["[SEP]"]), ("[CLS]", VOCABULARY["[CLS]"])
    )
    return backend


def save_tokenizer(folder: pathlib.Path, cased: bool, **config: object) -> None:
    """Saves tokenizer.json, and a tokenizer_config.json with these entries."""
    special = {
        f"{name}_token": f"[{name.upper()}]"
        for name in ["pad", "unk", "cls", "sep", "mask"]
    }
    build(cased, accents=True).save(str(folder / "tokenizer.json"))
    text = json.dumps({"model_max_length": 64} | special | config)
    (folder / "tokenizer_config.json").write_text(text)


def cased(folder: pathlib.Path) -> None:
    tokenizer = transformers.BertTokenizer(VOCABULARY, do_lower_case=False)
    tokenizer.save_pretrained(folder)


def multilingual(folder: pathlib.Path) -> None:
    """Its tokenizer.json keeps case and accents, its tokenizer_config is silent."""
    save_tokenizer(folder, cased=True, tokenizer_class="BertTokenizer")


def vocabulary_alone(folder: pathlib.Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))


def generic_class(folder: pathlib.Path) -> None:
    save_tokenizer(folder, cased=True, tokenizer_class="PreTrainedTokenizerFast")


def added_tokens(folder: pathlib.Path) -> None:
    tokenizer = transformers.BertTokenizer(VOCABULARY)
    tokenizer.add_tokens(["wörds", "東京"])
    tokenizer.save_pretrained(folder)


def sentence_transformers(folder: pathlib.Path) -> None:
    """As a folder of that library, whose own files lie beside."""
    tokenizer = transformers.BertTokenizer(VOCABULARY, model_max_length=32)
    tokenizer.save_pretrained(folder)
    (folder / "modules.json").write_text("[]")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")


def exported_by_4(folder: pathlib.Path) -> None:
    """As transformers 4 writes one; it kept special_tokens_map.json and vocab.txt."""
    added = {
        str(number): {"content": f"[{name}]", "special": True}
        for number, name in enumerate(SPECIAL)
    }
    save_tokenizer(
        folder, cased=False, tokenizer_class="BertTokenizer", do_lower_case=True,
        added_tokens_decoder=added, clean_up_tokenization_spaces=True,
        strip_accents=None, tokenize_chinese_chars=True,
    )  # fmt: skip
    vocabulary_alone(folder)
    (folder / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype", "float32")
    config |= {"transformers_version": "4.57.1", "classifier_dropout": None}
    (folder / "config.json").write_text(json.dumps(config))


def exported_by_5(folder: pathlib.Path) -> None:
    transformers.BertTokenizer(VOCABULARY).save_pretrained(folder)


SHAPES = [
    cased,
    multilingual,
    vocabulary_alone,
    generic_class,
    added_tokens,
    sentence_transformers,
    exported_by_4,
    exported_by_5,
]


def make(folder: pathlib.Path, tokenizer: Change, **config: object) -> str:
    """Saves a classifier with random weights, and a tokenizer beside it."""
    torch.manual_seed(1)
    made = transformers.BertConfig(
        vocab_size=len(VOCABULARY) + 2, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, max_position_embeddings=64,
        initializer_range=0.3, id2label={0: "bad", 1: "good"}, **config,
    )  # fmt: skip
    transformers.BertForSequenceClassification(made).save_pretrained(folder)
    tokenizer(folder)
    return str(folder)


def read_tokenizer(model: str) -> transformers.PreTrainedTokenizerFast:
    return main.load_tokenizer({"model": model, "seq_length": 64, "truncation": "head"})


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_a_model_of_any_shape_keeps_its_word_pieces_and_verdicts(
    run, tmp_path, capsys, shape
):
    model = make(tmp_path / "model", shape)
    plain = transformers.AutoTokenizer.from_pretrained(model)
    own = read_tokenizer(model)
    for text in TEXTS:
        text = text.replace("[MASK]", "")  # which to us is text, below
        assert (
            own(text, truncation=True)["input_ids"]
            == (plain(text, truncation=True, max_length=64)["input_ids"])
        )
    texts = [text.replace("[MASK]", "").strip() for text in TEXTS[:4]]
    (tmp_path / "new.txt").write_text("\n".join(texts))
    capsys.readouterr()
    run(predict=str(tmp_path / "new.txt"), model=model, seq_length=64)
    printed = capsys.readouterr().out
    assert printed.startswith("row,label,bad,good\n")  # what else is said is not there
    rows = [*csv.DictReader(printed.splitlines())]
    pipeline = transformers.pipeline("text-classification", model=model, top_k=None)
    for row, answers in zip(rows, pipeline(texts), strict=True):
        assert row["label"] == answers[0]["label"]
        for answer in answers:
            assert float(row[answer["label"]]) == pytest.approx(
                answer["score"], abs=2e-6
            )


def test_long_texts_are_cut_for_a_model_made_elsewhere_as_pipeline_cuts(
    tmp_path, capsys, run
):
    """Its config does not tell how its texts were cut."""
    model = make(tmp_path / "model", exported_by_4)
    text = "film fine awful " * 20 + "Zoe was the café " * 20
    (tmp_path / "new.txt").write_text(text)
    capsys.readouterr()
    run(predict=tmp_path / "new.txt", model=model)
    (row,) = csv.DictReader(capsys.readouterr().out.splitlines())
    pipeline = transformers.pipeline("text-classification", model=model)
    (answer,) = pipeline(text, truncation=True)
    assert row["label"] == answer["label"]
    assert float(row[answer["label"]]) == pytest.approx(answer["score"], abs=2e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_of_any_tokenizer_tags_go_and_special_tokens_are_text(tmp_path, shape):
    own = read_tokenizer(make(tmp_path / "model", shape))
    texts = ["a<br /><br />film <br/> is", "a [SEP] film [MASK]", "film " * 99]
    reviews = datasets.Dataset.from_dict({"text": texts})
    tags, special, long = main.tokenise(reviews, own)["input_ids"][:]
    assert own.convert_ids_to_tokens(tags)[1:-1] == ["a", "film", "is"]
    assert not {*special[1:-1]} & {own.sep_token_id, own.mask_token_id}
    assert len(long) == 64


@pytest.mark.parametrize(
    "shape", [generic_class, added_tokens], ids=lambda s: s.__name__
)
def test_an_export_loads_anywhere_with_the_same_word_pieces(run, tmp_path, shape):
    """transformers 4 knows a tokenizer's class by this name alone."""
    folder = run(model=make(tmp_path / "model", shape), debug=True) / "model"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] in ("PreTrainedTokenizerFast", "BertTokenizer")
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1 and oct(modes.pop()).endswith("44")
    exported = transformers.AutoTokenizer.from_pretrained(folder)
    own = read_tokenizer(str(tmp_path / "model"))
    for text in [*TEXTS[:4], "film [SEP] is"]:
        assert exported(text)["input_ids"] == own(text)["input_ids"]


@pytest.mark.parametrize("pad", [None, "[SEP]", "[UNK]"])
def test_a_tokenizer_whose_padding_is_something_else_is_refused(tmp_path, pad):
    """The mask is made of it: real word-pieces would be hidden."""
    model = make(tmp_path / "model", generic_class)
    file = tmp_path / "model" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": pad}))
    with pytest.raises(SystemExit, match="padding"):
        read_tokenizer(model)


def test_a_head_of_another_kind_is_trained_to_single_labels(run, tmp_path):
    """Else `pipeline` would take the export's logits for several labels."""
    model = make(
        tmp_path / "model", exported_by_5, problem_type="multi_label_classification"
    )
    folder = run(model=model, debug=True) / "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["problem_type"] == "single_label_classification"


def test_a_classifier_of_other_classes_starts_anew_and_says_so(trained, capsys):
    model = str(trained / "model")
    earlier = safetensors.torch.load_file(trained / "model" / "model.safetensors")

    def load(names):
        settings = {"model": model, "label_names": names}
        return main.load_bert(settings, is_trained=False)

    same = load(["neg", "pos"])
    assert same.classifier.weight.equal(earlier["classifier.weight"])
    assert not capsys.readouterr().out
    for names in (["pos", "neg"], ["bad", "good"], ["neg", "pos", "so-so"]):
        other = load(names)
        assert capsys.readouterr().out.count("\n") == 1
        for row in other.classifier.weight:
            assert not row.eq(earlier["classifier.weight"]).any()
        assert [*other.config.id2label.values()] == names
        pooler = other.bert.pooler.dense.weight
        assert pooler.equal(earlier["bert.pooler.dense.weight"])


def test_a_fingerprint_knows_network_and_labels_again(bert, tmp_path):
    """No weight and no word-piece tells of the heads, or of labels exchanged."""
    other = shutil.copytree(bert, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    moved = shutil.copytree(bert, tmp_path / "moved")
    prints = []
    for model, labels, names in (
        (bert, [0, 1], ["neg", "pos"]),
        (moved, [0, 1], ["neg", "pos"]),
        (other, [0, 1], ["neg", "pos"]),
        (bert, [1, 0], ["neg", "pos"]),
        (bert, [0, 1], ["bad", "good"]),
    ):
        module = main.IMDBSentimentClassifier(names, **SETTINGS, model=str(model))
        columns = {"text": ["a film", "a song"], "label": labels, "row": [0, 1]}
        reviews = datasets.Dataset.from_dict(columns)
        module.samples = {"train": main.tokenise(reviews, module.tokenizer)}
        module.configure_model()
        prints.append(module.fingerprint)
    assert prints[0] == prints[1] and len({*prints}) == 4

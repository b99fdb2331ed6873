"""Reviews as people have them: which files are read, as what, and which are refused.

A table of refusals spoils sound files, and gives words that the line must hold.
"""

import csv
import json
import math
import os
import pathlib
import shutil
from typing import Any

import datasets
import pandas
import pytest
from conftest import CSV, ROWS, Case, Change, each, load_samples, load_splits, spoil
from conftest import write_reviews as write

import main

JSONL = "".join(json.dumps({"text": t, "label": k}) + "\n" for t, k in ROWS)
TSV = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in ROWS)
TEXTS = [text for text, _ in ROWS]
LABELS = [str(label) for _, label in ROWS]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def both(content: str | bytes, kind: str = "csv") -> dict[str, Change]:
    """Returns files that take the place of the sound ones."""
    files = {f"data/{part}.{kind}": content for part in ("train", "test")}
    return {"data/*": None} | files


def train(more: str) -> dict[str, Change]:
    return {"data/train.csv": CSV + more}


def labels_of(reviews: datasets.Dataset) -> list[str]:
    return reviews.features["label"].int2str(reviews["label"][:])


def rows_of(file: str, **columns: str) -> list[tuple[str, str]]:
    """Returns texts and labels of a file, as they are read."""
    (split,) = load_splits(file, **columns).values()
    return [*zip(split["text"][:], labels_of(split), strict=True)]


def predicted(file: str) -> list[str]:
    """Returns the texts that --predict would label."""
    return [row["text"] for row in main.read_rows("--predict", file, {"text": "text"})]


# Refused. Forty sound rows precede what is broken.

BROKEN_CARD = "---\nconfigs: [\n---\n"
EVIL_CARD = """---
configs:
- config_name: ../../../evil
  data_files: [{split: train, path: a.csv}, {split: test, path: a.csv}]
---
"""
DATA = {
    "an empty folder": Case(["expected train.csv in it"], {"data/*": None}),
    "a card that leads elsewhere": Case(
        ["expected train.csv in it"],
        {"data/*": None, "data/a.csv": CSV, "data/README.md": EVIL_CARD}),
    "a loading script": Case(
        ["expected train.csv in it"],
        {"data/*": None, "data/data.py": "1", "data/__init__.py": ""}),
    "no train file": Case(["named train", "['test']"], {"data/train.csv": None}),
    "csv and jsonl": Case(
        ["one file of train", "train.csv and train.jsonl"],
        {"data/train.jsonl": JSONL}),
    "val and dev": Case(
        ["one file of val", "dev.csv and val.csv"],
        {"data/val.csv": CSV, "data/dev.csv": CSV}),
    "a csv without rows": Case(["no reviews"], both("text,label\n")),
    "a csv without a byte": Case(["train.csv", "no reviews"], both("")),
    "a jsonl without a byte": Case(["train.jsonl", "no reviews"], both("", "jsonl")),
    "a tsv without a byte": Case(["train.tsv", "no reviews"], both("", "tsv")),
    "a parquet without a byte": Case(["train.parquet"], both("", "parquet")),
    "a row of four cells": Case(
        ["line 42", "expected 2 columns, found 4"], train("1,2,3,4\n")),
    "a comma too many": Case(["line 42", "in marks"], train("a film, say,1\n")),
    "a row of one cell": Case(["line 42", "2 columns, found 1"], train("a film\n")),
    "an open quote": Case(["line 42", "end of data"], train('"a film,1\n')),
    "a backslash before a mark": Case(
        ["line 43", "doubled"], train('"a ""film\\"",1\n"a fine film",0\n')),
    "latin-1": Case(["UTF-8"], both(CSV.encode() + "café,1\n".encode("latin-1"))),
    "UTF-16": Case(["UTF-8"], both(CSV.encode("utf-16"))),
    "a latin-1 tsv": Case(["UTF-8"], both(f"{TSV}é\t1\n".encode("latin-1"), "tsv")),
    "a latin-1 jsonl": Case(["UTF-8"], both(
        JSONL.encode() + '{"text": "é"}'.encode("latin-1"), "jsonl")),
    "two columns of texts": Case(
        ["one column text, found several"], both("text,label,text\n" + "a,1,b\n" * 9)),
    "two columns of labels": Case(["one column label, found several"],
        both("text\tlabel\tlabel\n" + "a\t1\t2\n" * 9, "tsv")),
    "one column for both": Case(["--text_column and --label_column are both text"], {},
                                {"label_column": "text"}),
    "a csv of another name with a comma too many": Case(
        ["line 2", "found 3"],
        {"data/*": None, "data/a.csv": "text,label\n" + "fine, film,pos\n" * 9}),
    "a broken jsonl": Case(["line 41", "JSON"], both(JSONL + '{"text": "', "jsonl")),
    "a jsonl of lists": Case(["line 1", "JSON"], both("[1, 2]\n[3, 4]\n", "jsonl")),
    "a jsonl of words": Case(["line 2", "object"], both('{"text": "a"}\n"b"', "jsonl")
        | {"data/train.jsonl": '{"text": "a", "label": 1}\n"b"\n'}),
    "a broken parquet": Case(["train.parquet"], both(b"PAR1 and so on", "parquet")),
    "no text": Case(["no column text", "['review', 'label']", "--text_column"],
                    both(CSV.replace("text", "review"))),
    "no label": Case(["no column label", "--label_column"],
                     both(CSV.replace("label", "stars"))),
    "no label in test": Case(
        ["test.csv", "['text', 'stars']", "--label_column", "--predict"],
        {"data/test.csv": CSV.replace("label", "stars")}),
    "no label in a parquet": Case(["no column label", "['text']"], {
        "data/*": None, "data/train.parquet": lambda _: b""}),
    "semicolons": Case(["['text;label']", "commas"], both(CSV.replace(",", ";"))),
    "no key in a line": Case(["no column label", "line 41"], both(
        JSONL + '{"text": "a"}\n', "jsonl")),
    "no header": Case(["first line", "a boring film 0"],
                      both(CSV.partition("\n")[2])),
    "labels missing": Case(
        ["2 rows lack a label, lines 42, 44"], train("a,\na,1\nb,\n")),
    "a blank label": Case(["lack a label", "lines 1, 3, 5"], both(
        JSONL.replace(": 0}", ': " "}').replace(": 1}", ': "good"}'), "jsonl")),
    "null labels": Case(["1 rows lack a label, lines 41", "--predict"], both(
        JSONL + '{"text": "a", "label": null}', "jsonl")),
    "labels that are lists": Case(["label holds [1]", "line 1"], both(
        JSONL.replace('"label": 0', '"label": [1]'), "jsonl")),
    "texts that are lists": Case(["text holds ['a']", "line 41"], both(
        JSONL + '{"text": ["a"], "label": 1}\n', "jsonl")),
    "a label that only test knows": Case(
        ["test has ['7']", "['0', '1']"], {"data/test.csv": CSV + "a film,7\n"}),
    "a label that only val knows": Case(
        ["val has ['7']"], {"data/dev.csv": CSV + "a film,7\n"}),
    "names in test, numbers in train": Case(
        ["test has ['neg', 'pos']", "['0', '1']"],
        {"data/test.csv": CSV.replace(",0\n", ",neg\n").replace(",1\n", ",pos\n")}),
    "commas without quotes": Case(["line 2", "found 3", "in marks"], both(
        "text,label\n" + "fine, and touching,1\nbad, and stale,0\n" * 20)),
    "one class": Case(["two classes", "['1']"], both(CSV.replace(",0\n", ",1\n"))),
    "another ending": Case(["expected one of .csv"], {"data.xlsx": "PK"},
                           {"dataset": "data.xlsx"}),
    "texts by line": Case(["expected one of .csv"], {"data.txt": "a\nb\n"},
                          {"dataset": "data.txt"}),
    "an unreadable name": Case(["--dataset=nowhere.csv: no such file"], {},
                               {"dataset": "nowhere.csv"}),
}  # fmt: skip
DATA["no label in a parquet"].files.clear()


@each(DATA)
def test_data_are_refused(refused, case):
    if case is DATA["no label in a parquet"]:
        write(pathlib.Path("data"), "parquet", {"text": ["a", "b"]}, None)
        os.remove("data/train.csv")
    if "label_column" not in case.flags:
        case.words[:0] = ["main.py: --dataset="]
    refused(case, **{"dataset": "data", "percent": 100} | case.flags)


SMALL = {
    "ten reviews": Case(
        ["test: 10 % of 10 reviews", "2 classes", "20 such reviews are needed"],
        {"data/*": None, "data/train.csv": "text,label\n" + "a,0\nb,1\n" * 5}),
    "a class of one review": Case(
        ["val: 10 % of 41", "class '2', the rarest, has 1", "2 of each are needed"],
        both(CSV + "a film,2\n")),
    "a class of one test review": Case(
        ["test: 50 % of 41", "class '2', the rarest, has 1"],
        {"data/train.csv": CSV + "a film,2\n" * 9, "data/test.csv": CSV + "b,2\n"},
        {"percent": 50}),
    "a small share": Case(
        ["1 % of 40 reviews", "200 such reviews are needed", "--percent"], {},
        {"percent": 1}),
    "a share too large": Case(
        ["99 % of 40 reviews", "--percent"], {}, {"percent": 99}),
    "a class too small for the share": Case(
        ["--percent=20", "class rare"], train("a,rare\nb,rare\n"),
        {"percent": 20}),
    "text and label swapped": Case(
        ["class 'a ", "has 1"], {},
        {"text_column": "label", "label_column": "text"}),
}  # fmt: skip


@each(SMALL)
def test_too_few_reviews_are_refused_and_what_is_needed_is_told(refused, case):
    refused(case, **{"dataset": "data", "percent": 100} | case.flags)


def test_a_refusal_is_short_whatever_the_data_hold(refused):
    long = "x" * 10**6
    rows = "".join(f"{n} {long},{n} {long}\n" for n in range(12))
    refused(Case(["class"], both("text,label\n" + rows)), dataset="data", percent=100)
    header = ",".join(f"column {n} {long}" for n in range(9))
    refused(
        Case(["no column text"], both(f"{header}\n{header}\n")),
        dataset="data",
        percent=100,
    )


@pytest.mark.parametrize("part", ["train", "test"])
def test_labels_of_minus_one_are_refused(refused, part):
    labels = {"train": [0, 1] * 20, "test": [0, 1] * 20}
    labels[part] = [*[0, 1] * 19, -1, -1]
    columns = {p: {"text": ["a"] * 40, "label": labels[p]} for p in labels}
    write(pathlib.Path("parquet"), "parquet", **columns, names=["neg", "pos"])
    words = [f"{part}: 2 rows lack a label, lines 39, 40"]
    refused(Case(words), dataset="parquet", percent=100)


NO_WORDS = {
    "bytes": [b"a film", b"a song"] * 20,
    "lists": [["a"], ["b"]] * 20,
    "structs": [{"x": "a"}, {"x": "b"}] * 20,
}


@pytest.mark.parametrize("column", ["text", "label"])
@pytest.mark.parametrize("kind", NO_WORDS)
def test_a_parquets_columns_that_hold_no_words_are_refused(refused, column, kind):
    columns = {"text": TEXTS, "label": LABELS, column: NO_WORDS[kind]}
    pandas.DataFrame(columns).to_parquet("own.parquet")
    refused(Case([f"expected words in {column}"]), dataset="own.parquet")
    if column == "text":
        model = "logs/imdb/version_0/model"
        refused(Case(["line 1: text holds"]), predict="own.parquet", model=model)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_nan_is_a_missing_label(refused, kind):
    table = pandas.DataFrame(
        {"text": TEXTS, "label": [1.0, 2.0] * 19 + [1.0, math.nan]}
    )
    table.to_parquet("own.parquet")
    rows = table.to_dict("records")
    spoil({"own.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    refused(Case(["1 rows lack a label, lines 40"]), dataset=f"own.{kind}")


# Read, as what they are.

READ = {
    "labels that look like numbers": ["007", "7", "1.0", "1"],
    "labels that look like truth": ["True", "False", "true"],
    "labels that look like nothing": ["None", "null", "NA", "nan"],
    "labels of several words": ["so so", "very good"],
}


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
@each(READ)
def test_labels_and_texts_are_words(case, kind):
    labels = case * 12
    texts = [["None", "null", "NA", "1.0", "007"][n % 5] for n in range(len(labels))]
    if kind == "jsonl":
        rows = [{"text": t, "label": k} for t, k in zip(texts, labels, strict=True)]
        spoil({"own.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    else:
        mark = {"csv": ",", "tsv": "\t"}[kind]
        rows = [mark.join(row) for row in zip(texts, labels, strict=True)]
        spoil({f"own.{kind}": "\n".join([f"text{mark}label", *rows])})
    assert rows_of(f"own.{kind}") == [*zip(texts, labels, strict=True)]


def test_json_values_are_words_of_their_own():
    labels = [True, 1, 1.0, "1", False]
    rows = [{"text": n, "label": label} for n, label in enumerate(labels)]
    spoil({"own.jsonl": "\n".join(map(json.dumps, rows))})
    words = ["True", "1", "1.0", "1", "False"]
    assert rows_of("own.jsonl") == [*zip("01234", words, strict=True)]


def test_a_json_list_is_read_as_its_lines_are():
    rows = [{"text": text, "label": label} for text, label in ROWS]
    spoil({"list.json": json.dumps(rows, indent=1), "lines.json": JSONL})
    assert rows_of("list.json") == rows_of("lines.json") == [*zip(TEXTS, LABELS)]  # noqa: B905


def test_numbers_are_ordered_by_value_and_words_by_letter():
    for labels, names in (("10 9 -1", "-1 9 10"), ("10 9 b", "10 9 b")):
        rows = "".join(f"a,{label}\n" for label in labels.split() * 2)
        spoil({"own.csv": f"text,label\n{rows}"})
        train = load_splits("own.csv")["train"]
        assert train.features["label"].names == names.split()


MARKS = ['"', 'a "fine" film', '"fine"', '"a', 'a"', 'said "', '"" b', "it's"]


def test_every_line_of_a_tsv_with_stray_marks_is_a_row():
    """As GLUE's and Kaggle's are: their quotation marks belong to the texts."""
    texts = [MARKS[n % len(MARKS)] for n in range(100)]
    rows = [f"{text}\t{n % 2}\n" for n, text in enumerate(texts)]
    spoil({"own.tsv": "text\tlabel\n" + "".join(rows)})
    assert [text for text, _ in rows_of("own.tsv")] == texts
    assert predicted("own.tsv") == texts


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_what_pandas_quotes_is_read_as_it_was(kind):
    texts = [f"{text}, {n}" for n, text in enumerate(MARKS * 5)]
    table = pandas.DataFrame({"text": texts, "label": ["a", "b"] * 20})
    table.to_csv(f"own.{kind}", sep={"csv": ",", "tsv": "\t"}[kind])
    assert [text for text, _ in rows_of(f"own.{kind}")] == texts
    assert predicted(f"own.{kind}") == texts


def test_columns_that_nobody_asked_for_may_hold_anything():
    rows = [{"text": t, "label": k, "votes": n} for n, (t, k) in enumerate(ROWS)]
    rows[30]["votes"] = {"thanks": ["a"]}
    del rows[31]["votes"]
    spoil({"own.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    assert rows_of("own.jsonl") == [*zip(TEXTS, LABELS, strict=True)]
    votes = [str(n) for n in range(len(ROWS))]
    votes[30] = "thanks"
    lines = [f"{v},{t},{k}\n" for v, (t, k) in zip(votes, ROWS, strict=True)]
    spoil({"own.csv": "votes,text,label\n" + "".join(lines)})
    assert rows_of("own.csv") == [*zip(TEXTS, LABELS, strict=True)]


def test_one_file_with_other_columns_is_enough():
    """As Kaggle's "IMDB Dataset.csv" is."""
    spoil({"IMDB Dataset.csv": CSV.replace("text,label", "review,sentiment") * 1})
    columns = {"text_column": "review", "label_column": "sentiment"}
    assert rows_of("IMDB Dataset.csv", **columns) == [*zip(TEXTS, LABELS, strict=True)]


def test_a_tenth_of_train_is_test_where_there_is_none(run, capsys):
    spoil({"own.csv": CSV})
    found = json.loads(
        (run(dataset="own.csv", percent=None) / "results.json").read_text()
    )
    assert {part: sum(n.values()) for part, n in found["samples"].items()} == {
        "train": 32, "val": 4, "test": 4
    }  # fmt: skip
    assert found["flags"]["percent"] == 100
    assert "no test split: a tenth of train was drawn for it" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["validation.csv", "val.csv", "Dev.CSV", "VALID.csv"])
def test_a_validation_file_is_validated_on(name):
    val = CSV.replace("film", "song")
    spoil({"data/train.csv": CSV, "data/test.csv": CSV, f"data/{name}": val})
    samples = load_samples("data", 100, seed=3)
    assert len(samples["train"]) == len(samples["test"]) == len(samples["val"]) == 40
    assert all("song" in text for text in samples["val"]["text"])
    assert len(load_samples("data", 50, seed=3)["val"]) == 20


def test_a_split_for_validation_in_the_hubs_layout_is_validated_on():
    files = {f"data/{p}-0-of-1.csv": CSV for p in ("train", "test", "validation")}
    spoil({f"hub/{name}": content for name, content in files.items()})
    samples = load_samples("hub", 100, seed=3)
    assert {part: len(sample) for part, sample in samples.items()} == {
        "train": 40, "val": 40, "test": 40
    }  # fmt: skip


@pytest.mark.parametrize("names", ["Train.csv TEST.csv", "TRAIN.CSV test.CSV"])
def test_names_are_read_in_any_case_of_letters(names):
    spoil({f"data/{name}": CSV for name in names.split()})
    assert {*load_splits("data")} == {"train", "test"}


def test_empty_texts_are_taken_and_told(run, capsys):
    spoil({"own.csv": CSV + ",1\n,0\n" + '" ",1\n'})
    run(dataset="own.csv", percent=100, debug=True)
    assert "3 are empty" in capsys.readouterr().out
    more = '{"text": null, "label": 1}\n{"text": "", "label": 0}\n'
    spoil({"own.jsonl": JSONL + more})
    assert rows_of("own.jsonl")[-2:] == [("", "1"), ("", "0")]


def test_null_texts_of_a_parquet_are_empty(tokenizer):
    columns = {"text": ["a film", None] * 20, "label": ["a", "b"] * 20}
    write(pathlib.Path("data"), "parquet", columns, None)
    samples = load_samples("data", 100, seed=3)
    assert main.count_oddities(samples)["empty"] == 20
    lengths = [
        n for s in main.tokenise(samples, tokenizer).values() for n in s["length"]
    ]
    assert sorted(lengths) == [2] * 20 + [4] * 20  # [CLS] and [SEP] among them


def test_blank_lines_are_no_reviews_to_train_on():
    lines = CSV.replace("film 3,1\n", "film 3,1\n\n")
    spoil({"own.csv": lines + "\n\n", "own.jsonl": JSONL.replace("}\n", "}\n\n")})
    assert len(rows_of("own.csv")) == len(rows_of("own.jsonl")) == 40


TO_LABEL = {
    "blank lines": ("new.csv", "text\na\n\n\nb\n", ["a", "", "", "b"]),
    "blank lines among cells": ("new.csv", "n,text\n1,a\n\n3,b\n", ["a", "", "b"]),
    "empty cells": ("new.csv", 'n,text\n1,\n2,""\n3,b\n', ["", "", "b"]),
    "empty cells of a tsv": ("new.tsv", "n\ttext\n1\t\n2\tb\n", ["", "b"]),
    "nulls": ("new.jsonl", '{"text": null}\n{"text": "b"}\n', ["", "b"]),
    "blank lines of a text": ("new.txt", "a\n\n \nb", ["a", "", " ", "b"]),
    "labels beside": ("new.csv", CSV, TEXTS),
}


@pytest.mark.parametrize("case", TO_LABEL.values(), ids=TO_LABEL)
def test_each_row_to_label_is_a_row(case):
    name, content, texts = case
    spoil({name: content})
    assert predicted(name) == texts


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_labelling_reads_what_training_reads(kind):
    texts = [f"{text}, {n} é 🎬" for n, text in enumerate(MARKS * 5)]
    columns = {"text": texts, "label": ["a", "b"] * 20, "n": [*range(40)]}
    if kind == "tsv":
        pandas.DataFrame(columns).to_csv("own.tsv", sep="\t", quoting=csv.QUOTE_MINIMAL)
    else:
        write(pathlib.Path(), kind, columns, None)
        os.rename(f"train.{kind}", f"own.{kind}")
    assert predicted(f"own.{kind}") == [text for text, _ in rows_of(f"own.{kind}")]
    assert predicted(f"own.{kind}") == texts


def test_acl_imdbs_own_tree_is_read():
    rows = [(n, ("neg", "pos")[n % 2]) for n in range(12)]
    for part in ("train", "test"):
        spoil({f"aclImdb/{part}/{k}/{n}_1.txt": f"{part} {k} {n}" for n, k in rows})
    spoil({"aclImdb/train/.ipynb_checkpoints/1_1.txt": "a copy"})
    spoil({"aclImdb/train/pos/._1_1.txt": b"\0\xff"})
    spoil({f"aclImdb/train/unsup/{n}_0.txt": "nobody judged this" for n in range(9)})
    spoil({"aclImdb/imdb.vocab": "the", "aclImdb/train/urls_pos.txt": "http://x"})
    splits = load_splits("aclImdb")
    for part, split in splits.items():
        assert split.features["label"].names == ["neg", "pos"]
        found = [*zip(split["text"][:], labels_of(split), strict=True)]
        assert sorted(found) == sorted((f"{part} {k} {n}", k) for n, k in rows)


def test_half_an_emoji_is_kept_as_a_question_mark():
    spoil({"own.jsonl": JSONL + r'{"text": "a film \ud83d", "label": 1}'})
    assert rows_of("own.jsonl")[-1] == ("a film ?", "1")
    assert predicted("own.jsonl")[-1] == "a film ?"


def test_a_folder_of_one_table_of_any_name_is_read_as_the_table_is():
    odd = CSV + "NA,007\nnull,True\n1.50,007\n"
    spoil({"folder/reviews.csv": odd, "alone.csv": odd})
    assert rows_of("folder") == rows_of("alone.csv")
    os.chdir("folder")
    assert rows_of(".") == rows_of("../alone.csv")


def test_tables_in_a_folder_named_like_a_table_are_read():
    """As Spark writes them."""
    halves = CSV.splitlines(keepends=True)
    spoil({"data/train.csv/part-0.csv": "".join(halves[:21])})
    spoil({"data/train.csv/part-1.csv": halves[0] + "".join(halves[21:])})
    assert rows_of("data/train.csv") == [*zip(TEXTS, LABELS, strict=True)]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "tsv", "parquet"])
def test_a_file_replaced_under_its_old_time_is_read_anew(kind):
    for word in ("film", "song"):
        texts = [text.replace("film", word) for text in TEXTS]
        table = pandas.DataFrame({"text": texts, "label": LABELS})
        if kind == "parquet":
            table.to_parquet("own.parquet")
        elif kind == "jsonl":
            table.to_json("own.jsonl", orient="records", lines=True)
        else:
            table.to_csv(f"own.{kind}", sep={"csv": ",", "tsv": "\t"}[kind])
        os.utime(f"own.{kind}", (10**9, 10**9))
        assert [text for text, _ in rows_of(f"own.{kind}")] == texts


def test_imdb_gives_the_same_samples_in_every_kind_of_file(reviews):
    """Made-up reviews stand for it: with tags, sorted by label, classes by name."""
    loaded = {}
    for kind in ("parquet", "csv", "tsv", "jsonl"):
        os.mkdir(kind)
        for part in ("train", "test"):
            split = datasets.Dataset.from_parquet(f"{reviews}/{part}.parquet")
            table = split.to_pandas()
            table["label"] = split.features["label"].int2str(split["label"][:])
            if kind == "parquet":
                split.to_parquet(f"{kind}/{part}.parquet")
            elif kind == "jsonl":
                table.to_json(f"{kind}/{part}.jsonl", orient="records", lines=True)
            else:
                mark = {"csv": ",", "tsv": "\t"}[kind]
                table.to_csv(f"{kind}/{part}.{kind}", sep=mark, index=False)
        samples = load_samples(kind, 40, seed=3)
        loaded[kind] = {p: (s["text"][:], labels_of(s)) for p, s in samples.items()}
        assert samples["train"].features["label"].names == ["neg", "pos"]
    assert all(found == loaded["parquet"] for found in loaded.values())


@pytest.mark.parametrize("test", ["neg pos", "pos neg", "neg", "csv"])
@pytest.mark.parametrize("train", ["neg pos", "pos neg", "so-so pos neg", "csv"])
def test_labels_of_test_are_matched_by_name(tmp_path, train, test):
    """A parquet's numbers have names in that order; a csv has the names themselves."""
    for part, names in (("train", train.split()), ("test", test.split())):
        columns = {"text": [], "label": []}
        for number, name in enumerate(["neg", "pos"] if names == ["csv"] else names):
            columns["text"].append(f"called {name}")
            columns["label"].append(name if names == ["csv"] else number)
        files = {"train": None, "test": None, part: columns}
        kind = ("csv", None) if names == ["csv"] else ("parquet", names)
        write(tmp_path, kind[0], files["train"], files["test"], kind[1])
    splits = load_splits(str(tmp_path))
    expected = ["neg", "pos"] if train == "csv" else train.split()
    for split in splits.values():
        assert split.features["label"].names == expected
        assert [f"called {name}" for name in labels_of(split)] == split["text"][:]


SOUND = {
    "neighbours do not join in": {
        "data/train_old.csv": "text,label\nold,1\n", "data/train.csv.bak": CSV,
        "data/old/train.csv": CSV, "data/eval.csv": "text,label\neval,0\n",
        "data/my test notes.csv": "x,y\n1,2\n", "data/test/0.csv": CSV},
    "one csv and one jsonl": {"data/test.csv": None, "data/test.jsonl": JSONL},
    "tabs": both(TSV, "tsv"),
    "a blank line before the header": both("\n" + CSV),
    "carriage returns": both(CSV.replace("\n", "\r\n")),
    "carriage returns alone": both(CSV.replace("\n", "\r")),
    "carriage returns among tabs": both(TSV.replace("\n", "\r\n"), "tsv"),
    "capitals in the ending": both(CSV, "CSV"),
    "a byte order mark": both("\ufeff" + CSV),
    "a byte order mark among tabs": both("\ufeff" + TSV, "tsv"),
    "a byte order mark in a jsonl": both("\ufeff" + JSONL, "jsonl"),
    "a card without yaml": {"data/README.md": "# Reviews\n"},
    "a card with broken yaml": {"data/README.md": BROKEN_CARD},
    "a card that names other files": {"data/a.csv": CSV, "data/README.md": EVIL_CARD},
    "the Hub's layout": both(CSV) | {
        "data/*": None, "data/data/train-0-of-1.csv": CSV, "data/data/test-0.csv": CSV},
}  # fmt: skip


@each(SOUND)
@pytest.mark.parametrize("dataset", ["data", "."])
def test_train_and_test_are_read_and_nothing_else(place, case, dataset):
    spoil(case)
    os.chdir(place / "data" if dataset == "." else place)
    splits = load_splits(dataset)
    assert {*splits} == {"train", "test"}
    for split in splits.values():
        assert split["text"][:] == TEXTS
        assert labels_of(split) == LABELS


def test_brackets_in_a_path_are_no_pattern():
    other = CSV.replace("film", "book")
    spoil({f"set1/{part}.csv": other for part in ("train", "test")})
    spoil({f"set[1]/{part}.csv": CSV for part in ("train", "test")})
    spoil({"reviews1.txt": "the other\n", "reviews[1].txt": "this one\n"})
    assert load_splits("set[1]")["train"]["text"][0] == TEXTS[0]
    assert predicted("reviews[1].txt") == ["this one"]
    for name in ("p1", "p[1]"):
        columns = {"text": [name] * 2, "label": ["a", "b"]}
        write(pathlib.Path(name), "parquet", columns, None)
    assert {*load_splits("p[1]")["train"]["text"][:]} == {"p[1]"}


def test_a_tilde_is_the_home_of_files_to_read(run, place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    found = run(dataset="~/data", model="~/model", percent=100, debug=True)
    flags = json.loads((found / "results.json").read_text())["flags"]
    assert flags["dataset"] == f"{place}/data" and flags["model"] == f"{place}/model"


# Odd, but sound.

ODD = ["", " \t ", "a fine\0film", "a 🎬 film ❤️", "[PAD] [SEP] [UNK]", "ﷺ\u200b\u202e"]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_odd_reviews_are_kept(run, tmp_path, kind):
    texts = TEXTS + ODD + ["x" * 10**6, "a fine film " * 10**4]
    columns = {"text": texts, "label": [n % 2 for n in range(len(texts))]}
    dataset = write(tmp_path / "data", kind, columns, columns)
    assert load_splits(dataset)["test"]["text"][:] == texts
    folder = run(dataset=dataset, percent=100, epochs=1)
    found = json.loads((folder / "results.json").read_text())
    kept = {part: sum(n.values()) for part, n in found["samples"].items()}
    assert kept["test"] == kept["train"] + kept["val"] == len(texts)
    assert sum(map(sum, found["confusion"])) == len(texts)


def told(run: Any, capsys: pytest.CaptureFixture[str], content: str) -> str:
    spoil({"own.csv": content})
    run(dataset="own.csv", percent=100, debug=True)
    return capsys.readouterr().out.partition("Model")[0]


def test_texts_in_a_script_that_the_model_does_not_know_are_told(run, capsys):
    rows = "".join(f"фильм {'fine' * (n % 2)},{n % 2}\n" for n in range(40))
    said = told(run, capsys, "text,label\n" + rows)
    # Of 3.5 word-pieces a text in mean, one is unknown; samples differ a little.
    assert " of their word-pieces are unknown to this model" in said
    assert 25 <= int(said.partition("% of their")[0].split()[-1]) <= 32
    assert "unknown" not in told(
        run,
        capsys,
        CSV.translate({ord(c): "" for c in "0123456789"})
        .replace(",\n", ",0\n")
        .replace("fine film ,0", "fine film ,1"),
    )


def test_texts_that_span_lines_are_told(run, capsys):
    """Two rows whose quotation marks are stray are one sound row with a line break."""
    stray = '"a film,1\nanother film",0\n'
    assert "1 hold line breaks" in told(run, capsys, CSV + stray)
    assert "line breaks" not in told(run, capsys, CSV)


def test_equal_texts_of_train_with_several_labels_are_told(run, capsys):
    double = "the very same,0\n" * 9 + "the very same,1\n" * 9
    said = told(run, capsys, CSV + double)
    assert "1 texts of train appear in it with several labels" in said
    assert "of val are in train, word for word" in said
    assert "several labels" not in told(run, capsys, CSV + "a,0\nb,1\n")


def test_rows_of_predictions_are_those_of_a_lone_file(run):
    """Of which test is a tenth, drawn at random."""
    spoil({"own.csv": CSV})
    folder = run(dataset="own.csv", percent=100)
    with open(folder / "predictions.csv") as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == 4
    for row in rows:
        assert row["label"] == LABELS[int(row["row"])]
    samples = load_samples("own.csv", 100, seed=3)
    for sample in samples.values():
        texts = zip(sample["row"][:], sample["text"][:], strict=True)
        assert all(TEXTS[row] == text for row, text in texts)


def test_classes_renamed_in_a_tree_are_read_anew():
    for name in ("neg", "bad"):
        spoil({f"tree/train/{name}/1.txt": "a", "tree/train/pos/2.txt": "b"})
        assert name in load_splits("tree")["train"].features["label"].names
        shutil.rmtree("tree")

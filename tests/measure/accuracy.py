"""Measures the accuracy of settings of `main.py` over seeds, on the same test reviews.

    python tests/measure/accuracy.py --dataset=FOLDER --model=FOLDER --out=FOLDER \
        --seeds=0,1,2,3 --grid="--epochs=3; --epochs=5; tfidf"

A setting is flags of `main.py`, one run a seed, whose model then labels the test
reviews by `--predict`; or `tfidf`, scikit-learn's logistic regression of TF-IDF of
words and pairs of words, on 5 % of train, validation reviews included (`tfidf=20`: on
20 %). What each says of each review stays in --out as csv, and is not computed again.

Prints the mean and the standard deviation over seeds, and the differences from the
first setting with their 95 % intervals: over reviews (each one's mean over seeds) and
over seeds (Student's t of each one's mean). No difference unless both agree.
"""

import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
import time

import pandas
from absl import app, flags

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import main as script  # noqa: E402  it defines --dataset and --model

FLAGS = flags.FLAGS
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36)  # Student's, of 2 to 8 seeds


def label_by_main(arguments: list[str], reviews: pathlib.Path) -> pandas.Series:
    """Trains with the arguments; returns the label of each review."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(ROOT / "main.py"),
            f"--logdir={folder}/logs",
        ]
        start = time.perf_counter()
        subprocess.run([*command, *arguments], check=True, stdout=subprocess.DEVNULL)
        print(f"{time.perf_counter() - start:.0f} s from start to end")
        with open(f"{folder}/labels.csv", "wb") as labels:
            predict = [*command, f"--predict={reviews}"]
            subprocess.run(predict, check=True, stdout=labels)
        return pandas.read_csv(f"{folder}/labels.csv", dtype=str)["label"]


def label_by_tfidf(seed: int, percent: int, texts: pandas.Series) -> pandas.Series:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    settings = FLAGS.flag_values_dict() | {"percent": percent, "seed": seed}
    samples = script.load_samples(settings)
    start = time.perf_counter()
    known = samples["train"]["text"][:] + samples["val"]["text"][:]
    numbers = samples["train"]["label"][:] + samples["val"]["label"][:]
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    classifier = LogisticRegression(C=10, max_iter=1000)
    classifier.fit(words.fit_transform(known), numbers)
    predicted = classifier.predict(words.transform(texts))
    print(f"tfidf: {time.perf_counter() - start:.1f} s, reading not counted")
    names = samples["train"].features["label"].names
    return pandas.Series([names[number] for number in predicted])


def are_right(setting: str, seed: str, reviews: pathlib.Path) -> pandas.Series:
    """Returns 1 for each review that the setting's model labels right, else 0."""
    name = re.sub(r"[^\w.=-]+", "_", f"{setting}_{seed}")
    file = pathlib.Path(FLAGS.out, f"{name}.csv")
    table = pandas.read_parquet(reviews)
    if not file.exists():
        if setting.startswith("tfidf"):
            percent = int(setting.partition("=")[2] or 5)
            labels = label_by_tfidf(int(seed), percent, table["text"])
        else:
            ours = [f"--dataset={FLAGS.dataset}", f"--model={FLAGS.model}"]
            arguments = [*ours, f"--seed={seed}", *shlex.split(setting)]
            labels = label_by_main(arguments, reviews)
        pandas.DataFrame({"true": table["name"], "label": labels}).to_csv(file)
    told = pandas.read_csv(file, dtype=str)
    return (told["true"] == told["label"]).astype(float)


def compare(first: pandas.DataFrame, other: pandas.DataFrame) -> str:
    """Returns the difference of two settings; a row a review, a column a seed."""
    difference = 100 * (other - first)
    by_review = difference.mean(axis=1)
    seeds = difference.mean()
    line = f"{seeds.mean():+.2f} points, over reviews ±{1.96 * by_review.sem():.2f}"
    if 1 < len(seeds) <= len(T) + 1:
        line += f", over seeds ±{T[len(seeds) - 2] * seeds.sem():.2f}"
    return line


def main(argv: list[str]) -> None:
    pathlib.Path(FLAGS.out).mkdir(parents=True, exist_ok=True)
    test = script.load_splits(FLAGS.flag_values_dict())["test"]
    if FLAGS.reviews < len(test):
        percent = round(100 * FLAGS.reviews / len(test))
        test, _ = script.draw_share(test, percent, seed=0)
    names = test.features["label"].int2str(test["label"][:])
    settings = [setting.strip() for setting in FLAGS.grid.split(";")]
    tables = {setting: pandas.DataFrame() for setting in settings}
    with tempfile.TemporaryDirectory() as folder:
        reviews = pathlib.Path(folder, "reviews.parquet")
        test.add_column("name", names).to_parquet(reviews)
        for seed in FLAGS.seeds:
            for setting in settings:
                right = are_right(setting, seed, reviews)
                tables[setting][seed] = right
                print(
                    f"seed {seed} {setting}: {100 * right.mean():.2f} %",
                    flush=True,
                )
    for setting, table in tables.items():
        each = 100 * table.mean()
        print(f"{each.mean():.2f} ± {each.std():.2f} %  {setting}")
        if setting != settings[0]:
            print(f"    {compare(tables[settings[0]], table)}")


if __name__ == "__main__":
    flags.DEFINE_string("out", "accuracy", "Folder of what the models say.")
    flags.DEFINE_string("grid", "", "Settings, with ; between them.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of each setting.")
    flags.DEFINE_integer("reviews", 2500, "Test reviews that every model labels.", 10)
    app.run(main)

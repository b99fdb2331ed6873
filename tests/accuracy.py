"""Measures the accuracy of `main.py` over seeds, on a fixed part of the test reviews.

    python tests/accuracy.py --dataset=FOLDER --model=FOLDER --seeds=0,1,2 \
        --grid="--seq_length=128 --truncation=head; --seq_length=256 --truncation=tail"

Each setting is one run of `main.py` a seed. Its exported model then labels, by
`main.py --predict`, the same test reviews for all: twenty times more than a 5 % run
tests by itself, and paired, so that settings differ by less than their intervals say.
Prints a line a run, and for each setting the mean and the spread over seeds.
"""

import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile

import datasets
import pandas
from absl import app, flags

MAIN = str(pathlib.Path(__file__).parents[1] / "main.py")
FLAGS = flags.FLAGS
flags.DEFINE_string("dataset", None, "Folder of reviews.", required=True)
flags.DEFINE_string("model", None, "Folder of a BERT.", required=True)
flags.DEFINE_string("grid", "", "Settings, flags of main.py, with ; between them.")
flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of each setting.")
flags.DEFINE_integer("reviews", 2500, "Test reviews that every model labels.", 10)


def score(arguments: list[str], reviews: pathlib.Path) -> float:
    """Trains with the arguments; returns the share of the reviews labelled right."""
    with tempfile.TemporaryDirectory() as logdir:
        command = [sys.executable, MAIN, f"--logdir={logdir}/logs"]
        subprocess.run([*command, *arguments], check=True, stdout=subprocess.DEVNULL)
        predict = [*command, f"--predict={reviews}"]
        labels = subprocess.run(predict, check=True, stdout=subprocess.PIPE)
        pathlib.Path(logdir, "labels.csv").write_bytes(labels.stdout)
        predicted = pandas.read_csv(f"{logdir}/labels.csv", dtype=str)["label"]
    expected = pandas.read_parquet(reviews)["name"]
    return (predicted == expected).mean()


def main(argv: list[str]) -> None:
    test = datasets.load_dataset(FLAGS.dataset, split="test")
    parts = test.train_test_split(
        train_size=FLAGS.reviews, stratify_by_column="label", seed=0
    )
    names = [test.features["label"].int2str(i) for i in parts["train"]["label"]]
    with tempfile.TemporaryDirectory() as folder:
        reviews = pathlib.Path(folder, "reviews.parquet")
        parts["train"].add_column("name", names).to_parquet(reviews)
        scores: dict[str, list[float]] = {}
        for seed in FLAGS.seeds:
            for setting in FLAGS.grid.split(";"):
                arguments = [f"--dataset={FLAGS.dataset}", f"--model={FLAGS.model}"]
                arguments += [f"--seed={seed}", *shlex.split(setting)]
                scores.setdefault(setting.strip(), []).append(score(arguments, reviews))
                print(
                    f"seed {seed} {setting.strip()}: {scores[setting.strip()][-1]:.4f}"
                )
                sys.stdout.flush()
    for setting, each in scores.items():
        spread = statistics.stdev(each) if len(each) > 1 else float("nan")
        print(f"{100 * statistics.mean(each):.2f} ± {100 * spread:.2f} %  {setting}")


if __name__ == "__main__":
    app.run(main)

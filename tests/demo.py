"""Trains a small new BERT on made-up reviews by `main.py`, without network, in seconds.

    python tests/demo.py                    it learns which words praise a film
    python tests/demo.py --lr=1e-4          with any flags of main.py

The BERT, the reviews and, without --logdir, the logs lie in a temporary folder.
"""

import pathlib
import random
import shlex
import sys
import tempfile

import datasets
import torch
import transformers
from absl import app

MAIN = pathlib.Path(__file__).parents[1] / "main.py"
WORDS = (  # of films: without a judgement, against them, for them
    "a the this that and but with of in it was had film story plot actor scene song "
    "camera director ending hour minute evening family friend city war ship winter",
    "awful boring clumsy dreadful stale tedious shallow hollow",
    "fine brilliant charming superb touching witty splendid gripping",
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make_bert(
    folder: pathlib.Path, hidden: int, positions: int, spread: float
) -> str:
    """Saves an untrained BERT of two layers that knows the words of the reviews."""
    vocabulary = [
        *SPECIAL,
        ".",
        ",",
        "!",
        "##s",
        "##ly",
        *" ".join(WORDS).split(),
    ]
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=4 * hidden,
        max_position_embeddings=positions,
        initializer_range=spread,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    numbers = {piece: number for number, piece in enumerate(vocabulary)}
    transformers.BertTokenizer(numbers).save_pretrained(folder)
    return str(folder)


def make_review(draw: random.Random, label: int, sure: float) -> str:
    """Returns 3 to 90 words, each fifth a judgement; `sure` is the label's share."""
    neutral, against, praise = (words.split() for words in WORDS)
    own, other = (praise, against) if label else (against, praise)
    words = draw.choices(neutral, k=draw.randint(3, 90))
    for place in range(draw.randrange(5), len(words), 5):
        words[place] = draw.choice(own if draw.random() < sure else other)
    words[draw.randrange(len(words))] = draw.choice(own)
    ends = draw.choices(
        ("", "s", "ly", ",", ".", "!", "<br /><br />"), k=len(words)
    )
    return " ".join(word + end for word, end in zip(words, ends, strict=True))


def make_reviews(folder: pathlib.Path, train: int, test: int, sure: float) -> str:
    """Saves made-up reviews, sorted by label as IMDB is, as parquet."""
    draw = random.Random(0)
    names = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features(text=datasets.Value("string"), label=names)
    for part, size in (("train", train), ("test", test)):
        labels = [0] * (size // 2) + [1] * (size - size // 2)
        columns = {
            "text": [make_review(draw, k, sure) for k in labels],
            "label": labels,
        }
        reviews = datasets.Dataset.from_dict(columns, features)
        reviews.to_parquet(folder / f"{part}.parquet")
    return str(folder)


def demo() -> None:
    """Makes BERT and reviews, and hands over to `main.py`, as its command would."""
    sys.path.insert(0, str(MAIN.parent))
    import main

    torch.set_num_threads(1)  # more only slow so small a model down
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="demo-"))
    (folder / "reviews").mkdir()
    settings = {
        "dataset": make_reviews(folder / "reviews", 800, 400, sure=0.85),
        "model": make_bert(
            folder / "bert", hidden=64, positions=128, spread=0.02
        ),
        "logdir": folder / "logs",
        "percent": 100,
        "seq_length": 96,
        "epochs": 4,
        "lr": 1e-3,
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    sys.argv = [str(MAIN), *flags, *sys.argv[1:]]
    print("$", shlex.join(["python", *sys.argv]), flush=True)

    datasets.enable_progress_bars()

    def run(argv: list[str]) -> None:
        main.main(argv)
        print(f"Demo      BERT, reviews and logs of this run lie in {folder}")

    app.run(run, sys.argv)


if __name__ == "__main__":
    demo()

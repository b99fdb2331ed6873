"""With caches filled, `HF_HUB_OFFLINE=1` runs on the Hub's names without a network."""

import pathlib
import shutil

import conftest
import datasets

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill_caches(home: pathlib.Path, bert: str, reviews: str) -> None:
    """Lays out model and dataset as a download from the Hub leaves them."""
    hub = home / "hub" / "models--owner--bert"
    shutil.copytree(bert, hub / "snapshots" / COMMIT)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(COMMIT)
    loaded = datasets.load_dataset(reviews)
    prepared = home / "datasets" / "owner___reviews" / "default" / "0.0.0" / COMMIT
    prepared.mkdir(parents=True)
    for part, split in loaded.items():
        (arrow,) = {file["filename"] for file in split.cache_files}
        shutil.copy(arrow, prepared / f"reviews-{part}.arrow")
    shutil.copy(pathlib.Path(arrow).parent / "dataset_info.json", prepared)


def test_filled_caches_need_no_network(
    bert: str, reviews: str, tmp_path: pathlib.Path
) -> None:
    fill_caches(tmp_path / "home", bert, reviews)
    done = conftest.command(
        "--dataset=owner/reviews",
        "--model=owner/bert",
        "--percent=100",
        "--seq_length=24",
        "--debug",
        cwd=tmp_path,
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path / "home"),
        HF_DATASETS_CACHE=str(tmp_path / "home" / "datasets"),
    )
    assert done.returncode == 0, done.stderr
    assert "Test      accuracy" in done.stdout

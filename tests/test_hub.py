"""Names on the Hub: loaded from it, or from the caches where it is out of reach.

The real client asks a small Hub on this machine. Each test has caches of its own.
"""

import json
import os
import pathlib
import shutil
import socket
import subprocess
from unittest import mock

import datasets
import demo
import huggingface_hub
import pytest
from conftest import command
from hub import Hub

import main

BERT = "google-bert/bert-base-uncased"
IMDB = "stanfordnlp/imdb"
OUT_OF_REACH = "Hub       out of reach ("


class User:
    """Somebody with caches and a folder of work, who runs `main.py` in it."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.home = folder / "home"
        self.work = folder / "work"
        self.work.mkdir()

    def debug(
        self, url: str, *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Walks the whole way on one batch, with the Hub at `url`."""
        return command(
            "--debug",
            "--seq_length=24",
            *arguments,
            cwd=self.work,
            HF_ENDPOINT=url,
            HF_HOME=str(self.home),
            HF_HUB_CACHE=str(self.home / "hub"),
            HF_DATASETS_CACHE=str(self.home / "datasets"),
            NO_PROXY="127.0.0.1",
            **environment,
        )


@pytest.fixture(scope="module")
def repositories(tmp_path_factory, bert):
    """What `main.py` asks for by default; 5 % of these reviews are enough."""
    folder = tmp_path_factory.mktemp("imdb")
    reviews = demo.make_reviews(folder, 800, 400, sure=0.97)
    return {f"models/{BERT}": bert, f"datasets/{IMDB}": reviews}


@pytest.fixture(scope="module")
def first(tmp_path_factory, repositories):
    """A user's first run, from nothing: caches and work, requests and output."""
    user = User(tmp_path_factory.mktemp("first"))
    with Hub(repositories) as hub:
        done = user.debug(hub.url)
    return user, hub.requests, done


@pytest.fixture
def new(tmp_path):
    """A user with empty caches."""
    return User(tmp_path)


@pytest.fixture
def known(new, first):
    """A user whose caches an earlier run has filled."""
    shutil.copytree(first[0].home, new.home, symlinks=True)
    return new


@pytest.fixture
def nowhere():
    """An address where nobody listens, and nobody else can while the test runs."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def ask(monkeypatch):
    """Lets this process ask the Hub at an address, and undoes what a run changes."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    constants = huggingface_hub.constants
    return lambda url: monkeypatch.setattr(constants, "ENDPOINT", url)


def check_success(done: subprocess.CompletedProcess[str]) -> None:
    """Checks that a run came to its end, and complained of nothing."""
    assert done.stderr == ""
    assert done.returncode == 0
    assert done.stdout.count("\nTest      accuracy") == 1


def check_line(line: str, *words: str) -> None:
    """Checks a refusal: it is one line, and holds these words."""
    assert line.startswith("main.py: ") and len(line.splitlines()) == 1, line
    assert [word for word in words if word not in line] == [], line


def check_nothing_is_loaded(line: str, flag: str, name: str) -> None:
    """Checks a refusal without Hub and caches: it says what else can be done."""
    check_line(line, f"--{flag}={name}: not loaded before, and the Hub is out of reach")
    check_line(line, "--model", "--dataset", "tests/demo.py")


# With the Hub in reach


def test_a_first_run_loads_bert_and_5_percent_of_imdb_from_the_hub(first):
    user, requests, done = first
    check_success(done)
    assert OUT_OF_REACH not in done.stdout
    assert f"GET /api/models/{BERT}" in requests
    assert f"GET /api/datasets/{IMDB}" in requests
    loaded = [request.split("/")[-1] for request in requests if "GET" in request]
    for file in ("model.safetensors", "train.parquet", "test.parquet"):
        assert loaded.count(file) == 1
    (results,) = user.work.rglob("results.json")
    flags = json.loads(results.read_text())["flags"]
    found = [flags[name] for name in ("model", "dataset", "percent")]
    assert found == [BERT, IMDB, 5]


@pytest.mark.parametrize("name", ["no/body", "no/bo--dy"])  # the second is no name
@pytest.mark.parametrize("flag", ["model", "dataset"])
def test_a_name_that_is_not_on_the_hub_is_refused(
    flag, name, repositories, ask, run, tmp_path, capfd
):
    with Hub(repositories) as hub, pytest.raises(SystemExit) as exit:
        ask(hub.url)
        run(**{flag: name})
    check_line(exit.value.code, f"--{flag}={name}: not on the Hub")
    assert capfd.readouterr() == ("", "")
    assert [*tmp_path.iterdir()] == []
    assert (f"GET /api/{flag}s/{name}" in hub.requests) == (name == "no/body")


@pytest.mark.parametrize(
    "error", [ValueError("no JSON"), ImportError("no socksio"), OSError("reset")]
)
def test_a_hub_that_cannot_be_asked_is_out_of_reach(monkeypatch, capsys, error):
    """As behind a log-in page, or a proxy that the client does not know."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    api = mock.Mock(**{"model_info.side_effect": error})
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    main.ask_hub({"model": "some/body", "dataset": "some/data"})
    assert capsys.readouterr().out.startswith(f"{OUT_OF_REACH}{error})")
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    api.dataset_info.assert_not_called()  # it is asked once


def test_a_gated_model_is_refused_with_the_hubs_reason(new, repositories):
    with Hub(repositories, is_gated=True) as hub:
        done = new.debug(hub.url)
    check_line(done.stderr, f"--model={BERT}", "gated", "Access to", "is restricted")
    assert (done.returncode, done.stdout) == (1, "")
    assert [*new.work.iterdir()] == []


def test_a_token_that_the_hub_does_not_take_is_refused(
    repositories, ask, run, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with Hub(repositories, failure=401) as hub, pytest.raises(SystemExit) as exit:
        ask(hub.url)
        run(model=BERT)
    check_line(exit.value.code, f"--model={BERT}", "token", "HF_TOKEN")


def test_local_folders_ask_no_hub(new, repositories, bert, reviews):
    with Hub(repositories) as hub:
        done = new.debug(hub.url, f"--model={bert}", f"--dataset={reviews}")
    check_success(done)
    assert OUT_OF_REACH not in done.stdout
    assert hub.requests == []


# With the Hub out of reach


def test_without_the_hub_the_caches_are_used(known, nowhere):
    done = known.debug(nowhere)
    check_success(done)  # each further try would be told on stderr
    first, *more = done.stdout.splitlines()
    assert first.startswith(OUT_OF_REACH) and "Connection refused" in first
    assert OUT_OF_REACH not in "\n".join(more)


def test_a_hub_that_fails_is_asked_once_by_all_processes(known, repositories):
    with Hub(repositories, failure=503) as hub:
        done = known.debug(hub.url, "--devices=2")
    check_success(done)
    assert done.stdout.count(OUT_OF_REACH) == 1
    assert "503" in done.stdout.splitlines()[0]
    asked = [request for request in hub.requests if BERT in request or IMDB in request]
    assert asked == [f"GET /api/models/{BERT}"]


def test_a_hub_that_never_answers_is_not_waited_for(known):
    # The system takes connections for a socket that listens; nobody reads from them.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = known.debug(f"http://127.0.0.1:{silent.getsockname()[1]}")
    check_success(done)
    assert done.stdout.startswith(OUT_OF_REACH)
    assert done.stdout.count(OUT_OF_REACH) == 1


def test_offline_by_choice_no_hub_is_asked(known, repositories):
    with Hub(repositories) as hub:
        done = known.debug(hub.url, HF_HUB_OFFLINE="1")
    check_success(done)
    assert OUT_OF_REACH not in done.stdout
    assert hub.requests == []


def test_without_hub_and_caches_a_run_says_what_else_to_do(new, nowhere):
    done = new.debug(nowhere)
    check_nothing_is_loaded(done.stderr, "model", BERT)
    assert done.returncode == 1
    assert done.stdout.startswith(OUT_OF_REACH)
    assert len(done.stdout.splitlines()) == 1
    assert [*new.work.iterdir()] == []


def test_without_hub_a_dataset_not_loaded_before_is_refused(
    nowhere, ask, run, tmp_path, capfd
):
    ask(nowhere)
    with pytest.raises(SystemExit) as exit:
        run(dataset="owner/reviews")
    check_nothing_is_loaded(exit.value.code, "dataset", "owner/reviews")
    # A later run in this process, as in a Jupyter kernel, asks again.
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert os.environ.get("HF_HUB_OFFLINE") is None
    out, err = capfd.readouterr()
    assert out.startswith(OUT_OF_REACH)
    assert (len(out.splitlines()), err) == (1, "")
    assert [*tmp_path.iterdir()] == []

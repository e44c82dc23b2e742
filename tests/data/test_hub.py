"""The hub: with a network, without one, and when it never answers."""

from __future__ import annotations

import http.server
import json
import shutil
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedrun
from fedrun.common.errors import InputError
from fedrun.data import corpora, hub
from fedrun.data.documents import find_documents
from fedrun.data.tokens import prepare
from fedrun.model.pretrained import find_pretrained
from tests.support.runs import fresh_python
from tests.support.texts import load, on_disk, text_file

WITHOUT_NETWORK = "--dataset pydocs --tokenizer bpe:8192"

PREPARE = """
import os, sys, time
if "HOME_ALONE" in os.environ:
    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)
from pathlib import Path
from fedrun.data.tokens import prepare
waited, sleep = 0.0, time.sleep
def counted(seconds):
    global waited
    waited += seconds
    sleep(seconds)
time.sleep = counted
try:
    data = prepare(DATASET, TOKENIZER, 16, Path(CACHE))
    print(len(data.train), data.fingerprint)
except (ValueError, ConnectionError) as error:
    print(f"{waited:.0f} {type(error).__name__} {error}")
"""


def prepare_with_hub(dataset: str, tokenizer: str, cache: Path, **env: str) -> str:
    """The output of PREPARE in a new process, since the hub's libraries read `env` at import."""
    values = {"DATASET": dataset, "TOKENIZER": tokenizer, "CACHE": str(cache)}
    code = "".join(f"{name} = {value!r}\n" for name, value in values.items()) + PREPARE
    return fresh_python(code, env={"HF_HOME": str(cache / "hf"), **env})


@pytest.mark.parametrize(
    ("dataset", "tokenizer", "asked"),
    [
        ("wikitext-2", "gpt2", "--dataset wikitext-2:"),
        pytest.param("owner/name:config", "gpt2", "--dataset owner/name:config:",
                     marks=pytest.mark.slow),
        ("TEXT", "gpt2", "--tokenizer gpt2:"),
    ],
)
def test_without_a_network_the_error_comes_at_once_and_says_what_works(
    dataset: str, tokenizer: str, asked: str, tmp_path: Path
) -> None:
    dataset = str(text_file(tmp_path)) if dataset == "TEXT" else dataset
    closed = "http://127.0.0.1:9"
    printed = prepare_with_hub(dataset, tokenizer, tmp_path, HF_ENDPOINT=closed)
    waited, kind, message = printed.split(maxsplit=2)
    assert kind == "HubUnreachable"
    assert int(waited) < 5  # between tries; its own libraries wait for 20 s and more
    assert message.startswith(asked)
    assert closed in message
    assert WITHOUT_NETWORK in message


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that accepts connections and never answers, as behind some firewalls."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(hub, "HUB_SECONDS", 0.3)
        hub.hub_answers.cache_clear()
        yield
    hub.hub_answers.cache_clear()


@pytest.mark.usefixtures("silent_hub")
def test_a_hub_that_never_answers_is_not_waited_for() -> None:
    start = time.perf_counter()
    with pytest.raises(ConnectionError, match=f"owner/name.*{WITHOUT_NETWORK}") as raised:
        load("owner/name")
    assert isinstance(raised.value, fedrun.FedrunError)  # as every error worded for users
    assert len(traceback.format_exception(raised.value)) < 10  # not the libraries' chain
    assert time.perf_counter() - start < 5


class NoSuchRepository(http.server.BaseHTTPRequestHandler):
    """A hub that answers but has no repository."""

    def do_HEAD(self) -> None:
        found = self.path in ("", "/")
        self.send_response(200 if found else 404)
        if not found:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args: object) -> None:
        pass


def test_a_name_that_the_hub_does_not_know_is_the_users_error(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NoSuchRepository) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        dataset = prepare_with_hub("owner/name", "gpt2", tmp_path, HF_ENDPOINT=endpoint)
        tokenizer = prepare_with_hub(
            str(text_file(tmp_path)), "owner/name", tmp_path, HF_ENDPOINT=endpoint
        )
        server.shutdown()
    assert "InputError --dataset owner/name: " in dataset
    assert "InputError --tokenizer owner/name: " in tokenizer


@pytest.mark.parametrize(("folder", "env"), [
    pytest.param("hf", {}, marks=pytest.mark.slow),  # HF_HOME
    ("", {"HOME_ALONE": "1"}),  # --cache_dir
    pytest.param(".cache/huggingface", {"HOME_ALONE": "1"}, marks=pytest.mark.slow)])  # by itself
def test_what_the_hubs_cache_holds_works_without_a_network(
        folder: str, env: dict[str, str], tmp_path: Path) -> None:
    """Lays out the caches as the hub's libraries leave them after a download."""
    import datasets

    home = tmp_path / folder
    rows = [f"line {n} of a text that was downloaded\n" for n in range(100)]
    for split in ("train", "validation"):
        (tmp_path / "wikitext").mkdir(exist_ok=True)
        (tmp_path / "wikitext" / f"{split}.jsonl").write_text(
            "".join(json.dumps({"text": row}) + "\n" for row in rows)
        )
    config = "wikitext-2-raw-v1"
    datasets.load_dataset(str(tmp_path / "wikitext"), cache_dir=str(tmp_path / "built"))
    (info_file,) = (tmp_path / "built").rglob("dataset_info.json")
    cached = home / "datasets" / "Salesforce___wikitext" / config / "0.0.0" / "0123abcd"
    shutil.copytree(info_file.parent, cached)
    info = json.loads((cached / "dataset_info.json").read_text())
    info["config_name"] = config
    (cached / "dataset_info.json").write_text(json.dumps(info))

    bpe = prepare(str(text_file(tmp_path)), "bpe:300", 16, tmp_path)
    repository = home / "hub" / "models--gpt2"
    shutil.copytree(bpe.tokenizer_path, repository / "snapshots" / ("a" * 40))
    (repository / "snapshots" / ("a" * 40) / "config.json").write_text('{"model_type": "gpt2"}')
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)

    closed = "http://127.0.0.1:9"
    printed = prepare_with_hub("wikitext-2", "gpt2", tmp_path, HF_ENDPOINT=closed,
                               HOME=str(tmp_path), **env)
    held = on_disk(rows)
    assert corpora.Corpus("", held, held, "", find_documents(held, [])).fingerprint in printed
    tokenizer = bpe.load_tokenizer()
    assert f"'train_tokens': {sum(len(tokenizer(row)['input_ids']) for row in rows)}" in printed


@pytest.mark.parametrize("variable", [None, "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE"])
def test_what_is_downloaded_goes_to_the_cache_dir(
        variable: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the user has told the hub's libraries where to keep it. With a network: what they are
    asked for is looked at."""
    import datasets
    import huggingface_hub
    import transformers

    asked: list[object] = []

    def download(*_: object, cache_dir: object = None, **__: object) -> None:
        asked.append(cache_dir)
        raise RuntimeError("not now")

    def load(*_: object, cache_dir: object) -> None:
        asked.append(huggingface_hub.constants.HF_HUB_CACHE)  # for the dataset's files
        download(cache_dir=cache_dir)

    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for name in hub.CACHE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "elsewhere")
    theirs, cache = huggingface_hub.constants.HF_HUB_CACHE, tmp_path / "cache"
    for dataset in ("wikitext-2", str(text_file(tmp_path))):
        with pytest.raises(InputError, match="not now"):
            prepare(dataset, "gpt2", 16, cache)
    with pytest.raises(ConnectionError, match="not now"):
        find_pretrained("owner/name", "RUN", cache)
    assert asked == ([theirs, None, None, None] if variable else
                     [str(cache / "hub"), str(cache / "datasets"), cache / "hub", cache / "hub"])
    assert theirs == huggingface_hub.constants.HF_HUB_CACHE

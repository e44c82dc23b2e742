"""Corpora and tokens: real text, the cache that many processes share, and every error."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from conftest import SHARED_DATA
from filelock import FileLock

from fedrun.data import corpora, tokens
from fedrun.data.corpora import load_corpus
from fedrun.data.documents import find_documents
from fedrun.data.pydocs import REPEATABLE, read_pydocs
from fedrun.data.tokens import prepare

WIKITEXT = SHARED_DATA / "wikitext-2-heldout"
GPT2 = SHARED_DATA / "gpt2"
needs_shared_data = pytest.mark.skipif(
    not WIKITEXT.is_dir() or not GPT2.is_dir(),
    reason="no real text and tokenizer in ../shared/data",
)
WITHOUT_NETWORK = "--dataset pydocs --tokenizer bpe:8192"


def python(code: str, limit: float = 60, **env: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=limit,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def text_file(folder: Path, n_lines: int = 400) -> Path:
    file = folder / "tale.txt"
    lines = [
        f"{n} ships went out to sea, and {n // 2} of them came home.\n" for n in range(n_lines)
    ]
    file.write_text("".join(lines), encoding="utf-8")
    return file


def dataset_folder(folder: Path, **columns: list[object]) -> Path:
    """A folder as datasets.load_dataset reads it, with a train split alone."""
    folder.mkdir()
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# ---------------------------------------------------------------------------------------------
# pydocs


@pytest.fixture(scope="module")
def pydocs() -> dict[str, str]:
    return read_pydocs(corpora.local_files("pydocs"))


@pytest.fixture(scope="module")
def pydocs_corpus() -> corpora.Corpus:
    return load_corpus("pydocs")


def test_pydocs_holds_topics_and_docstrings(pydocs: dict[str, str]) -> None:
    assert statistics.__doc__ is not None
    assert pydocs["module:statistics"].startswith(
        "statistics\n\n" + statistics.__doc__.strip()[:200]
    )
    assert "statistics.median\n\nReturn the median" in pydocs["module:statistics"]
    assert pydocs["topic:assert"] == topics["assert"].strip()
    assert 1.5e6 < sum(len(text.encode()) for text in pydocs.values()) < 3e6
    assert list(pydocs) == sorted(pydocs)


def test_pydocs_holds_out_topics_and_modules_and_nothing_that_train_says(
    pydocs: dict[str, str], pydocs_corpus: corpora.Corpus
) -> None:
    corpus = pydocs_corpus
    held_out = set(corpus.validation)
    assert sorted(corpus.train + corpus.validation) == sorted(pydocs.values())
    for kind in ("topic:", "module:"):
        texts = {text for name, text in pydocs.items() if name.startswith(kind)}
        share = sum(map(len, texts & held_out)) / sum(map(len, texts))
        assert 0.05 < share < 0.1, kind
        assert len(texts & held_out) >= 10

    def long_paragraphs(rows: list[str]) -> set[str]:
        paragraphs = (" ".join(p.split()) for row in rows for p in row.split("\n\n"))
        return {p for p in paragraphs if len(p) >= REPEATABLE}

    assert not long_paragraphs(corpus.train) & long_paragraphs(corpus.validation)


def test_pydocs_is_the_same_in_another_process_and_imports_nothing_it_reads(
    pydocs_corpus: corpora.Corpus,
) -> None:
    printed = python(
        "import sys; from fedrun.data.corpora import load_corpus\n"
        "print(load_corpus('pydocs').fingerprint, 'turtle' in sys.modules, 'cmd' in sys.modules)",
        PYTHONHASHSEED="1",
    )
    assert printed == f"{pydocs_corpus.fingerprint} False False\n"


# ---------------------------------------------------------------------------------------------
# Folders and text files


@needs_shared_data
def test_a_folder_is_read_as_the_hub_would_serve_it() -> None:
    import pyarrow.parquet

    corpus = load_corpus(str(WIKITEXT))
    assert corpus.name == "wikitext-2-heldout"
    assert (len(corpus.train), len(corpus.validation)) == (4358, 3760)
    for split, rows in (("train", corpus.train), ("validation", corpus.validation)):
        table = pyarrow.parquet.read_table(WIKITEXT / f"{split}.parquet")
        assert rows == table["text"].to_pylist()


def test_the_last_twentieth_is_held_out_where_there_is_no_validation_split(tmp_path: Path) -> None:
    said: list[str] = []
    file = text_file(tmp_path)
    corpus = load_corpus(str(tmp_path / "*.txt"))
    lines = file.read_text().splitlines(keepends=True)
    assert (corpus.train, corpus.validation) == (lines[:380], lines[380:])
    prepare(str(file), "bpe:300", 16, tmp_path / "cache", said.append)
    assert "validation is the last twentieth of the train rows" in said[-1]


def test_text_files_follow_each_other_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second\n" * 20)
    (tmp_path / "a.txt").write_text("first\x0cstill first\n" * 20)
    rows = load_corpus(str(tmp_path / "*.txt"))
    assert rows.train[:20] == ["first\x0cstill first\n"] * 20
    assert rows.validation == ["second\n"] * 2


@pytest.mark.parametrize("column", ["text", "story"])
def test_the_text_column_is_text_or_the_only_strings(tmp_path: Path, column: str) -> None:
    other: list[object] = ["label"] * 20 if column == "text" else list(range(20))
    rows: list[object] = [None, *(f"row {n}" for n in range(1, 20))]
    folder = dataset_folder(tmp_path / "set", other=other, **{column: rows})
    corpus = load_corpus(str(folder))
    assert corpus.train == ["", *rows[1:19]]
    assert corpus.validation == rows[19:]


def test_a_doubtful_text_column_is_an_error_that_names_the_columns(tmp_path: Path) -> None:
    folder = dataset_folder(tmp_path / "set", title=["a", "b"], story=["c", "d"])
    with pytest.raises(ValueError, match=r"--dataset .*set: .* column .*title, story"):
        load_corpus(str(folder))
    (folder / "train.jsonl").rename(folder / "test.jsonl")
    with pytest.raises(ValueError, match=r"--dataset .*set: .*no train split, only test"):
        load_corpus(str(folder))


@pytest.mark.parametrize("text", ["", " \n\n", "one row alone"])
def test_an_empty_corpus_names_the_flag(tmp_path: Path, text: str) -> None:
    file = tmp_path / "empty.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"--dataset .*empty.txt: the corpus has no text"):
        prepare(str(file), "bpe:300", 16, tmp_path / "cache", lambda line: None)


@pytest.mark.parametrize("dataset", ["wikitext-3", "./missing", "../a/b", "missing/*.txt"])
def test_an_unknown_dataset_lists_what_there_is(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--dataset .*wikitext-2, wikitext-103, pydocs"):
        prepare(dataset, "bpe:300", 16, tmp_path, lambda line: None)


def test_a_file_that_is_not_text_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match=r"--dataset .*picture.png: not UTF-8 text"):
        load_corpus(str(tmp_path / "picture.png"))


# ---------------------------------------------------------------------------------------------
# Tokens


@needs_shared_data
def test_tokens_are_those_of_the_rows_end_to_end(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    data = prepare(str(WIKITEXT), str(GPT2), 256, tmp_path, lambda line: None)
    tokenizer = AutoTokenizer.from_pretrained(GPT2)
    corpus = load_corpus(str(WIKITEXT))
    for rows, sequences in ((corpus.train, data.train), (corpus.validation, data.validation)):
        ids: list[int] = []
        for row in rows:
            ids += tokenizer(row if row.endswith("\n") else row + "\n")["input_ids"]
        whole = len(ids) // 256
        np.testing.assert_array_equal(sequences, np.reshape(ids[: whole * 256], (whole, 256)))
    assert (data.train.shape, data.validation.shape) == ((1150, 256), (1005, 256))
    assert (data.train.dtype, data.vocab_size) == (np.uint16, 50257)
    assert data.load_tokenizer()("Once upon a time,")["input_ids"] == [7454, 2402, 257, 640, 11]
    assert data.fingerprint["dataset_sha256"] == corpus.fingerprint
    json.dumps(data.fingerprint)


def test_bpe_decodes_to_the_text_it_was_trained_on(tmp_path: Path) -> None:
    corpus = load_corpus(str(text_file(tmp_path)))
    data = prepare(str(tmp_path / "tale.txt"), "bpe:300", 16, tmp_path / "cache", lambda line: None)
    decoded = data.load_tokenizer().decode(data.train.reshape(-1).tolist())
    text = "".join(corpus.train)
    assert len(decoded) > len(text) - 16 * 20
    assert text.startswith(decoded)
    assert data.vocab_size == 300
    assert data.load_tokenizer().eos_token_id == 0


def test_bpe_is_the_same_in_every_process(tmp_path: Path) -> None:
    code = (
        "import hashlib, sys; from pathlib import Path; from fedrun.data.tokens import prepare\n"
        "data = prepare('pydocs', 'bpe:600', 64, Path(sys.argv[1]), lambda line: None)\n"
        "print(data.fingerprint, hashlib.sha256(data.train.tobytes()).hexdigest())"
    )
    printed = {
        python(f"import sys; sys.argv[1:] = [{str(tmp_path / n)!r}]\n{code}",
               PYTHONHASHSEED=n, RAYON_NUM_THREADS=n, TOKENIZERS_PARALLELISM="true")
        for n in ("1", "2")
    }  # fmt: skip
    assert len(printed) == 1
    assert "'vocab_size': 600" in printed.pop()


def test_a_large_vocabulary_takes_int32(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, **{str(n): n for n in range(1, 70_000)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.enable_truncation(5)  # a limit of the model it was made for, not of ours
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "words")
    numbers = range(60_000, 69_999)
    (tmp_path / "numbers.txt").write_text("\n".join(" ".join(map(str, numbers)) for _ in range(20)))
    data = prepare(str(tmp_path / "numbers.txt"), str(tmp_path / "words"), 100, tmp_path, print)
    assert (data.train.dtype, data.vocab_size) == (np.int32, 70_000)
    assert data.train[1].tolist() == list(range(60_100, 60_200))


@pytest.mark.parametrize("tokenizer", ["bpe:256", "bpe:many", "bpe:-400", "bpe:", "./missing"])
def test_a_tokenizer_that_cannot_be_names_the_flag(tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"--tokenizer {tokenizer}: .*bpe:N with N >= 257"):
        prepare("pydocs", tokenizer, 16, tmp_path, lambda line: None)


def test_a_folder_without_a_tokenizer_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--tokenizer .*empty: "):
        prepare(str(text_file(tmp_path)), str(tmp_path / "empty"), 16, tmp_path, lambda line: None)


def test_too_few_validation_tokens_name_both_flags(tmp_path: Path) -> None:
    file = str(text_file(tmp_path, n_lines=40))
    with pytest.raises(ValueError, match=r"--sequence_length 256: the validation .*--dataset"):
        prepare(file, "bpe:300", 256, tmp_path, lambda line: None)


# ---------------------------------------------------------------------------------------------
# The cache


def entries(cache_dir: Path) -> list[Path]:
    return [path for path in (cache_dir / "tokens").iterdir() if path.is_dir()]


def forbid(*args: object) -> None:
    raise AssertionError("text was read although its tokens are cached")


def test_a_warm_start_reads_no_text_for_any_sequence_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(text_file(tmp_path))
    cold = prepare(file, "bpe:300", 16, tmp_path / "cache", lambda line: None)
    monkeypatch.setattr(corpora, "load_corpus", forbid)
    warm = prepare(file, "bpe:300", 16, tmp_path / "cache", lambda line: None)
    np.testing.assert_array_equal(warm.train, cold.train)
    assert warm.fingerprint == cold.fingerprint
    longer = prepare(file, "bpe:300", 32, tmp_path / "cache", lambda line: None)
    np.testing.assert_array_equal(
        longer.train.reshape(-1), cold.train.reshape(-1)[: longer.train.size]
    )
    assert longer.fingerprint["sequence_length"] == 32


def test_a_warm_start_imports_no_library_for_text(tmp_path: Path) -> None:
    asked = f"{str(text_file(tmp_path))!r}, 'bpe:300', 16, Path({str(tmp_path)!r})"
    code = (
        "import sys; from pathlib import Path; from fedrun.data.tokens import prepare\n"
        f"prepare({asked}, lambda line: None); print(*sys.modules)"
    )
    libraries = {"torch", "transformers", "datasets", "tokenizers"}
    assert libraries & set(python(code).split()) == {"tokenizers"}  # cold: it trains a tokenizer
    assert libraries & set(python(code).split()) == set()


def test_a_changed_file_is_never_served_stale(tmp_path: Path) -> None:
    file = text_file(tmp_path)
    before = prepare(str(file), "bpe:300", 16, tmp_path / "cache", lambda line: None)
    stat = file.stat()
    file.write_text(file.read_text().replace("ships", "boats"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size
    after = prepare(str(file), "bpe:300", 16, tmp_path / "cache", lambda line: None)
    assert before.fingerprint["dataset_sha256"] != after.fingerprint["dataset_sha256"]
    assert "boats" in after.load_tokenizer().decode(after.train[0].tolist())


@pytest.mark.parametrize("harm", ["cut short", "no marker", "marker torn", "died while writing"])
def test_a_torn_entry_is_rebuilt(harm: str, tmp_path: Path) -> None:
    file = str(text_file(tmp_path))
    whole = prepare(file, "bpe:300", 16, tmp_path, lambda line: None)
    expected = whole.train.copy()
    (entry,) = entries(tmp_path)
    if harm == "cut short":
        os.truncate(entry / "train.bin", 100)
    elif harm == "no marker":
        (entry / "entry.json").unlink()
    elif harm == "marker torn":
        os.truncate(entry / "entry.json", 50)
    else:
        entry.rename(f"{entry}.partial")
    said: list[str] = []
    rebuilt = prepare(file, "bpe:300", 16, tmp_path, said.append)
    assert "tokenising" in said[0]
    np.testing.assert_array_equal(rebuilt.train, expected)
    assert entries(tmp_path) == [entry]


def test_a_failed_build_leaves_no_entry_and_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(text_file(tmp_path))
    with monkeypatch.context() as broken:
        broken.setattr(tokens, "_write_tokens", forbid)
        with pytest.raises(AssertionError):
            prepare(file, "bpe:300", 16, tmp_path, lambda line: None)
    assert not list(tmp_path.glob("tokens/*/entry.json"))
    assert len(prepare(file, "bpe:300", 16, tmp_path, lambda line: None).train) > 0


def test_processes_that_start_together_tokenise_once(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from fedrun.data.tokens import prepare\n"
        f"print(prepare('pydocs', 'bpe:400', 64, Path({str(tmp_path)!r})).train.sum())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    printed = [process.communicate(timeout=60)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert sum("tokenising pydocs" in text for text in printed) == 1
    assert len({text.splitlines()[-1] for text in printed}) == 1


def test_who_waits_says_for_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(text_file(tmp_path))
    prepare(file, "bpe:300", 16, tmp_path, lambda line: None)
    (entry,) = entries(tmp_path)
    shutil.rmtree(entry)
    said: list[str] = []
    holder = Path(f"{entry}.holder")
    holder.write_text("process 17 on elsewhere")
    with FileLock(f"{entry}.lock"):
        waiting = threading.Thread(
            target=prepare, args=(file, "bpe:300", 16, tmp_path, said.append)
        )
        waiting.start()
        while not said and waiting.is_alive():
            time.sleep(0.01)
        assert said[0].startswith("waiting for process 17 on elsewhere, which prepares")
        assert waiting.is_alive()
    waiting.join(20)
    assert entry.is_dir()

    shutil.rmtree(entry)
    holder.write_text("process 17 on elsewhere")
    monkeypatch.setattr(tokens, "LOCK_SECONDS", 0.3)
    with FileLock(f"{entry}.lock"), pytest.raises(TimeoutError, match="process 17 on elsewhere"):
        prepare(file, "bpe:300", 16, tmp_path, said.append)


def test_a_cache_that_cannot_be_written_names_the_flag(tmp_path: Path) -> None:
    file = text_file(tmp_path)
    with pytest.raises(ValueError, match=r"--cache_dir .*tale.txt"):
        prepare(str(file), "bpe:300", 16, file, lambda line: None)


# ---------------------------------------------------------------------------------------------
# The hub


PREPARE = """
import sys, time
from pathlib import Path
from fedrun.data.tokens import prepare
start = time.perf_counter()
try:
    data = prepare(DATASET, TOKENIZER, 16, Path(CACHE), lambda line: None)
    print(len(data.train), data.fingerprint)
except (ValueError, ConnectionError) as error:
    print(f"{time.perf_counter() - start:.0f} {type(error).__name__} {error}")
"""


def prepare_with_hub(dataset: str, tokenizer: str, cache: Path, **env: str) -> str:
    """What comes of it in a fresh process, since the hub's libraries read `env` at import."""
    values = {"DATASET": dataset, "TOKENIZER": tokenizer, "CACHE": str(cache)}
    code = "".join(f"{name} = {value!r}\n" for name, value in values.items()) + PREPARE
    env = {"HF_HOME": str(cache / "hf"), **env}
    return python(code, **env)


@pytest.mark.parametrize(
    ("dataset", "tokenizer", "asked"),
    [
        ("wikitext-2", "gpt2", "--dataset wikitext-2:"),
        ("owner/name:config", "gpt2", "--dataset owner/name:config:"),
        ("TEXT", "gpt2", "--tokenizer gpt2:"),
    ],
)
def test_without_a_network_the_error_comes_at_once_and_says_what_works(
    dataset: str, tokenizer: str, asked: str, tmp_path: Path
) -> None:
    dataset = str(text_file(tmp_path)) if dataset == "TEXT" else dataset
    closed = "http://127.0.0.1:9"
    printed = prepare_with_hub(dataset, tokenizer, tmp_path, HF_ENDPOINT=closed)
    seconds, kind, message = printed.split(maxsplit=2)
    assert kind == "ConnectionError"
    assert int(seconds) < 15  # its own libraries take 24 and 49 s
    assert message.startswith(asked)
    assert closed in message
    assert WITHOUT_NETWORK in message


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that takes calls and never says a word, as behind some firewalls."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(corpora, "HUB_SECONDS", 0.3)
        corpora.hub_answers.cache_clear()
        yield
    corpora.hub_answers.cache_clear()


@pytest.mark.usefixtures("silent_hub")
def test_a_hub_that_never_answers_is_not_waited_for() -> None:
    start = time.perf_counter()
    with pytest.raises(ConnectionError, match=f"owner/name.*{WITHOUT_NETWORK}"):
        load_corpus("owner/name")
    assert time.perf_counter() - start < 5


class NoSuchRepository(http.server.BaseHTTPRequestHandler):
    """A hub that is there and has nothing of what is asked for."""

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
    assert "ValueError --dataset owner/name: " in dataset
    assert "ValueError --tokenizer owner/name: " in tokenizer


def test_what_the_hubs_cache_holds_works_without_a_network(tmp_path: Path) -> None:
    """The caches are laid out here as the hub's libraries leave them after a download."""
    import datasets

    rows = [f"line {n} of a text that was downloaded\n" for n in range(100)]
    for split in ("train", "validation"):
        (tmp_path / "wikitext").mkdir(exist_ok=True)
        (tmp_path / "wikitext" / f"{split}.jsonl").write_text(
            "".join(json.dumps({"text": row}) + "\n" for row in rows)
        )
    config = "wikitext-2-raw-v1"
    datasets.load_dataset(str(tmp_path / "wikitext"), cache_dir=str(tmp_path / "built"))
    (info_file,) = (tmp_path / "built").rglob("dataset_info.json")
    cached = tmp_path / "hf" / "datasets" / "Salesforce___wikitext" / config / "0.0.0" / "0123abcd"
    shutil.copytree(info_file.parent, cached)
    info = json.loads((cached / "dataset_info.json").read_text())
    info["config_name"] = config
    (cached / "dataset_info.json").write_text(json.dumps(info))

    bpe = prepare(str(text_file(tmp_path)), "bpe:300", 16, tmp_path, lambda line: None)
    repository = tmp_path / "hf" / "hub" / "models--gpt2"
    shutil.copytree(bpe.tokenizer_path, repository / "snapshots" / ("a" * 40))
    (repository / "snapshots" / ("a" * 40) / "config.json").write_text('{"model_type": "gpt2"}')
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)

    closed = "http://127.0.0.1:9"
    printed = prepare_with_hub("wikitext-2", "gpt2", tmp_path, HF_ENDPOINT=closed)
    assert corpora.Corpus("", rows, rows, "", find_documents(rows, [])).fingerprint in printed
    tokenizer = bpe.load_tokenizer()
    assert f"'train_tokens': {sum(len(tokenizer(row)['input_ids']) for row in rows)}" in printed

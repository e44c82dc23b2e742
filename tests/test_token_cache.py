"""The cache of tokenised text, which many processes share: built once, never stale, never torn."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from test_data import (
    python,
    text_file,
)

from fedrun.data import corpora, tokens
from fedrun.data.tokens import prepare


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
    lock = Path(f"{entry}.lock")
    lock.write_text("process 17 on elsewhere\n")
    with FileLock(lock):
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
    lock.write_text("process 17 on elsewhere\n")
    monkeypatch.setattr(tokens, "LOCK_SECONDS", 0.3)
    with FileLock(lock), pytest.raises(TimeoutError, match="process 17 on elsewhere"):
        prepare(file, "bpe:300", 16, tmp_path, said.append)


def test_a_cache_that_cannot_be_written_names_the_flag(tmp_path: Path) -> None:
    file = text_file(tmp_path)
    with pytest.raises(ValueError, match=r"--cache_dir .*tale.txt"):
        prepare(str(file), "bpe:300", 16, file, lambda line: None)

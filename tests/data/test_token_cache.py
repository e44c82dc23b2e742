"""The token cache: built once, never stale, never half written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedrun.central
from fedrun import cli
from fedrun.cli import parse
from fedrun.data import building, corpora, tokens
from fedrun.data.tokens import TokenData, prepare, verify
from fedrun.distributed.comparison import difference
from fedrun.experiment import identity
from tests.support.disk import full
from tests.support.experiments import experiment_of
from tests.support.runs import CORPUS, SMALL, fresh_python, read_history
from tests.support.texts import entries, text_file


def forbid(*args: object) -> None:
    raise AssertionError("text was read although its tokens are cached")


def test_a_warm_start_reads_no_text_for_any_sequence_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(text_file(tmp_path))
    cold = prepare(file, "bpe:300", 16, tmp_path / "cache")
    monkeypatch.setattr(corpora, "load_corpus", forbid)
    warm = prepare(file, "bpe:300", 16, tmp_path / "cache")
    np.testing.assert_array_equal(warm.train, cold.train)
    assert warm.fingerprint == cold.fingerprint
    longer = prepare(file, "bpe:300", 32, tmp_path / "cache")
    np.testing.assert_array_equal(
        longer.train.reshape(-1), cold.train.reshape(-1)[: longer.train.size]
    )
    assert longer.fingerprint["sequence_length"] == 32


def test_a_warm_start_imports_no_library_for_text(tmp_path: Path) -> None:
    asked = f"{str(text_file(tmp_path))!r}, 'bpe:300', 16, Path({str(tmp_path)!r})"
    code = (
        "import sys; from pathlib import Path; from fedrun.data.tokens import prepare\n"
        f"prepare({asked}); print(*sys.modules)"
    )
    libraries = {"torch", "transformers", "datasets", "tokenizers"}
    cold, warm = (libraries & set(fresh_python(code).split()) for _ in range(2))
    assert cold == {"tokenizers"}  # which trains a tokenizer
    assert warm == set()


def test_a_changed_file_is_never_served_stale(tmp_path: Path) -> None:
    file = text_file(tmp_path)
    before = prepare(str(file), "bpe:300", 16, tmp_path / "cache")
    stat = file.stat()
    file.write_text(file.read_text().replace("ships", "boats"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size
    after = prepare(str(file), "bpe:300", 16, tmp_path / "cache")
    assert before.fingerprint["dataset_sha256"] != after.fingerprint["dataset_sha256"]
    assert "boats" in after.load_tokenizer().decode(after.train[0].tolist())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and the cache of its tokens."""
    folder = tmp_path_factory.mktemp("whole")
    prepare(str(text_file(folder)), "bpe:300", 16, folder / "cache")
    return folder


def overwrite(file: Path, content: bytes, at: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(content)


def edit_vocabulary(entry: Path) -> None:
    manifest = entry / "entry.json"
    manifest.write_text(manifest.read_text().replace('"vocab_size": 300', '"vocab_size": 400'))


def pipe_instead(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(("named", "harm"), [
    ("train.bin", lambda entry: overwrite(entry / "train.bin", b"\x05", 100)),
    ("validation.bin", lambda entry: overwrite(entry / "validation.bin", b"\xff\xff", 10)),
    ("documents.npz", lambda entry: overwrite(entry / "documents.npz", b"\xff\xff\xff", 200)),
    ("tokenizer.json", lambda entry: overwrite(entry / "tokenizer/tokenizer.json", b"_", 900)),
    ("entry.json", edit_vocabulary),
    ("train.bin", lambda entry: os.truncate(entry / "train.bin", 100)),
    ("validation.bin", lambda entry: (entry / "validation.bin").unlink()),
    ("train.bin", lambda entry: pipe_instead(entry / "train.bin")),
    ("entry.json", lambda entry: pipe_instead(entry / "entry.json")),
    ("entry.json", lambda entry: (entry / "entry.json").write_text("[1]"))],
    ids=["train", "validation", "documents", "tokenizer", "vocab_size", "short", "missing", "pipe",
         "pipe for JSON", "a list"])
def test_damage_is_reported_and_repaired(
    named: str, harm: Callable[[Path], None], whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def prepared() -> TokenData:
        return prepare(str(whole / "tale.txt"), "bpe:300", 16, whole / "cache")

    before = prepared()
    caplog.clear()
    expected = before.train.copy(), before.validation.copy(), before.load_documents().starts
    (entry,) = entries(whole / "cache")
    harm(entry)
    after = prepared()
    warning = caplog.messages[0]
    assert any(f"{named} {what}" in warning for what in (
        "is damaged", "cannot be read", "is not", "does not"))
    assert warning.endswith("; rebuilding it")
    found = after.train, after.validation, after.load_documents().starts
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (after.vocab_size, after.fingerprint, after.content) == (
        300, before.fingerprint, before.content)
    assert after.tokenizer_json == before.tokenizer_json
    caplog.clear()
    prepared()
    assert not any("rebuilding" in line for line in caplog.messages), "it is repaired now"


def test_token_ids_are_checked_beside_the_start(whole: Path) -> None:
    asked = str(whole / "tale.txt"), "bpe:300"
    data = prepare(*asked, 16, whole / "cache")
    expected = data.train.copy()
    (entry,) = entries(whole / "cache")
    overwrite(entry / "train.bin", b"\xff\xff", 100)
    unchecked = prepare(*asked, 16, whole / "cache", check=False)
    assert unchecked.train[3, 2] == 0xffff, "the damage, in time that no check takes"
    verify(*asked, whole / "cache")
    np.testing.assert_array_equal(unchecked.reopen().train, expected)
    assert unchecked.reopen().content == data.content
    shutil.rmtree(entry)
    with pytest.raises(ValueError, match=r"--dataset .*start again"):
        unchecked.reopen()


def test_damage_that_cannot_be_repaired_names_file_and_flag(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = str(whole / "tale.txt"), "bpe:300", 16, whole / "cache"
    prepare(*asked)
    (entry,) = entries(whole / "cache")
    overwrite(entry / "validation.bin", b"\xff\xff", 10)

    def read_only(*args: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), f"{entry}.partial")

    with monkeypatch.context() as patch:
        patch.setattr(tokens, "build_entry", read_only)
        with pytest.raises(ValueError, match=r"--cache_dir .*validation.bin is damaged.*Read-only"):
            prepare(*asked)
    assert entry.is_dir(), "what is left of it may be read"


def test_damaged_topics_are_found_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "tale.txt"
    file.write_text("\n\n".join(f"{n} ships\n{n % 3} storms" for n in range(60)))
    data = prepare(str(file), "bpe:300", 4, tmp_path)
    expected = data.load_topics()
    (topics,) = entries(tmp_path)[0].glob("topics-*.npz")
    whole = topics.read_bytes()
    for harm in (whole[:300] + b"\x07\x07" + whole[302:], whole[:80], b"", b"\x80\x04K\x01."):
        topics.write_bytes(harm)
        caplog.clear()
        found = data.load_topics()
        np.testing.assert_array_equal(found.of_document, expected.of_document)
        np.testing.assert_array_equal(found.typical, expected.typical)
        assert f"{topics} is damaged" in caplog.messages[0]
    caplog.clear()
    data.load_topics()
    assert not caplog.messages


def test_a_run_repairs_its_cache_and_then_works_without_it_or_ends_with_one_line(
    tmp_path: Path, cache_dir: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> int:
        return cli.main(["central", *SMALL, "--rounds", "2", "--val_freq", "1", "--data_dir",
                         str(tmp_path), "--cache_dir", str(tmp_path / "cache"), "--run_name", name])

    def records(name: str) -> list[tuple[float, str]]:
        history = read_history(tmp_path / name)
        return [(record["val_loss"], record["generated"]) for record in history]

    prepare(str(CORPUS), "bpe:400", 32, cache_dir)
    shutil.copytree(cache_dir, tmp_path / "cache")
    assert run("clean") == 0

    for entry in entries(tmp_path / "cache"):
        overwrite(entry / "train.bin", bytes(2000), 0)
        overwrite(entry / "validation.bin", b"\xff\xff", 100)
    begin = fedrun.central.train_central

    def without_cache(*args: Any) -> str:
        (tmp_path / "cache").rename(tmp_path / "away")
        return begin(*args)

    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(fedrun.central, "train_central", without_cache)
        assert run("mended") == 0
    assert "train.bin is damaged" in capfd.readouterr().err
    assert records("mended") == records("clean")
    assert (tmp_path / "mended" / "model.safetensors").read_bytes() == (
        tmp_path / "clean" / "model.safetensors").read_bytes()

    (tmp_path / "away").rename(tmp_path / "cache")
    for entry in entries(tmp_path / "cache"):
        overwrite(entry / "validation.bin", b"\xff\xff", 100)

    monkeypatch.setattr(tokens, "build_entry", full)
    assert run("refused") == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"fedrun: error: --cache_dir {tmp_path / 'cache'}: ")
    assert "validation.bin is damaged" in last
    assert "No space left on device" in last
    assert not (tmp_path / "refused" / "model.safetensors").exists()


def test_machines_with_other_tokens_do_not_train_together(whole: Path) -> None:
    """The text and its fingerprint are the same; the token ids differ."""
    data = prepare(str(whole / "tale.txt"), "bpe:300", 16, whole / "cache")
    config = parse(["fed_avg", *SMALL])
    assert config is not None
    one = replace(experiment_of(config, data), provenance={
        "content": "1", "init_from": None, "partition": "", "plugin": ""})
    other = replace(one, data=replace(data, content="other"))
    ranks = [identity(experiment) | {"host": "a"} for experiment in (one, one, other)]
    assert difference(ranks[:2], (1,)) == ""
    assert "ranks differ in the tokens of the corpus" in difference(ranks, (1, 2))


@pytest.mark.parametrize("harm", ["cut short", "no marker", "marker torn", "died while writing"])
def test_a_torn_entry_is_rebuilt(
    harm: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fedrun")
    file = str(text_file(tmp_path))
    whole = prepare(file, "bpe:300", 16, tmp_path)
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
    caplog.clear()
    rebuilt = prepare(file, "bpe:300", 16, tmp_path)
    assert any("tokenising" in line for line in caplog.messages)
    np.testing.assert_array_equal(rebuilt.train, expected)
    assert entries(tmp_path) == [entry]


def test_a_failed_build_leaves_no_entry_and_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(text_file(tmp_path))
    with monkeypatch.context() as broken:
        broken.setattr(building, "write_ids", forbid)
        with pytest.raises(AssertionError):
            prepare(file, "bpe:300", 16, tmp_path)
    assert not list(tmp_path.glob("tokens/*/entry.json"))
    assert len(prepare(file, "bpe:300", 16, tmp_path).train) > 0


def test_a_cache_that_cannot_be_written_names_the_flag(tmp_path: Path) -> None:
    file = text_file(tmp_path)
    with pytest.raises(ValueError, match=r"--cache_dir .*tale.txt"):
        prepare(str(file), "bpe:300", 16, file)

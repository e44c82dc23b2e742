"""Large files are read in pieces, in several processes, and every row is what it is without."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrun.common.errors import InputError
from fedrun.data import helper_pool, helper_process, reading_pool
from fedrun.data.helper_process import HelperEnded
from fedrun.data.reading import Reading
from fedrun.data.reading_process import Piece, Reader
from fedrun.data.stored_rows import RowFiles
from fedrun.data.text_files import DataFile
from fedrun.data.text_options import TextOptions
from fedrun.data.tokens import prepare
from tests.support.disk import full
from tests.support.shards import KINDS, TEXTS, shards_of
from tests.support.texts import Loaded, entry_files, load


def in_pieces(patch: pytest.MonkeyPatch, size: int, processes: int = 2) -> None:
    """Read all files so from here on, however small they are."""
    patch.setattr(reading_pool, "PIECE_BYTES", size)
    patch.setattr(reading_pool, "LINE_END_BYTES", 7)
    patch.setattr(reading_pool, "processes_for", lambda size: processes)


# ---- pieces -------------------------------------------------------------------------------------

LINES = st.lists(st.sampled_from(["a", "é漢", "\n", "\r\n", "\r", "\N{ZERO WIDTH NO-BREAK SPACE}",
                                  "\f", "\x85", "\u2028", "\0"]), max_size=60).map("".join)


def rows_of(shards: Sequence[DataFile], reading: Reading) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        return list(reading.read(shards, RowFiles(Path(folder))).rows)


def write(path: Path, content: bytes) -> DataFile:
    path.write_bytes(content)
    return DataFile(path, PurePath(path.name))


@settings(max_examples=100, deadline=None)
@given(LINES, st.booleans(), st.booleans(), st.integers(1, 40), st.integers(1, 9))
def test_parts_of_a_text_have_its_lines(text: str, mark: bool, stripped: bool, size: int,
                                        at_once: int) -> None:
    reading = Reading(None, stripped=stripped)
    content = text.encode("utf-8-sig" if mark else "utf-8")
    # What Python's own universal newlines make of it, which also know no mark.
    expected = list(io.TextIOWrapper(io.BytesIO(content), "utf-8-sig"))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        in_pieces(patch, size)
        patch.setattr(reading_pool, "LINE_END_BYTES", at_once)
        if 0 in content[:8192]:
            return  # the beginning of so short a part may be taken for UTF-16
        pieces = list(reading_pool.cut([write(Path(folder) / "a.txt", content)], reading))
        found = [row for piece in pieces for row in rows_of(piece, reading)]
        assert found == [row.rstrip("\n") for row in expected] if stripped else found == expected
        for piece in pieces[:-1]:
            begin, end = piece[0].part or (0, 0)
            assert end - begin > size
            assert content[:end].endswith(b"\n")
            assert content.find(b"\n", begin + size, end - 1) < 0, "the first one behind `size`"


def test_small_files_are_read_together_and_those_that_cannot_be_cut_whole(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"a.txt": 30, "b.txt": 30, "c.txt": 30, "d.txt": 300, "e.txt": 1, "f.txt.gz": 500,
             "g.txt": 90}
    shards = [write(tmp_path / name, b"123456789\n" * (size // 10)) for name, size in sizes.items()]
    monkeypatch.setattr(reading_pool, "PIECE_BYTES", 100)
    names = [[f"{shard.name} {shard.part}" if shard.part else str(shard.name) for shard in piece]
             for piece in reading_pool.cut(shards, Reading(None))]
    assert names == [["a.txt", "b.txt", "c.txt"], ["d.txt (0, 110)"], ["d.txt (110, 220)"],
                     ["d.txt (220, 300)"], ["e.txt"], ["f.txt.gz"], ["g.txt"]]
    # Line ends are no single bytes in others; a mark names them.
    utf16 = write(tmp_path / "utf16.txt", ("123456789\n" * 30).encode("utf-16"))
    assert list(reading_pool.cut([utf16], Reading(None))) == [[utf16]]
    assert list(reading_pool.cut(shards[3:4], Reading("utf-16-le"))) == [shards[3:4]]


@pytest.mark.parametrize(("content", "n_pieces"), [
    ('{"text": "a"}\n' * 40, 6), ('\n \n{"text": "a"}\r\n\n{"text": "b"}\n' * 20, 7),
    (json.dumps([{"text": "a"}] * 40), 1), (json.dumps([{"text": "a"}] * 40, indent=1), 1),
    (json.dumps({"text": ["a"] * 90}) + "\n\n", 1), ('"a"\n' * 200, 1)])
def test_only_files_with_a_json_object_per_line_are_cut(
        content: str, n_pieces: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, reading = write(tmp_path / "a.json", content.encode()), Reading(None, ("text",))
    monkeypatch.setattr(reading_pool, "PIECE_BYTES", 90)
    pieces = list(reading_pool.cut([shard], reading))
    assert len(pieces) == n_pieces
    assert [row for piece in pieces for row in rows_of(piece, reading)] == rows_of([shard], reading)


# ---- processes ----------------------------------------------------------------------------------

def assert_same(found: Loaded, expected: Loaded) -> None:
    for name in ("train", "validation", "validation_from", "read", "fingerprint"):
        assert getattr(found, name) == getattr(expected, name), name
    for name in ("starts", "source", "sources", "kind"):
        ours, theirs = (list(getattr(each.documents, name)) for each in (found, expected))
        assert ours == theirs, name


def counted(patch: pytest.MonkeyPatch) -> list[Reader]:
    """The processes that read, from here on."""
    started = list[Reader]()

    class Watched(Reader):
        def __init__(self, reading: Reading) -> None:
            super().__init__(reading)
            started.append(self)

    patch.setattr(reading_pool, "Reader", Watched)
    return started


@pytest.mark.parametrize("kind", KINDS)
def test_processes_read_what_one_reads(kind: str, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards_of(kind, tmp_path / "shards")
    options = {} if kind == "txt" else {"partition": "column:who", "text_column": "text"}
    expected = load(folder, **options)
    rows = {row.rstrip("\n") for row in TEXTS if row} if kind == "txt" else set(TEXTS)
    assert set(expected.train + expected.validation) == rows
    digest = hashlib.sha256()
    for split in (expected.train, expected.validation):
        digest.update(f"{len(split)} rows\n".encode())
        for row in split:
            digest.update(f"{len(row.encode())} bytes\n{row}".encode())
    assert expected.fingerprint == digest.hexdigest()
    in_pieces(monkeypatch, 2000)
    started = counted(monkeypatch)
    assert_same(load(folder, **options), expected)
    assert len(started) == 2


@pytest.mark.parametrize(("kind", "size", "processes", "options"), [
    ("txt", 700, 2, {}), ("txt", 300, 3, {"partition": "by_source"}), ("jsonl", 5000, 3, {}),
    ("parquet", 1, 2, {"partition": "column:who", "text_column": "text"})])
def test_pieces_and_processes_change_no_bit_of_an_entry(
        kind: str, size: int, processes: int, options: dict[str, Any], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(shards_of(kind, tmp_path / "shards"))
    prepare(folder, "bpe:300", 16, tmp_path / "one", TextOptions(**options))
    in_pieces(monkeypatch, size, processes)
    started = counted(monkeypatch)
    prepare(folder, "bpe:300", 16, tmp_path / "several", TextOptions(**options))
    assert entry_files(tmp_path / "several") == entry_files(tmp_path / "one")
    assert len(started) == processes
    assert not list(tmp_path.glob("several/tokens/*.partial"))


def test_small_text_and_first_rows_start_no_process(tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_pool, "Reader", None)
    folder = shards_of("jsonl", tmp_path / "shards")
    load(folder)
    monkeypatch.setattr(reading_pool, "BYTES_A_PROCESS", 100)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert [reading_pool.processes_for(size) for size in (0, 199, 200, 10**9)] == [1, 1, 2, 64]
    load(folder)  # in one piece
    monkeypatch.setattr(reading_pool, "PIECE_BYTES", 100)
    prepare(str(folder), "bpe:300", 4, tmp_path / "cache", TextOptions(max_tokens=100))


# ---- what goes wrong ----------------------------------------------------------------------------

def broken_json(shard: Path) -> None:
    lines = shard.read_bytes().splitlines(keepends=True)
    shard.write_bytes(b"".join([*lines[:90], b"{'text'}\n", *lines[90:]]))


def broken_text(shard: Path) -> None:
    content = shard.read_bytes()
    shard.write_bytes(content[:3000] + b"\xff\n" + content[3000:])


def broken_pages(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[len(content) // 3:len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    shard.write_bytes(content)


def broken_gzip(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-20])


@pytest.mark.parametrize(("kind", "damage", "words"), [
    ("jsonl", broken_json, "some.jsonl, line 91: not JSON"),
    ("jsonl", broken_text, r"some.jsonl: not UTF-8 text \(byte 0xff at position 3000, line "),
    ("txt", broken_text, r"some.txt: not UTF-8 text \(byte 0xff at position 3000, line "),
    ("jsonl.gz", broken_gzip, "some.jsonl.gz: cannot be read: "),
    ("parquet", broken_pages, "some.parquet: cannot be read: ")])
def test_errors_are_those_of_one_process(kind: str, damage: Callable[[Path], None], words: str,
                                         tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards_of(kind, tmp_path / "shards")
    for n in (1, 2):
        damage(folder / f"part{n}" / f"some.{kind}")
    with pytest.raises(InputError, match=rf"^--dataset .*/part1/{words}") as one:
        load(folder)
    in_pieces(monkeypatch, 2000)
    started = counted(monkeypatch)
    with pytest.raises(InputError) as several:
        prepare(str(folder), "bpe:300", 16, tmp_path / "cache")
    assert str(several.value) == str(one.value)
    # Of the others this process reads the beginnings, for their columns.
    assert bool(started) == (kind in ("txt", "parquet"))
    assert not list(tmp_path.glob("cache/tokens/*.partial"))


def test_a_disk_that_is_full_is_one_line_also_from_a_process_that_reads(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shards_of("txt", tmp_path / "shards")
    in_pieces(monkeypatch, 2000)
    of_helpers = r"^--cache_dir \S+/cache: .*No space left on device \(.* free\); use a --cache_dir"
    with monkeypatch.context() as patch:
        patch.setattr(helper_process, "PROGRAM", helper_process.PROGRAM.replace(
            "from fedrun.data.{module}", "from fedrun.data import stored_rows\n"
            "from tests.support.disk import full\nstored_rows._write = full\n"
            "from fedrun.data.{module}"))
        with pytest.raises(InputError, match=of_helpers):
            prepare(str(folder), "bpe:300", 16, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(RowFiles, "append_files", full)
        with pytest.raises(InputError, match=of_helpers):
            prepare(str(folder), "bpe:300", 16, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/tokens/*.partial"))


def test_a_process_that_is_killed_is_named_and_the_text_is_read_again(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(shards_of("jsonl", tmp_path / "shards"))
    prepare(folder, "bpe:300", 16, tmp_path / "one")
    in_pieces(monkeypatch, 2000)
    started, append = counted(monkeypatch), RowFiles.append_files

    def and_kill(files: RowFiles, others: RowFiles) -> None:
        append(files, others)
        for helper in started:
            helper.end()

    with monkeypatch.context() as patch:
        patch.setattr(RowFiles, "append_files", and_kill)
        with pytest.raises(HelperEnded, match="a process that reads text has ended"):
            prepare(folder, "bpe:300", 16, tmp_path / "cache")
    assert all(helper._process.returncode is not None for helper in started)
    prepare(folder, "bpe:300", 16, tmp_path / "cache")
    assert entry_files(tmp_path / "cache") == entry_files(tmp_path / "one")


@pytest.mark.parametrize(("number", "said"), [
    (errno.ENOENT, f"{sys.executable}: No such file or directory"),
    (errno.EAGAIN, "no more threads, or no memory for them"),
    (errno.EMFILE, "too many open files"), (errno.ENOMEM, "out of memory")])
def test_a_process_that_cannot_be_started_is_not_blamed_on_the_cache(
        number: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(shards_of("txt", tmp_path / "shards"))
    in_pieces(monkeypatch, 2000)
    start, started = subprocess.Popen, list[Any]()

    def one(argv: list[str], **how: Any) -> Any:
        if started:
            raise OSError(number, os.strerror(number), argv[0] if number == errno.ENOENT else None)
        started.append(start(argv, **how))
        return started[0]

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", one)
        with pytest.raises(HelperEnded) as raised:
            prepare(folder, "bpe:300", 16, tmp_path / "cache")
    line = str(raised.value)
    assert line.startswith(f"a process that reads text cannot be started: {said}")
    assert line.endswith("(taskset -c 0 fedrun ...); the next start reads it from the beginning")
    assert "--cache_dir" not in line
    assert started[0].returncode is not None, "the one that did start has ended"


def test_a_process_that_reads_ends_with_the_one_that_asks(tmp_path: Path) -> None:
    """Also in the middle of a file of any size, here a pipe that never ends."""
    endless = tmp_path / "endless.txt"
    os.mkfifo(endless)
    (tmp_path / "rows").mkdir()
    with Reader(Reading(None)) as reader:
        pipe = reader._process.stdin
        assert pipe is not None
        asked = [str(tmp_path / "rows"), [(str(endless), "endless.txt", None, None)]]
        pipe.write(json.dumps(asked).encode() + b"\n")
        pipe.flush()
        with endless.open("wb", buffering=0) as writer:
            writer.write(b"a line\n" * 10_000)
            pipe.close()
            with pytest.raises(BrokenPipeError):
                # It looks after each megabyte.
                writer.writelines(itertools.repeat(b"a line\n" * 10_000, 10_000))
        assert reader._process.wait(20) == 0


def test_a_piece_that_takes_long_is_waited_for_as_long_as_it_grows(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0").mkdir()
    file = write(tmp_path / "0" / "rows.text", b"").path
    assert reading_pool._is_written(tmp_path)
    hours_ago = time.time() - 2 * helper_pool.ANSWER_SECONDS
    for path in (file, file.parent):
        os.utime(path, (hours_ago, hours_ago))
    assert not reading_pool._is_written(tmp_path)

    answers = iter([True, True, False])
    monkeypatch.setattr(helper_pool, "ANSWER_SECONDS", 0.01)

    class Silent(Reader):
        def ask(self, asked: Piece) -> NoReturn:
            threading.Event().wait(0.5)
            raise AssertionError("was not waited for so long")

    with contextlib.closing(helper_pool.HelperPool(
            lambda: Silent(Reading(None)), 1, lambda: next(answers))) as pool:
        pool.ask(Piece([], tmp_path))
        with pytest.raises(HelperEnded, match="a process that reads text has not answered"):
            pool.take()
    assert next(answers, None) is None

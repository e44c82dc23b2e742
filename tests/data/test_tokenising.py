"""Text of any size: blocks, processes, and going on after a kill or a full disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from fedrun.common.errors import InputError
from fedrun.data import partial_entry, stored_rows, tokenising, tokenising_pool
from fedrun.data.helper_process import HelperEnded
from fedrun.data.partial_entry import PartialEntry
from fedrun.data.stored_rows import RowFiles
from fedrun.data.text_options import TextOptions
from fedrun.data.tokenising_process import Helper
from fedrun.data.tokens import prepare
from tests.support.disk import full, no_space
from tests.support.killed_building import BLOCK_BYTES
from tests.support.runs import ROOT, fresh_python
from tests.support.texts import entry_files

# ---- blocks and processes -----------------------------------------------------------------------

def tale(folder: Path, n_lines: int = 600) -> Path:
    """A text of paragraphs, with empty lines and letters of several bytes."""
    file = folder / "tale.txt"
    file.write_text("".join(f"{n} ships — {n // 2} of them {'漢' * (n % 5)} came home.\n"
                            + "\n" * (n % 7 == 0) for n in range(n_lines)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """A text file, and the files of its entry when it is tokenised in one go."""
    folder = tmp_path_factory.mktemp("whole")
    file = str(tale(folder))
    prepare(file, "bpe:300", 16, folder / "cache")
    return file, entry_files(folder / "cache")


@pytest.mark.parametrize(("block", "processes"), [(1, 1), (700, 1), (700, 2), (5000, 3)])
def test_blocks_and_processes_change_no_bit(
        block: int, processes: int, whole: tuple[str, dict[str, str]], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fedrun")
    monkeypatch.setattr(tokenising_pool, "BLOCK_BYTES", block)
    monkeypatch.setattr(tokenising, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(tokenising_pool, "processes_for", lambda size: processes)
    prepare(whole[0], "bpe:300", 16, tmp_path)
    assert entry_files(tmp_path) == whole[1]
    lines = [line for line in caplog.messages if "of the train split: " in line]
    assert "tokens/s, about" in lines[0]
    assert not list(tmp_path.glob("tokens/*.partial"))


def test_rows_of_sources_are_tokenised_in_the_order_of_the_sources(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neighbours in the stream are not neighbours on the disk."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"{n} of {n % 7}" * (n % 5), "who": f"w{n % 7}"})
                            + "\n" for n in range(400)))
    for cache, block, processes in (("one", 1 << 22, 1), ("many", 300, 2)):
        monkeypatch.setattr(tokenising_pool, "BLOCK_BYTES", block)
        monkeypatch.setattr(tokenising_pool, "processes_for", lambda size, n=processes: n)
        data = prepare(str(file), "bpe:300", 4, tmp_path / cache,
                       TextOptions(partition="column:who", text_column="text"))
        assert data.load_documents().sources == [f"w{n}" for n in range(7)]
    assert entry_files(tmp_path / "one") == entry_files(tmp_path / "many")


def test_small_text_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    files = RowFiles(tmp_path)
    rows = files.extend(["x" * 1000] * 1000)
    assert tokenising_pool.processes_for(rows.about_bytes) == 1
    monkeypatch.setattr(tokenising_pool, "BYTES_A_PROCESS", 100_000)
    assert tokenising_pool.processes_for(rows.about_bytes) == 10
    assert tokenising_pool.processes_for(rows[:350].about_bytes) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert tokenising_pool.processes_for(rows.about_bytes) == 2


def test_errors_of_processes_are_those_of_the_tokenizer(tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    words = Tokenizer(models.WordLevel({"known": 0}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("known\n" * 300 + "stranger\n" + "known\n" * 300)
    monkeypatch.setattr(tokenising_pool, "BLOCK_BYTES", 100)
    monkeypatch.setattr(tokenising_pool, "processes_for", lambda size: 2)
    with pytest.raises(InputError, match=r"^--tokenizer \S+: it cannot encode 'stranger'"):
        prepare(str(tmp_path / "a.txt"), str(tmp_path / "tokenizer.json"), 16, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/tokens/*.partial")), "it would fail again"


def test_a_process_that_is_killed_is_named_and_its_work_is_done_later(
        whole: tuple[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = list[Helper]()

    class Watched(Helper):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            started.append(self)

    mark, seen = PartialEntry.mark, list[str]()

    def and_kill(partial: PartialEntry, stage: str, *said: Any) -> None:
        mark(partial, stage, *said)
        seen.append(stage)
        if seen.count("train") == 2:
            started[0].end()

    monkeypatch.setattr(partial_entry, "RECORD_SECONDS", 0.0)
    monkeypatch.setattr(tokenising_pool, "BLOCK_BYTES", 500)
    with monkeypatch.context() as patch:
        patch.setattr(tokenising_pool, "processes_for", lambda size: 2)
        patch.setattr(tokenising_pool, "Helper", Watched)
        patch.setattr(PartialEntry, "mark", and_kill)
        with pytest.raises(HelperEnded, match="a process that tokenises has ended"):
            prepare(whole[0], "bpe:300", 16, tmp_path)
    assert all(helper._process.returncode is not None for helper in started)
    assert list(tmp_path.glob("tokens/*.partial/progress.json"))
    prepare(whole[0], "bpe:300", 16, tmp_path)
    assert entry_files(tmp_path) == whole[1]


# ---- kills and full disks -----------------------------------------------------------------------

POINTS = ["mark:1", "mark:2", "mark:3", "mark:4", "mark:9", "torn:1", "torn:5", "torn:9",
          "manifest", "rename"]


def test_after_a_kill_it_goes_on_at_the_last_whole_block(
        whole: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.killed_building", whole[0], "bpe:300", str(tmp_path),
         "none", *POINTS], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env={"PATH": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
    assert done.returncode == 0, done.stderr
    blocks = {point: int(count) for point, count in map(str.split, done.stdout.splitlines())}
    assert list(blocks) == POINTS
    for point in POINTS:
        assert entry_files(tmp_path / point) == whole[1], point
    size = Path(whole[0]).stat().st_size
    every = blocks["mark:1"]
    assert size / (2 * BLOCK_BYTES) < every < size / BLOCK_BYTES + 2
    # Of mark:N the first two are for the text and the tokenizer, the Nth is not made.
    assert blocks == {"mark:1": every, "mark:2": every, "mark:3": every, "mark:4": every - 1,
                      "mark:9": every - 6, "torn:1": every, "torn:5": every - 4,
                      "torn:9": every - 8, "manifest": 0, "rename": 0}


def marking(fails_at: int) -> Any:
    """`PartialEntry.mark` that finds the disk full from the nth call on."""
    mark, calls = PartialEntry.mark, 0

    def limited(partial: PartialEntry, *said: Any) -> None:
        nonlocal calls
        calls += 1
        if calls >= fails_at:
            raise no_space()
        mark(partial, *said)

    return limited


@pytest.mark.parametrize(("fails_at", "left"), [(1, False), (3, False), (7, True)])
def test_a_full_disk_leaves_no_torn_entry_and_keeps_what_is_done(
        fails_at: int, left: bool, whole: tuple[str, dict[str, str]], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fedrun")
    monkeypatch.setattr(tokenising_pool, "BLOCK_BYTES", BLOCK_BYTES)
    monkeypatch.setattr(partial_entry, "RECORD_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(PartialEntry, "mark", marking(fails_at))
        with pytest.raises(InputError, match=rf"^--cache_dir {tmp_path}: .*No space left on device "
                                             r"\(.* free\); use a --cache_dir"):
            prepare(whole[0], "bpe:300", 16, tmp_path)
    assert not list(tmp_path.glob("tokens/*/entry.json"))
    assert bool(list(tmp_path.glob("tokens/*.partial"))) == left
    caplog.clear()
    prepare(whole[0], "bpe:300", 16, tmp_path)
    assert any("an interrupted start has left" in line for line in caplog.messages) == (
        fails_at > 3)
    assert entry_files(tmp_path) == whole[1]


def test_a_disk_that_is_full_while_text_is_read_is_not_blamed_on_the_text(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_rows, "_write", full)
    with pytest.raises(InputError, match=rf"^--cache_dir {tmp_path}/cache: .*No space left"):
        prepare(str(tale(tmp_path)), "bpe:300", 16, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/tokens/*.partial"))


@pytest.mark.parametrize("harm", ["no JSON", "of another version", "too short", "a list"])
def test_what_is_left_and_of_no_use_is_begun_again(
        harm: str, whole: tuple[str, dict[str, str]], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_entry, "RECORD_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(PartialEntry, "mark", marking(4))
        with pytest.raises(InputError, match="No space left"):
            prepare(whole[0], "bpe:300", 16, tmp_path)
    (file,) = tmp_path.glob("tokens/*.partial/progress.json")
    said = json.loads(file.read_text())
    if harm == "too short":
        (file.parent / "rows" / "rows.text").write_bytes(b"x")
    else:
        file.write_text({"no JSON": "{", "a list": json.dumps(said | {"stages": [1]}),
                         "of another version": json.dumps(said | {"format": 0})}[harm])
    prepare(whole[0], "bpe:300", 16, tmp_path)
    assert entry_files(tmp_path) == whole[1]


# ---- memory -------------------------------------------------------------------------------------

MEMORY = """
import json, resource, sys
from pathlib import Path
from fedrun.data.tokens import prepare

def peak(who):
    return resource.getrusage(who).ru_maxrss >> 10

tokenizer, folder = sys.argv[1], Path(sys.argv[2])
prepare(str(folder / "small.txt"), tokenizer, 16, folder / "small")
before = peak(resource.RUSAGE_SELF)
data = prepare(str(folder / "large.txt"), tokenizer, 16, folder / "large")
print(before, peak(resource.RUSAGE_SELF), peak(resource.RUSAGE_CHILDREN),
      data.fingerprint["train_documents"])
"""
LARGE, MOST_MIB = 50 << 20, 64


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A folder with 1 and 50 MB of text in lines of 40 bytes, which as a list take 100 MB."""
    for name, size in (("small", 1 << 20), ("large", LARGE)):
        with (tmp_path / f"{name}.txt").open("w") as file:
            written = number = 0
            while written < size:
                written += file.write(f"{number} ships went out and came home.\n"
                                      + "\n" * (number % 9 == 0))
                number += 1
    return tmp_path


@pytest.mark.timeout(550)
@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(large: Path) -> None:
    made = prepare(str(large / "small.txt"), "bpe:2000", 16, large / "made")
    before, after, helpers, n_documents = map(int, fresh_python(
        MEMORY, str(made.tokenizer_path), str(large), limit=500).split())
    assert n_documents > 100_000
    assert after - before < MOST_MIB
    assert helpers < before + MOST_MIB

"""What killed starts have left in the token cache is removed once nobody can be using it."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from fedrun.common import locks
from fedrun.data.cache_entry import STALE_DAYS
from fedrun.data.tokens import prepare


def leave(folder: Path, days: float) -> Path:
    """An unfinished entry of a start that was killed, last written to this many days ago."""
    (folder / "rows").mkdir(parents=True)
    (folder / "entry").mkdir()
    (folder / "rows" / "rows.text").write_text("a copy of the text")
    (folder / "progress.json").write_text("{}")
    then = time.time() - days * 24 * 3600
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (then, then))
    return folder


def test_what_was_left_long_ago_and_is_not_in_use_is_removed_with_a_line(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fedrun")
    text, tokens = tmp_path / "text.txt", tmp_path / "cache" / "tokens"
    text.write_text("\n".join(f"Line {n} of a text." for n in range(200)))
    old = leave(tokens / "gone.txt-bpe-1.partial", STALE_DAYS + 1)
    young = leave(tokens / "changed.txt-bpe-2.partial", STALE_DAYS - 1)
    used = leave(tokens / "large.txt-bpe-3.partial", STALE_DAYS + 1)
    written = leave(tokens / "larger.txt-bpe-4.partial", STALE_DAYS + 1)
    (written / "rows" / "rows.text").write_text("more")
    finished = tokens / "old.txt-bpe-5"
    shutil.copytree(old, finished)
    lock = locks.acquire(Path(f"{used.with_suffix('')}.lock"), 0)
    try:
        prepare(str(text), "bpe:270", 16, tmp_path / "cache")
    finally:
        lock.release()
    assert not old.exists()
    assert all(path.exists() for path in (young, used, written, finished))
    (line,) = [one for one in caplog.messages if "removed" in one]
    assert line == (f"removed {old}, which a start that was ended has left; nothing was written "
                    "there for 14 days")
    os.utime(text)  # so that it is tokenised again, under another name
    prepare(str(text), "bpe:270", 16, tmp_path / "cache")
    assert not used.exists(), "whoever used it has ended"


def test_a_warm_start_and_an_entry_that_is_gone_on_with_remove_nothing(tmp_path: Path) -> None:
    text, tokens = tmp_path / "text.txt", tmp_path / "cache" / "tokens"
    text.write_text("\n".join(f"Line {n} of a text." for n in range(200)))
    prepare(str(text), "bpe:270", 16, tmp_path / "cache")
    old = leave(tokens / "gone.txt-bpe-1.partial", STALE_DAYS + 1)
    prepare(str(text), "bpe:270", 16, tmp_path / "cache")
    assert old.exists()

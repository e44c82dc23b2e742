"""Several processes that want the same entry of the token cache: one makes it, the others wait."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from fedrun.common import locks
from fedrun.data import cache_entry
from fedrun.data.tokens import prepare
from tests.support.texts import entries, text_file


def test_processes_that_start_together_tokenise_once(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from fedrun.common.log import print_log\n"
        "from fedrun.data.tokens import prepare\nprint_log()\n"
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


def test_a_waiting_process_logs_for_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fedrun")
    file = str(text_file(tmp_path))
    prepare(file, "bpe:300", 16, tmp_path)
    (entry,) = entries(tmp_path)
    shutil.rmtree(entry)
    caplog.clear()
    lock = Path(f"{entry}.lock")
    lock.write_text("process 17 on elsewhere\n")
    with FileLock(lock):
        waiting = threading.Thread(target=prepare, args=(file, "bpe:300", 16, tmp_path))
        waiting.start()
        while not caplog.messages and waiting.is_alive():
            time.sleep(0.01)
        assert caplog.messages[0].startswith("waiting for process 17 on elsewhere, which prepares")
        assert waiting.is_alive()
    waiting.join(20)
    assert entry.is_dir()

    shutil.rmtree(entry)
    lock.write_text("process 17 on elsewhere\n")
    monkeypatch.setattr(cache_entry, "LOCK_SECONDS", 0.3)
    with FileLock(lock), pytest.raises(TimeoutError, match="process 17 on elsewhere"):
        prepare(file, "bpe:300", 16, tmp_path)


def test_who_waits_does_so_for_as_long_as_something_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "entry.partial" / "train.bin"
    file.parent.mkdir()
    writes = iter((True, True, False, True))

    def busy(*_: object) -> None:
        if next(writes):
            file.touch()
            os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))
        raise locks.Busy("process 17 on elsewhere")

    monkeypatch.setattr(locks, "acquire", busy)
    with pytest.raises(TimeoutError, match="waited 10800 s for process 17 on elsewhere"), \
            cache_entry.lock_entry(tmp_path / "entry", "it"):
        pass
    assert next(writes), "the third time nothing was written"

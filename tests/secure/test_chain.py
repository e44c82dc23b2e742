"""What the journal and the log have in common as files that several processes append to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fedrun.common import locks
from fedrun.secure import RoundChanged
from fedrun.secure.journal import Journal, Sum
from fedrun.secure.ledger import Ledger, Release
from tests.support.runs import ROOT

KEY = "name of a key"


def a_sum(number: int, terms: str = "terms") -> Sum:
    return Sum("run", number, "vector", f"model {number}", terms)


def a_release(number: int) -> Release:
    return Release("run", number, str(number), "text", "client", (number,), 1.0)


def in_journal(path: Path, numbers: range) -> None:
    """It refuses other terms in each of these rounds."""
    journal = Journal(path)
    for number in numbers:
        with pytest.raises(RoundChanged):
            journal.record(a_sum(number, "others"))


def in_ledger(path: Path, numbers: range) -> None:
    """It has charged each of these rounds, once."""
    spent = Ledger(path, KEY).spent("run")
    assert spent == dict.fromkeys(range(1, len(spent) + 1), 1.0)
    assert spent.keys() >= set(numbers)


class Kind(NamedTuple):
    opened: Callable[[Path], Any]
    entry: Callable[[int], Any]
    holds: Callable[[Path, range], None]


KINDS = {"journal": Kind(Journal, a_sum, in_journal),
         "ledger": Kind(lambda path: Ledger(path, KEY), a_release, in_ledger)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_process_that_does_not_end(kind: Kind, path: Path, monkeypatch: pytest.MonkeyPatch
                                     ) -> None:
    """It is waited for, but not for ever, and it is named."""
    file, acquire = kind.opened(path), locks.acquire
    held = acquire(Path(f"{path}.lock"), 0.0)
    held.write()
    monkeypatch.setattr(locks, "acquire", lambda path, patience: acquire(path, patience / 300))
    with pytest.raises(locks.Busy, match=rf"^{path}: is in use by process {os.getpid()} on "):
        file.record(kind.entry(1))
    held.release()
    file.record(kind.entry(1))


PROGRAM = """
import sys
from pathlib import Path
from tests.secure.test_chain import KINDS
kind, number = KINDS[sys.argv[1]], int(sys.argv[3])
file = kind.opened(Path(sys.argv[2]))
while True:
    number += 1
    file.record(kind.entry(number))
    print(number, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_killed_process(name: str, path: Path) -> None:
    """What it said to have recorded is there, at most one more is, and the file goes on."""
    last = 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, name, str(path), str(last)], cwd=ROOT,
            stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline()
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        said = process.stdout.read().split()
        process.wait(10)
        process.stdout.close()
        last = int(said[-1]) if said else last + 1
        KINDS[name].holds(path, range(1, last + 1))
        recorded = path.read_bytes().count(b"\n")
        assert last <= recorded <= last + 1
        last = recorded

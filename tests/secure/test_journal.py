"""A sum is on the disk before it may be sent, and is never repeated with other terms."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
from pathlib import Path

import pytest

from fedrun.common.files import DamagedFile
from fedrun.secure import RoundChanged
from fedrun.secure.identity import derive
from fedrun.secure.journal import Journal, Sum


def terms(members: str = "north,south,east", cohort: tuple[int, ...] = (0, 1, 2),
          weights: tuple[float, ...] = (0.5, 0.25, 0.25)) -> str:
    """As a site makes them from a plan."""
    plan = json.dumps([cohort, weights]).encode()
    return f"{members} {hashlib.sha256(plan).hexdigest()}"


def entry(number: int = 1, run: str = "first", name: str = "vector", start: str = "",
          made_of: str = "") -> Sum:
    return Sum(run, number, name, start or f"model {number}", made_of or terms())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def test_a_repeated_round(path: Path) -> None:
    """The same terms as often as a run resumes; other sites, clients or weights never."""
    journal = Journal(path)
    for name in ("count", "vector", "tail"):
        journal.record(entry(name=name))
    written = path.read_bytes()
    for again in (journal, Journal(path)):
        again.record(entry())
        for other in (terms(members="north,south"), terms(cohort=(0, 1)),
                      terms(weights=(0.5, 0.25, 0.2500000001)), terms(cohort=(0, 1, 3))):
            with pytest.raises(RoundChanged, match=r"^vector of round 1, run first: made of other"):
                again.record(entry(made_of=other))
            with pytest.raises(RoundChanged):  # a model that differs by a bit is no excuse
                again.record(entry(start="another model", made_of=other))
    assert path.read_bytes() == written
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_its_format(path: Path) -> None:
    """Journals are kept for years."""
    Journal(path).record(Sum("first", 1, "update", "ab", "cd"))
    line = '["first", 1, "update", "ab", "cd"'
    checksum = derive(b"journal", "", line + "]").hex()
    assert path.read_text() == f'{line}, "{checksum}"]\n'


def test_every_sum_of_a_round_has_terms_of_its_own(path: Path) -> None:
    """An evaluation is over all clients, the cohort's sum over some of them."""
    journal, everybody = Journal(path), terms(cohort=(0, 1, 2, 3))
    for name, made_of in (("count", terms()), ("vector", terms()), ("holdout", everybody)):
        journal.record(entry(name=name, made_of=made_of))
    assert path.read_bytes().count(b"\n") == 3
    for name, made_of in (("vector", everybody), ("holdout", terms())):
        with pytest.raises(RoundChanged, match=f"^{name} of round 1"):
            Journal(path).record(entry(name=name, made_of=made_of))


def test_another_run_from_the_same_model(path: Path) -> None:
    """The server chooses the names of runs. A run without one site, which starts where an earlier
    one did, would show that site's term by subtraction."""
    journal = Journal(path)
    journal.record(entry(5, start="model 5"))
    journal.record(entry(1, run="second", start="model 5"))  # the same sites, clients and weights
    fewer = terms(members="north,south")
    with pytest.raises(RoundChanged, match=r"^vector of round 1, run third: made of other"):
        journal.record(entry(1, run="third", start="model 5", made_of=fewer))
    journal.record(entry(1, run="third", start="model 9", made_of=fewer))
    with pytest.raises(RoundChanged):
        journal.record(entry(9, start="model 9"))
    Journal(path).record(entry(2, run="third", start="model 10", made_of=fewer))


def test_a_repeated_sum_is_remembered_under_both_names(path: Path) -> None:
    """A round repeated from another model (GPUs without --deterministic), and a model that another
    run starts from: of each pair, what is new counts from then on."""
    fewer = terms(members="north,south")
    Journal(path).record(entry(1, start="model a"))
    Journal(path).record(entry(1, start="model b"))
    Journal(path).record(entry(1, run="second", start="model a"))
    for again in (entry(1, run="third", start="model b", made_of=fewer),
                  entry(1, run="second", start="model c", made_of=fewer)):
        with pytest.raises(RoundChanged):
            Journal(path).record(again)


def test_the_disk_has_it_before_record_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, write, sync = list[str](), os.write, os.fsync

    def written(file: int, content: bytes) -> int:
        calls.append("write")
        return write(file, content)

    def synced(file: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "sync")
        sync(file)

    monkeypatch.setattr(os, "write", written)
    monkeypatch.setattr(os, "fsync", synced)
    journal = Journal(path)
    journal.record(entry())
    assert calls == ["folder", "write", "sync"]
    calls.clear()
    journal.record(entry())  # what an earlier process wrote may not be on the disk
    assert calls[-1] == "sync"


def test_a_disk_that_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent, and a later try is as the first."""
    journal = Journal(path)
    journal.record(entry(1))
    good, write = path.read_bytes(), os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, content: write(file, content[:20]))
        with pytest.raises(OSError, match="journal: the disk is full"):
            journal.record(entry(2))
    assert path.read_bytes() == good + path.read_bytes()[len(good):][:20]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(5, "no disk")))
        with pytest.raises(OSError, match="no disk"):
            journal.record(entry(2, made_of=terms(cohort=(1, 2))))
    # It may be on the disk by now: then it counts, although nothing was sent.
    with pytest.raises(RoundChanged):
        journal.record(entry(2))
    journal.record(entry(2, made_of=terms(cohort=(1, 2))))


def test_after_a_crash_at_any_byte(path: Path) -> None:
    """A last line without its end was never sent: the round may be summed with any terms."""
    journal = Journal(path)
    for number in (1, 2):
        journal.record(entry(number))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in (*range(first, len(whole), 17), len(whole) - 1):
        path.write_bytes(whole[:size])
        again = Journal(path)
        again.record(entry(2, made_of=terms(cohort=(1,))))
        with pytest.raises(RoundChanged):
            again.record(entry(1, made_of=terms(cohort=(1,))))
        with pytest.raises(RoundChanged):
            Journal(path).record(entry(2))
        assert path.read_bytes().count(b"\n") == 2


def test_a_damaged_journal_sends_nothing(path: Path) -> None:
    """A bit at any place, a line that is gone, doubled, moved or made up: refused by name."""
    journal = Journal(path)
    for number in (1, 2, 3):
        journal.record(entry(number))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    forged = json.dumps([*entry(4), "0" * 64]).encode() + b"\n"
    wrong = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]
             for at in range(0, len(whole) - 1, 7)]
    wrong += [lines[1] + lines[2], lines[0] + lines[2], lines[0] * 2 + lines[1], whole + forged,
              lines[0] + lines[2] + lines[1], b"\n" + whole, whole + b"\n", b"[]\n", b"{}\n",
              b"7\n", b"\0" * 300 + b"\n", json.dumps([1] * 6).encode() + b"\n"]
    for content in wrong:
        path.write_bytes(content)
        with pytest.raises(DamagedFile, match=r"^/.*/journal: damaged at byte \d+; restore it$"):
            Journal(path).record(entry(9))
        assert path.read_bytes() == content


def test_a_journal_that_shrinks_while_it_is_used(path: Path) -> None:
    journal = Journal(path)
    for number in (1, 2):
        journal.record(entry(number))
    os.truncate(path, 10)
    with pytest.raises(DamagedFile, match="journal: has lost its end"):
        journal.record(entry(3))


def test_two_runs_of_one_site(path: Path) -> None:
    """Each sees what the other has recorded; of two that contradict each other one is refused."""
    one, other = Journal(path), Journal(path)
    one.record(entry(1))
    with pytest.raises(RoundChanged):
        other.record(entry(1, made_of=terms(cohort=(0,))))
    outcomes = list[str]()

    def record(journal: Journal, number: int, cohort: int) -> None:
        try:
            journal.record(entry(number, made_of=terms(cohort=(cohort,))))
            outcomes.append("sent")
        except RoundChanged:
            outcomes.append("refused")

    for number in range(2, 10):
        pair = [threading.Thread(target=record, args=(journal, number, cohort))
                for cohort, journal in enumerate((one, other))]
        for thread in pair:
            thread.start()
        for thread in pair:
            thread.join()
        assert sorted(outcomes) == ["refused", "sent"]
        outcomes.clear()
    assert path.read_bytes().count(b"\n") == 9

"""A release is on the disk before it may be made, is charged once, and never forgotten."""

from __future__ import annotations

import json
import math
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from fedrun.common.errors import explain
from fedrun.common.files import DamagedFile
from fedrun.secure import RoundChanged
from fedrun.secure.identity import derive
from fedrun.secure.ledger import LOG, Ledger, Release
from fedrun.secure.noise import NoiseKey, noise_name
from tests.support.disk import full

KEY = "name of a key"


def release(number: int = 1, run: str = "first", model: str = "", data: str = "text",
            cohort: tuple[int, ...] = (0, 1, 2), multiplier: float = 2.0) -> Release:
    """As a worker makes it: all that decides the sum decides the binding."""
    key = NoiseKey(bytes(32)).round_key({
        "run": run, "round": number, "model": model or f"model {number}", "data": data,
        "cohort": str(cohort), "multiplier": str(multiplier)})
    return Release(run, number, noise_name(key), data, "client", cohort, multiplier)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / LOG


def test_what_a_run_has_spent(path: Path) -> None:
    """1 / multiplier^2 for each release whose cohort a client was in, whatever process asks."""
    ledger = Ledger(path, KEY)
    assert ledger.spent("first") == {}
    ledger.record(release(1, cohort=(0, 1)))
    ledger.record(release(2, cohort=(1, 2), multiplier=0.5))
    ledger.record(release(3, cohort=()))
    ledger.record(release(1, run="second", cohort=(7,), multiplier=10.0))
    for again in (ledger, Ledger(path, KEY)):
        assert again.spent("first") == {0: 0.25, 1: 4.25, 2: 4.0}
        assert again.spent("second") == {7: pytest.approx(0.01)}
        assert again.spent("third") == {}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_releases_of_sequences_have_rates_and_older_lines_are_read(path: Path) -> None:
    """The line is one that was written before there were releases of sequences."""
    before = ('["first", 1, "66d8", "text", "client", [0, 1, 2], 2.0, '
              '"CHECKSUM"]')
    values = json.loads(before)[:-1]
    path.write_text(before.replace("CHECKSUM", derive(
        b"privacy log", KEY, json.dumps(values)).hex()) + "\n")
    ledger = Ledger(path, KEY)
    of_sequences = release(2)._replace(unit="sequence", rates=(0.1, 0.5, 1.0), steps=7)
    ledger.record(release(3))
    ledger.record(of_sequences)
    for log in (ledger, Ledger(path, KEY)):
        assert log.releases("first")[2] == of_sequences
        assert log.releases_on("text", "sequence") == [of_sequences]
        assert [one.round for one in log.releases_on("text", "client")] == [1, 3]
        assert log.releases_on("other", "client") == []
    nobody = of_sequences._replace(binding="of nobody", cohort=(), rates=())
    ledger.record(nobody)
    ledger.record(nobody)
    assert Ledger(path, KEY).releases("first")[3] == nobody, "of a site without a client"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert list(map(len, lines)) == [8, 8, 10, 10]
    for wrong in ({"rates": (0.1, 0.2)}, {"rates": (0.1, 0.2, 1.1)}, {"steps": 0}, {"rates": ()},
                  {"unit": "client"}, {"rates": (0.1, 0.2, 0.0)}):
        with pytest.raises(ValueError, match="is no release"):
            ledger.record(of_sequences._replace(binding="other", **wrong))


def test_what_all_runs_have_spent_on_one_text(path: Path) -> None:
    ledger = Ledger(path, KEY)
    ledger.record(release(1, cohort=(0, 1)))
    ledger.record(release(1, run="second", cohort=(1,), multiplier=1.0))
    ledger.record(release(1, run="third", data="other text", cohort=(1,)))
    ledger.record(release(2)._replace(unit="example", binding="f"))
    assert ledger.spent_on("text", "client") == {0: 0.25, 1: 1.25}
    assert ledger.spent_on("other text", "client") == {1: 0.25}
    assert ledger.spent_on("text", "example") == {0: 0.25, 1: 0.25, 2: 0.25}
    assert ledger.spent_on("no text", "client") == {}


def test_a_resumed_run_is_charged_once_and_a_changed_one_again(path: Path) -> None:
    ledger = Ledger(path, KEY)
    for number in (1, 2, 3):
        ledger.record(release(number))
    written = path.read_bytes()
    for again in (ledger, Ledger(path, KEY)):
        for number in (2, 3):
            again.record(release(number))
    assert path.read_bytes() == written
    assert ledger.spent("first") == dict.fromkeys((0, 1, 2), 0.75)
    for changed in (release(3, model="edited"), release(3, cohort=(0, 1, 3)),
                    release(3, multiplier=4.0), release(3, data="edited")):
        Ledger(path, KEY).record(changed)
    assert ledger.spent("first") == {0: 1.5625, 1: 1.5625, 2: 1.3125, 3: 0.25}
    assert path.read_bytes().startswith(written)


def test_a_noise_belongs_to_one_release(path: Path) -> None:
    """The difference of two sums with the same noise is free of it."""
    ledger = Ledger(path, KEY)
    ledger.record(release(1))
    written = path.read_bytes()
    for other in (release(1)._replace(cohort=(0, 1)), release(1)._replace(multiplier=3.0),
                  release(1)._replace(data="other"), release(1)._replace(run="second"),
                  release(1)._replace(round=2)):
        with pytest.raises(RoundChanged, match=r"^round \d, run \w+: has the noise of another "
                                               r"release, in round 1, run first$"):
            Ledger(path, KEY).record(other)
    assert path.read_bytes() == written


@pytest.mark.parametrize("wrong", [
    {"multiplier": 0.0}, {"multiplier": -1.0}, {"multiplier": math.nan}, {"multiplier": math.inf},
    {"multiplier": "2"}, {"cohort": ("a",)}, {"cohort": 3}])
def test_what_is_no_release_is_not_written(path: Path, wrong: dict[str, Any]) -> None:
    ledger = Ledger(path, KEY)
    with pytest.raises((ValueError, TypeError)):
        ledger.record(release()._replace(**wrong))
    assert path.read_bytes() == b""
    line = [*release()._replace(**wrong)]
    checksum = derive(b"privacy log", KEY, json.dumps(line)).hex()
    path.write_text(json.dumps([*line, checksum]) + "\n")
    with pytest.raises(DamagedFile, match="damaged at byte 0"):
        Ledger(path, KEY).spent("first")


def test_its_format(path: Path) -> None:
    """Logs are kept for years."""
    Ledger(path, KEY).record(Release("first", 1, "ab", "cd", "client", (0, 2), 2.5))
    line = '["first", 1, "ab", "cd", "client", [0, 2], 2.5'
    checksum = derive(b"privacy log", KEY, line + "]").hex()
    assert path.read_text() == f'{line}, "{checksum}"]\n'


def test_the_disk_has_it_before_record_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, seen, sync = Ledger(path, KEY), list[bytes](), os.fsync

    def synced(file: int) -> None:
        sync(file)
        seen.append(path.read_bytes())

    monkeypatch.setattr(os, "fsync", synced)
    ledger.record(release())
    assert seen == [path.read_bytes()]
    assert seen[0]
    ledger.record(release())  # what an earlier process wrote may not be on the disk
    assert len(seen) == 2


def test_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The release is not made; with room again it is charged once."""
    ledger = Ledger(path, KEY)
    ledger.record(release(1))
    good, write = path.read_bytes(), os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left on device") as failed:
            ledger.record(release(2))
        assert (explain(failed.value) or "").startswith(f"{path}: No space left on device (")
        patch.setattr(os, "write", lambda file, content: write(file, content[:20]))
        with pytest.raises(OSError, match=f"^{path}: the disk is full$"):
            ledger.record(release(2))
        patch.setattr(os, "write", write)
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            ledger.record(release(3))
    assert path.read_bytes().startswith(good)
    ledger.record(release(2))
    ledger.record(release(3))
    for again in (ledger, Ledger(path, KEY)):
        assert again.spent("first") == dict.fromkeys((0, 1, 2), 0.75)


def test_after_a_crash_at_any_byte(path: Path) -> None:
    """A last line without its end was never released."""
    ledger = Ledger(path, KEY)
    for number in (1, 2):
        ledger.record(release(number))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in (*range(first, len(whole), 61), len(whole) - 1):
        path.write_bytes(whole[:size])
        assert Ledger(path, KEY).spent("first") == dict.fromkeys((0, 1, 2), 0.25)
        Ledger(path, KEY).record(release(2))
        assert path.read_bytes() == whole


def test_an_edited_log_releases_nothing(path: Path) -> None:
    """A bit at any place, a line that is gone, doubled, moved, made up or made cheaper."""
    ledger = Ledger(path, KEY)
    for number in (1, 2, 3):
        ledger.record(release(number))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    forged = json.dumps([*release(4), "0" * 64]).encode() + b"\n"
    wrong = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]
             for at in range(0, len(whole) - 1, 29)]
    wrong += [lines[1] + lines[2], lines[0] + lines[2], lines[0] * 2 + lines[1], whole + forged,
              lines[0] + lines[2] + lines[1], whole.replace(b"2.0", b"9.0"), b"\n" + whole,
              whole.replace(b"[0, 1, 2]", b"[0, 1]"), b"[]\n", b"{}\n", b'{"a": 1, "b": 2}\n',
              b"7\n", b"\0" * 300 + b"\n", b"[" * 5000 + b"]" * 5000 + b"\n"]
    for content in wrong:
        path.write_bytes(content)
        for use in (lambda log: log.record(release(9)), lambda log: log.spent("first")):
            with pytest.raises(DamagedFile, match=r"^/.*/privacy.log: damaged at byte \d+; restore "
                                                  r"it; if the key in its folder was replaced, "):
                use(Ledger(path, KEY))
        assert path.read_bytes() == content


def test_a_log_that_loses_its_end_while_it_is_used(path: Path) -> None:
    """Truncated, or replaced by an older copy of itself."""
    ledger = Ledger(path, KEY)
    ledger.record(release(1))
    older = path.read_bytes()
    ledger.record(release(2))
    for end in (older, older[:10], b""):
        path.write_bytes(end)
        with pytest.raises(DamagedFile, match=r"privacy.log: has lost its end; restore it$"):
            ledger.record(release(3))
        with pytest.raises(DamagedFile, match="has lost its end"):
            ledger.spent("first")


@pytest.mark.parametrize("replaced", [True, False])
def test_a_log_that_is_replaced_while_it_is_used(path: Path, replaced: bool) -> None:
    """What would be written to it afterwards nobody would find."""
    ledger = Ledger(path, KEY)
    ledger.record(release(1))
    written = path.read_bytes()
    path.unlink()
    if replaced:
        path.write_bytes(written)
    with pytest.raises(DamagedFile, match=r"privacy.log: was removed or replaced; restore it$"):
        ledger.record(release(2))


def test_a_copy_goes_on_from_what_was_spent(path: Path, tmp_path: Path) -> None:
    """With its key. Beside another one it is refused: commitments to the same text differ there,
    and what was spent on it would count for nothing."""
    Ledger(path, KEY).record(release(1))
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    Ledger(copy, KEY).record(release(1))
    Ledger(copy, KEY).record(release(2))
    assert Ledger(copy, KEY).spent_on("text", "client") == dict.fromkeys((0, 1, 2), 0.5)
    assert Ledger(path, KEY).spent("first") == dict.fromkeys((0, 1, 2), 0.25)
    with pytest.raises(DamagedFile, match=r"damaged at byte 0; .* if the key in its folder was r"):
        Ledger(copy, "name of another key").spent("first")


def test_two_runs_at_once(path: Path) -> None:
    """Each sees what the other has spent; nothing is lost, doubled or torn."""
    ledgers, errors = [Ledger(path, KEY) for _ in range(2)], list[BaseException]()

    def work(ledger: Ledger, run: str) -> None:
        try:
            for number in range(1, 6):
                ledger.record(release(number, run=run))
                ledger.record(release(number, run="both"))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(ledger, run))
               for ledger, run in zip(ledgers, ("first", "second"), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for ledger in (*ledgers, Ledger(path, KEY)):
        for run in ("first", "second", "both"):
            assert ledger.spent(run) == dict.fromkeys((0, 1, 2), 1.25)
        assert ledger.spent_on("text", "client") == dict.fromkeys((0, 1, 2), 3.75)

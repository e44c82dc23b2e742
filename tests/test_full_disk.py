"""A disk without room, or a place that cannot be written: one line, and no bit is lost."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedrun import cli
from fedrun.common.errors import explain
from fedrun.common.files import write_atomic
from fedrun.data import building
from fedrun.records import checkpoint, snapshots
from fedrun.records.events import Events, Progress
from tests.support.disk import full, no_space
from tests.support.runs import Outcome, Run, assert_equal, error_lines

FLAGS = ("--num_clients", 2, "--rounds", 6, "--val_freq", 1, "--checkpoint_freq", 2)
SLOW = pytest.mark.slow
Wholes = Callable[[str], Outcome]


@pytest.fixture(scope="module")
def whole(little_text: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Wholes:
    """The undisturbed run of a method with FLAGS."""
    folder = tmp_path_factory.mktemp("whole")

    @functools.cache
    def of(method: str) -> Outcome:
        code = cli.main([method, *little_text, "--data_dir", str(folder), "--run_name", method,
                         *map(str, flags_of(method))])
        assert code == 0
        return Outcome(code, "", folder / method)
    return of


def flags_of(method: str) -> tuple[object, ...]:
    return FLAGS if method == "fed_avg" else FLAGS[2:]


@pytest.mark.parametrize("command", [
    ("plot", "perplexities", "--data_dir", "{runs}", "--out_dir", "{file}/x"),
    pytest.param(("report", "--skip_deltas", "--data_dir", "{runs}", "--out", "{file}/x"),
                 marks=SLOW),
    ("export", "{run}", "{file}/x"),
    ("evaluate", "{run}", "--cache_dir", "{file}/x"),
])
def test_a_place_that_cannot_be_written_is_named_with_its_flag(
        command: tuple[str, ...], whole: Wholes, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    file, run = tmp_path / "file", whole("fed_avg").run_dir
    file.touch()
    whole("central")
    filled = [part.format(runs=run.parent, run=run, file=file) for part in command]
    capsys.readouterr()
    assert cli.main(filled) == 2
    (line,) = error_lines(capsys.readouterr().err)
    flag = next((f for f in ("--out_dir", "--out", "--cache_dir") if f in command), "OUT")
    assert line.startswith(f"fedrun: error: {flag} {file}/x: ")
    assert "Not a directory" in line or "File exists" in line


def test_a_file_that_does_not_fit_is_named_with_what_it_needs(tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch
                                                              ) -> None:
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomic(tmp_path / "model", b"x" * 1_500_000, b"y" * 12_345)
    assert (explain(caught.value) or "").startswith(
        f"{tmp_path / 'model'}: No space left on device (1.5 MB needed, ")
    assert not list(tmp_path.iterdir())


class Disk:
    """Has no room for some of a run's files, from a step on and for some writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, match: str, writes: range) -> None:
        self.match, self.writes, self.count = match, writes, 0
        for module in (snapshots, checkpoint):
            monkeypatch.setattr(module, "write_atomic", self._limited(module.write_atomic))

    def _limited(self, write: Callable[..., None]) -> Callable[..., None]:
        def limited(path: Path, *content: Any, **how: Any) -> None:
            if self.match in str(path):
                self.count += 1
                if self.count in self.writes:
                    raise no_space(path)
            write(path, *content, **how)
        return limited


@pytest.mark.parametrize("method", [pytest.param("fed_avg", marks=SLOW), "central"])
def test_steps_that_find_the_disk_full_are_there_in_the_end(
        method: str, run_here: Run, whole: Wholes, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no checkpoint is made without them, from which a run would resume without them."""
    undisturbed = whole(method)
    Disk(monkeypatch, "params/step_", range(3, 6))  # of steps 2 and 3, and of a checkpoint
    ended = run_here(method, *flags_of(method))
    assert ended.code == 0, ended.output
    assert "could not be written" in ended.output
    assert_equal(ended, undisturbed)


@pytest.mark.parametrize("method", ["fed_avg", pytest.param("central", marks=SLOW)])
def test_a_disk_that_stays_full_ends_the_run_and_with_room_it_ends_in_the_same_bits(
        method: str, run_here: Run, whole: Wholes, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        Disk(broken, "deltas/step_", range(2, 10**6))
        ended = run_here(method, *flags_of(method))
    assert ended.code == 1
    (line,) = error_lines(ended.output)
    assert "deltas/step_000002.npz: No space left on device" in line
    assert "checkpoint" in ended.output  # none was made: step 2 was never whole
    assert not list(ended.run_dir.glob("checkpoints/*/manifest.json"))
    again = run_here(method, *flags_of(method))
    assert again.code == 0, again.output
    assert_equal(again, whole(method))


@pytest.mark.parametrize("match", ["clients/client_1"] + [
    pytest.param(name, marks=SLOW) for name in ("model.safetensors", "outcome.json",
                                                "config.json")])
def test_a_full_disk_ends_a_run_in_one_line(match: str, run_here: Run, whole: Wholes,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    flags = (*FLAGS, "--client_store", "disk")
    import fedrun.common.files
    with monkeypatch.context() as broken:
        count = 5 if match.startswith("clients") else 2 if match == "outcome.json" else 1
        disk = Disk(broken, match, range(count, 10**6))
        files = fedrun.common.files
        broken.setattr(files, "write_atomic", disk._limited(files.write_atomic))
        ended = run_here("fed_avg", *flags)
    assert ended.code in (1, 2)
    (line,) = error_lines(ended.output)
    assert "No space left on device" in line
    again = run_here("fed_avg", *flags)
    assert again.code == 0, again.output
    assert_equal(again, whole("fed_avg"))


def test_a_cache_that_does_not_fit(run_here: Run, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    with monkeypatch.context() as broken:
        broken.setattr(building, "write_ids", full)
        outcome = run_here("fed_avg", "--cache_dir", cache)
    assert outcome.code == 2
    (line,) = error_lines(outcome.output)
    assert line.startswith(f"fedrun: error: --cache_dir {cache}: {cache}/tokens/")
    assert "No space left on device (" in line
    assert "free)" in line
    assert not [p for p in (cache / "tokens").iterdir() if p.is_dir()]  # what was made is gone


def test_a_cache_that_is_emptied_under_a_run(run_here: Run, whole: Wholes, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed, step, cache = whole("central"), Progress.step, tmp_path / "cache"

    def emptied(progress: Progress, number: int, *args: Any) -> None:
        step(progress, number, *args)
        if number == 2:
            shutil.rmtree(cache)

    monkeypatch.setattr(Progress, "step", emptied)
    done = run_here("central", *flags_of("central"), "--cache_dir", cache)
    assert done.code == 0, done.output
    assert not cache.exists()
    assert_equal(done, undisturbed)


def test_lines_of_events_wait_for_room(run_here: Run, whole: Wholes,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that was taken in part is finished; none is lost."""
    undisturbed = whole("fed_avg")

    class Full:
        def __init__(self, real: Any) -> None:
            self.real, self.calls = real, 0

        def write(self, content: bytes) -> int:
            self.calls += 1
            if self.calls == 3:
                return int(self.real.write(content[:20]))
            if 3 < self.calls < 7:
                raise no_space()
            return int(self.real.write(content))

        def close(self) -> None:
            self.real.close()

    begin = Events.__init__

    def limited(events: Events, *args: Any) -> None:
        begin(events, *args)
        patched: Any = events
        patched.file = Full(events.file)

    monkeypatch.setattr(Events, "__init__", limited)
    ended = run_here("fed_avg", *FLAGS)
    assert ended.code == 0, ended.output
    assert_equal(ended, undisturbed)

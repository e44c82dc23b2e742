"""Machines as they are: users without a home or without rights, full disks, umasks."""

from __future__ import annotations

import errno
import functools
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedrun import cli
from fedrun.common import locks
from fedrun.common.errors import Diverged, explain, naming
from fedrun.common.files import write_atomic
from fedrun.data import tokens
from fedrun.plots.runs import find_runs
from fedrun.records import checkpoint, snapshots
from fedrun.records.events import Events, Progress
from fedrun.records.snapshots import SnapshotWriter
from tests.support.runs import Outcome, Run, assert_equal

FLAGS = ("--num_clients", 2, "--rounds", 6, "--val_freq", 1, "--checkpoint_freq", 2)


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


def no_space(path: object = None) -> OSError:
    text = os.strerror(errno.ENOSPC)
    return OSError(errno.ENOSPC, text) if path is None else OSError(errno.ENOSPC, text, str(path))


def error_lines(output: str) -> list[str]:
    assert "Traceback" not in output
    return [line for line in output.splitlines() if line.startswith("fedrun: error:")]


# ---- whose error it is --------------------------------------------------------------------------

def raised(call: Callable[[], Any]) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        call()
    return caught.value


def from_a_library() -> None:
    try:
        raise no_space("/x/data.arrow")
    except OSError as error:
        raise RuntimeError("An error occurred while generating the dataset") from error


@pytest.mark.parametrize(("call", "line"), [
    (Path("/nowhere/x").read_bytes, "/nowhere/x: No such file or directory"),
    (from_a_library, "/x/data.arrow: No space left on device"),
    (lambda: bytearray(2**62), "not enough memory"),
    (lambda: os.fsync(10**6), "Bad file descriptor"),
    (lambda: cli.parse(["fed_avg", "--lr", "x"]), "--lr x: must be a number"),
    (lambda: int("x"), None),
    (lambda: {}["x"], None),
    (lambda: locks.acquire(Path("/proc/self/nowhere/lock"), 0), "/proc/self/nowhere: No such file "
     "or directory"),
])
def test_faults_of_users_and_machines_have_a_line_and_ours_have_none(call: Callable[[], Any],
                                                                     line: str | None) -> None:
    assert explain(raised(call)) == line


def test_a_library_that_tells_the_system_s_error_in_words() -> None:
    assert explain(Exception("No space left on device (os error 28)")) == (
        "No space left on device (os error 28)")
    assert explain(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate "
                                "9 bytes")).startswith("not enough memory: Default")  # type: ignore
    assert explain(Diverged("made here, not in the package")) is None


def test_the_line_of_a_disk_names_the_flag_once() -> None:
    with pytest.raises(ValueError, match=r"^--out /o: No space left on device$"), \
            naming("--out", Path("/o")):
        raise no_space("/o")


# ---- users --------------------------------------------------------------------------------------

@pytest.mark.parametrize("command", [
    ("fed_avg", "--dataset", "pydocs"), ("partition", "--dataset", "pydocs"),
    ("fed_avg", "--data_dir", "~/results"), ("fed_avg", "--dataset", "~/text")])
def test_a_user_without_a_home(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cli.main(command) in (1, 2)
    (line,) = error_lines(capsys.readouterr().err)
    assert "this user has no home directory" in line
    assert "--cache_dir" in line


@pytest.mark.parametrize("command", [
    ("plot", "perplexities", "--data_dir", "{runs}", "--out_dir", "{file}/x"),
    pytest.param(("report", "--skip_deltas", "--data_dir", "{runs}", "--out", "{file}/x"),
                 marks=pytest.mark.slow),
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


@contextmanager
def another_user(*private: Path) -> Iterator[None]:
    """As somebody who may not read the paths: as root, by giving up its rights."""
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in private}
    for path in private:
        path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user may write into."""
    with tempfile.TemporaryDirectory(prefix="fedrun-tests-") as name:
        Path(name).chmod(0o777)
        yield Path(name)


def test_a_run_of_another_user_does_not_keep_others_from_being_found(shared: Path) -> None:
    from tests.support.folders import ours
    mine, theirs = ours(shared, seed=0), ours(shared, seed=1, name="theirs")
    with another_user(theirs):
        found = find_runs(shared)
    assert [run.path for run in found.runs] == [mine]
    (name, why), = found.passed_over
    assert name == "theirs"
    assert "Permission denied" in why


def test_locks_of_another_user(shared: Path) -> None:
    (shared / "read").touch()
    (shared / "unreadable").touch()
    (shared / "read").chmod(0o444)
    with another_user(shared / "unreadable"):
        held = locks.acquire(shared / "read", 0.0)
        with pytest.raises(PermissionError):
            held.write("a run's folder has to be written")
        with pytest.raises(locks.Busy):
            locks.acquire(shared / "read", 0.0)
        held.release()
        with pytest.raises(PermissionError, match="unreadable"):
            locks.acquire(shared / "unreadable", 0.0)
    shared.chmod(0o755)
    if os.geteuid() == 0:  # else it is our own folder, which no mode keeps us from changing
        with another_user(), pytest.raises(PermissionError, match="new"):
            locks.acquire(shared / "new", 0.0)


def test_a_cache_that_may_only_be_read_is_read(shared: Path, tmp_path: Path) -> None:
    text = shared / "tale.txt"
    text.write_text("A ship sailed over the sea to find a new land. " * 200 + "\n\n" + "End. " * 99)
    cache = shared / "cache"
    whole = tokens.prepare(str(text), "bpe:300", 8, cache, lambda line: None).train
    for path in (cache, *cache.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        with another_user():
            data = tokens.prepare(str(text), "bpe:300", 8, cache, lambda line: None)
            assert (data.train == whole).all()
            if os.geteuid() == 65534:
                with pytest.raises(ValueError, match=rf"^--cache_dir {cache}: .*Permission denied"):
                    tokens.prepare(str(text), "bpe:301", 8, cache, lambda line: None)
    finally:
        for path in (cache, *cache.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)


@pytest.mark.parametrize("umask", [0o002, pytest.param(0o077, marks=pytest.mark.slow)])
def test_files_keep_the_umask(umask: int, run_here: Run, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        done = run_here("fed_avg", "--num_clients", 2, "--rounds", 2, "--checkpoint_freq", 1,
                        "--client_store", "disk", "--save_client_deltas",
                        "--cache_dir", tmp_path / "cache")
        assert done.code == 0, done.output
        assert cli.main(["export", str(done.run_dir), str(tmp_path / "out")]) == 0
    finally:
        os.umask(before)
    made = [p for name in ("run", "cache", "out") for p in (tmp_path / name).rglob("*")]
    assert len(made) > 30
    assert {oct(stat.S_IMODE(p.stat().st_mode)) for p in made if p.is_file()} == {
        oct(0o666 & ~umask)}
    assert {oct(stat.S_IMODE(p.stat().st_mode)) for p in made if p.is_dir()} == {
        oct(0o777 & ~umask)}


def test_a_read_only_cache_leaves_a_run_that_can_be_started_again(tmp_path: Path) -> None:
    from fedrun.common.files import copy_files
    (tmp_path / "cache" / "deep").mkdir(parents=True)
    for name in ("tokenizer.json", "deep/more.json"):
        (tmp_path / "cache" / name).write_text(name)
        (tmp_path / "cache" / name).chmod(0o444)
    (tmp_path / "cache" / "deep").chmod(0o555)
    for _ in range(2):
        copy_files(tmp_path / "cache", tmp_path / "run")
    assert (tmp_path / "run" / "deep" / "more.json").read_text() == "deep/more.json"
    assert all(os.stat(p).st_mode & stat.S_IWUSR for p in (tmp_path / "run").rglob("*"))
    (tmp_path / "cache" / "deep").chmod(0o755)


# ---- full disks ---------------------------------------------------------------------------------

def test_a_file_that_does_not_fit_is_named_with_what_it_needs(tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch
                                                              ) -> None:
    def full(_: int) -> None:
        raise no_space()
    monkeypatch.setattr(os, "fsync", full)
    error = raised(lambda: write_atomic(tmp_path / "model", b"x" * 1_500_000, b"y" * 12_345))
    assert (explain(error) or "").startswith(
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


SLOW = pytest.mark.slow


@pytest.mark.parametrize("method", [pytest.param("fed_avg", marks=SLOW), "central"])
def test_steps_that_find_the_disk_full_are_there_in_the_end(
        method: str, run_here: Run, whole: Wholes, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no checkpoint is made without them, from which a run would go on without them."""
    undisturbed = whole(method)
    Disk(monkeypatch, "params/step_", range(2, 5))  # of steps 2 and 3, and of a checkpoint
    full = run_here(method, *flags_of(method))
    assert full.code == 0, full.output
    assert "could not be written" in full.output
    assert_equal(full, undisturbed)


@pytest.mark.parametrize("method", ["fed_avg", pytest.param("central", marks=SLOW)])
def test_a_disk_that_stays_full_ends_the_run_and_with_room_it_ends_in_the_same_bits(
        method: str, run_here: Run, whole: Wholes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before too many steps wait in memory."""
    with monkeypatch.context() as broken:
        Disk(broken, "deltas/step_", range(2, 10**6))
        full = run_here(method, *flags_of(method))
    assert full.code == 1
    (line,) = error_lines(full.output)
    assert "deltas/step_000002.npz: No space left on device" in line
    assert "checkpoint" in full.output  # none was made: step 2 was never whole
    assert not list(full.run_dir.glob("checkpoints/*/manifest.json"))
    assert 1 + SnapshotWriter.MAX_QUEUED < 6
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
        full = run_here("fed_avg", *flags)
    assert full.code in (1, 2)
    ended = [line for line in full.output.splitlines() if line.startswith("fedrun: ")
             and "warning" not in line and not re.match(r"fedrun: round \d+/", line)]
    assert len(ended) == 1, full.output
    assert "No space left on device" in ended[0]
    assert "Traceback" not in full.output
    again = run_here("fed_avg", *flags)
    assert again.code == 0, again.output
    assert_equal(again, whole("fed_avg"))


def test_a_cache_that_does_not_fit(run_here: Run, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise no_space()
    cache = tmp_path / "cache"
    with monkeypatch.context() as broken:
        broken.setattr(tokens, "write_ids", full)
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
        events.file = Full(events.file)  # type: ignore[assignment]

    monkeypatch.setattr(Events, "__init__", limited)
    full = run_here("fed_avg", *FLAGS)
    assert full.code == 0, full.output
    assert_equal(full, undisturbed)

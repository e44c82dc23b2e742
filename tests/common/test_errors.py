"""Which errors are one line for the user, and which are bugs that need a traceback."""

from __future__ import annotations

import ast
import builtins
import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from fedrun import cli
from fedrun.common import errors, locks
from fedrun.common.errors import Diverged, FedrunError, InputError, explain, naming, require
from fedrun.common.log import LOGGER, WARNING, keep_log, log, print_log
from fedrun.data.tokenizer import CustomCodeError
from fedrun.distributed.connect import NotConnected
from tests.support.disk import no_space
from tests.support.runs import ROOT


def test_a_wrong_value_names_the_flag_and_what_it_must_be() -> None:
    require(True, "--lr", 1, "> 0")
    with pytest.raises(InputError, match=r"^--lr -1: must be > 0$"):
        require(False, "--lr", -1, "> 0")


@pytest.mark.parametrize(("error", "line"), [
    (FedrunError("ranks differ\nin --lr"), "ranks differ in --lr"),
    (CustomCodeError("give its tokenizer.json"), "give its tokenizer.json"),
    (NotConnected("rank 2 did not connect"), "rank 2 did not connect"),
    (FileNotFoundError(2, "No such file or directory", "/x"), "/x: No such file or directory"),
    (ConnectionError("reset"), "reset"), (ValueError("invalid literal"), None),
    (KeyError("x"), None)])
def test_only_errors_of_users_and_machines_are_explained(error: Exception, line: str | None
                                                         ) -> None:
    assert explain(error) == line


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
    (lambda: vars(errors)["x"], None),
    (lambda: locks.acquire(Path("/proc/self/nowhere/lock"), 0), "/proc/self/nowhere: No such file "
     "or directory"),
])
def test_errors_of_users_and_machines_have_a_line_and_bugs_have_none(call: Callable[[], Any],
                                                                     line: str | None) -> None:
    assert explain(raised(call)) == line


def test_system_errors_that_libraries_raise_as_text() -> None:
    assert explain(Exception("No space left on device (os error 28)")) == (
        "No space left on device (os error 28)")
    assert explain(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate "
                                "9 bytes")) == (
        "not enough memory: DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 "
        "bytes")
    assert explain(Diverged("the model is\nno longer finite")) == "the model is no longer finite"


def test_a_disk_error_names_the_flag_once() -> None:
    with pytest.raises(ValueError, match=r"^--out /o: No space left on device$"), \
            naming("--out", Path("/o")):
        raise no_space("/o")


@pytest.mark.parametrize("error", [InputError("--lr x: no"), ConnectionError("no answer"),
                                   TimeoutError("no answer")])
def test_the_command_reports_errors_of_users_in_one_line(
        error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        tmp_path: Path) -> None:
    monkeypatch.setenv("FEDRUN_REFUSED", str(tmp_path / "refused"))

    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "parse", fail)
    assert cli.main(["fed_avg"]) == 2
    assert capsys.readouterr().err == f"fedrun: error: {error}\n"
    # A rank or server that did not answer may do so after a restart.
    assert (tmp_path / "refused").exists() == isinstance(error, InputError)


def test_the_command_raises_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are a ValueError, as of a library, for the sake of their traceback."""
    monkeypatch.setattr(cli, "parse", lambda argv: int("bug"))
    with pytest.raises(ValueError, match="bug"):
        cli.main(["fed_avg"])


def raised_classes(folder: str) -> Iterator[tuple[str, type]]:
    """Where and what: every class that modules of a folder raise by its name."""
    for path in sorted((ROOT / "fedrun" / folder).glob("*.py")):
        module = importlib.import_module(f"fedrun.{folder}.{path.stem}")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Raise):
                continue
            name = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(name, ast.Name):
                found = getattr(module, name.id, getattr(builtins, name.id, None))
                if isinstance(found, type):
                    yield f"{path.name}:{node.lineno}", found


@pytest.mark.parametrize("folder", ["common", "distributed"])
def test_what_is_raised_on_purpose_is_worded_for_users(folder: str) -> None:
    found = list(raised_classes(folder))
    assert len(found) >= 5
    for place, error in found:
        assert issubclass(error, FedrunError | OSError | KeyboardInterrupt | SystemExit), place


def test_one_place_ends_processes() -> None:
    for path in (ROOT / "fedrun").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        expected = 1 if path.parts[-2:] == ("distributed", "stopping.py") else 0
        assert text.count("os._exit(") == expected, path


def test_only_the_first_process_of_a_machine_prints_messages() -> None:
    code = ("import os; os.environ |= {'RANK': '3', 'WORLD_SIZE': '4', 'LOCAL_RANK': '1'}\n"
            "from fedrun import cli; from fedrun.common.log import WARNING, log\n"
            "cli.parse = lambda argv: [log('round 1'), log('slow', WARNING)] and None\n"
            "cli.main(['fed_avg'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=True, env=dict(os.environ))
    assert (done.stdout, done.stderr) == ("", "fedrun: warning: slow\n")


def test_messages_have_a_prefix_for_their_level(capsys: pytest.CaptureFixture[str]) -> None:
    print_log()
    log("one")
    log("two\x1b", WARNING)
    log("three", logging.ERROR, trace="Traceback: ...\n")
    assert capsys.readouterr() == ("fedrun: one\n", "fedrun: warning: two\\x1b\n"
                                   "Traceback: ...\nfedrun: error: three\n")
    assert LOGGER.level == logging.INFO


@pytest.mark.parametrize(("error", "code"), [
    (FileNotFoundError(2, "No such file or directory", "/home/n/x"), "disk"),
    (no_space("/home/n/x"), "disk"), (OSError(12, "Cannot allocate memory"), "memory"),
    (MemoryError(), "memory"), (RuntimeError("[enforce fail] can't allocate memory: 8"), "memory"),
    (InputError("--lr 5: must be < 1"), "settings"), (NotConnected("rank 2"), "bug"),
    (Diverged("loss"), "diverged"), (ValueError("the text of a patient"), "bug"),
    (TimeoutError("rank 2"), "bug")])
def test_a_code_is_all_that_leaves_a_site_of_an_error(error: Exception, code: errors.ErrorCode
                                                      ) -> None:
    assert errors.error_code(error) == code
    assert set(errors.ERROR_TEXTS) == set(get_args(errors.ErrorCode))


def test_the_code_is_that_of_the_cause() -> None:
    assert errors.error_code(raised(from_a_library)) == "disk"


def test_a_site_keeps_a_log_that_nobody_else_reads(tmp_path: Path) -> None:
    file, before = tmp_path / "log", LOGGER.handlers.copy()
    try:
        keep_log(file)
        keep_log(file)
        log("the text of a patient", WARNING, "Traceback ...\n")
        # Not to pytest too, whose processes cannot send it to each other.
        LOGGER.handlers[-1].handle(logging.LogRecord("", WARNING, "", 0, "x\udc80", None, None))
    finally:
        LOGGER.handlers[:] = before
    assert file.stat().st_mode & 0o777 == 0o600
    trace, line, odd = file.read_text().splitlines()
    assert trace == "Traceback ..."
    assert line.endswith(f" process {os.getpid()} warning: the text of a patient")
    assert odd.endswith("warning: x\\udc80")
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(OSError, match="symbolic links"):
        keep_log(tmp_path / "link")

"""Runs `fedrun` with a fault at a chosen call that changes files, then the same command without:

    python kill_points.py DATA_DIR CACHE_DIR POINT,POINT,... METHOD FLAG ...

A point is fault:stage:number. Faults: `kill` (before the call, or within a write), `full` (the disk
is full from that call on) and `short` (it is full for SHORT_CALLS calls). The number counts calls
from 1: from the first one of the run (stage `start`, or `cold-start` with an empty cache) or from
the first one on a checkpoint's files (`checkpoint`). Prints a JSON object for each point.

Runs are forked from this process, so that they need not repeat its imports.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WRITE_MODES = set("wax+")
SHORT_CALLS = 12
NEEDS_ROOM = {"open", "write", "mkdir", "fsync", "link", "rename", "replace", "truncate"}


class Shim:
    """Wraps the functions by which Python changes files, and faults those calls that concern files
    below some folders."""

    def __init__(self, point: str, folders: Sequence[Path], log: Path) -> None:
        self.fault, self.stage, number = point.split(":")
        self.number, self.folders, self.log = int(number), [str(f) for f in folders], log
        self.count, self.strikes = 0, 0
        self.real_open = io.open

    def install(self) -> None:
        for name in ("mkdir", "rename", "replace", "link", "symlink", "unlink", "remove", "rmdir",
                     "chmod", "fchmod", "fsync", "truncate", "ftruncate", "utime", "pwrite",
                     "write", "open"):
            setattr(os, name, self.wrapped(name, getattr(os, name)))
        modules: list[Any] = [builtins, io]
        for module in modules:
            module.open = self.open

    def watched(self, place: Any) -> str:
        """The path of a name or descriptor, if it is below one of the folders; else empty."""
        try:
            path = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else os.path.\
                abspath(os.fsdecode(place))
        except (OSError, TypeError):
            return ""
        return path if any(path.startswith(f"{folder}/") for folder in self.folders) else ""

    def due(self, what: str, path: str) -> bool:
        """Count a call; whether it is to fault."""
        if self.stage == "start" or self.count or "/checkpoints" in path:
            self.count += 1
        if self.count == self.number:
            with self.real_open(self.log, "w") as file:
                file.write(f"{what} {path}")
        short = self.fault == "short" and self.count >= self.number + SHORT_CALLS
        if self.count < self.number or short or (self.fault != "kill" and what not in NEEDS_ROOM):
            return False
        self.strikes += 1
        return True

    def strike(self, path: str) -> None:
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        kind = {"pwrite": "write", "ftruncate": "truncate"}.get(name, name)

        def call(place: Any, *args: Any, **kwargs: Any) -> Any:
            path = self.watched(place)
            reads = name == "open" and not args[0] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)
            if path and not reads and self.due(kind, path):
                self.strike(path)
            return real(place, *args, **kwargs)
        return call

    def open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        path = self.watched(file) if WRITE_MODES & set(mode) else ""
        if not path:
            return self.real_open(file, mode, *args, **kwargs)
        if not isinstance(file, int) and self.due("open", path):
            self.strike(path)
        return File(self.real_open(file, mode, *args, **kwargs), path, self)


class File:
    """An open file whose writes are counted. A write that faults is half done."""

    def __init__(self, real: Any, path: str, shim: Shim) -> None:
        self._real, self._path, self._shim = real, path, shim

    def write(self, content: Any) -> Any:
        if self._shim.due("write", self._path):
            if self._shim.fault != "kill" and isinstance(self._real, io.FileIO):
                if self._shim.strikes == 1:  # as the system does: a partial write, then the error
                    return self._real.write(content[:len(content) // 2])
                self._shim.strike(self._path)
            half = content if isinstance(content, str) else memoryview(content).cast("B")
            self._real.write(half[:len(half) // 2])
            self._real.flush()
            self._shim.strike(self._path)
        return self._real.write(content)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self._real.close()

    def __iter__(self) -> Any:
        return iter(self._real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def run(argv: Sequence[str], log: Path, before: Callable[[], None] = lambda: None
        ) -> tuple[int, str]:
    """Run `fedrun` in a forked process, after calling `before` there. Returns its exit code
    (negative for a signal) and its output."""
    from fedrun import cli
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        code = 70
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            before()
            code = cli.main(argv)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), log.read_text()


def main(argv: Sequence[str]) -> None:
    import torch

    import fedrun.run  # noqa: F401  (imported once, before forking)
    torch.set_num_threads(1)
    data_dir, cache_dir, points, command = Path(argv[0]), Path(argv[1]), argv[2], argv[3:]
    logs = data_dir / "logs"
    logs.mkdir(parents=True)
    warm = shutil.copytree(cache_dir, data_dir / "cache")
    for number, point in enumerate(points.split(",")):
        name, cache = f"run{number}", warm
        if ":cold-" in point:
            cache = data_dir / f"cache{number}"
        flags = [*command, "--data_dir", str(data_dir / "runs"), "--cache_dir", str(cache),
                 "--run_name", name]
        shim = Shim(point.replace("cold-", ""), [data_dir / "runs", cache], logs / f"{name}.struck")
        code, output = run(flags, logs / f"{name}.first", shim.install)
        struck = (logs / f"{name}.struck")
        again, second = run(flags, logs / f"{name}.second")
        print(json.dumps({"point": point, "name": name, "code": code, "output": output,
                          "at": struck.read_text() if struck.exists() else "", "again": again,
                          "second": second}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

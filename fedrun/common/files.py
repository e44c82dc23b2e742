"""Files that are whole or absent when we write them, and not trusted when we read them.

Run folders are copied between machines and edited by hand, so what is read may be damaged, hostile
or no file at all: everything outside a checksum is read through `read_json`.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from fedrun.common.errors import InputError

LARGEST_JSON = 1 << 28  # bytes; a history of a million records has less
DEEPEST_JSON = 50  # brackets within brackets; ours have five
Kind = TypeVar("Kind", dict[str, Any], list[Any])


# Folders that somebody has claimed: what to call before anything is written there.
_claims: dict[Path, Callable[[], None]] = {}


class DamagedFile(InputError):
    """A file that is there and does not hold what it should; the message begins with its path."""


def write_atomic(path: Path, *content: bytes | memoryview, durable: bool = True) -> None:
    """Write a file whole or not at all: whoever opens it, or a crash, never meets half of it.

    content: in pieces, one after the other. Each time a new file, with the permissions that the
    umask leaves, takes the place of the one before. Without `durable` it is not forced to the disk:
    a machine that loses power may lose it.
    """
    check_claim(path)
    name = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # mkstemp's own is 600
            for piece in content:
                file.write(piece)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        check_claim(path)
        os.replace(name, path)
    except BaseException as error:
        with suppress(OSError):  # it may be gone, with its folder
            os.unlink(name)
        if isinstance(error, OSError):
            raise on_disk(error, path, sum(map(len, content))) from None
        raise


def copy_files(source: Path, target: Path) -> None:
    """Copy the files below a folder, each whole, without their permissions: those of a cache that
    is read-only would keep a run from being started again."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            write_atomic(target / path.relative_to(source), path.read_bytes())


def on_disk(error: OSError, path: Path, needed: int = 0) -> OSError:
    """A disk's error as one that names the file which was written, and how much room there is where
    that is what is missing; `needed`: bytes of the file, where they are known."""
    text = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with suppress(OSError):
            free = shutil.disk_usage(next(p for p in path.parents if p.exists())).free
            wanted = f"{_size(needed)} needed, " if needed else ""
            text += f" ({wanted}{_size(free)} free)"
    return OSError(error.errno, text, str(path))


def _size(count: int) -> str:
    """Bytes in decimal units: 1.2 MB."""
    for power, unit in enumerate(("bytes", "kB", "MB", "GB", "TB")):
        if count < 1000 ** (power + 1) or unit == "TB":
            break
    return f"{count / 1000**power:.{int(power > 0)}f} {unit}"


def claim(folder: Path, check: Callable[[], None] | None) -> None:
    """From now on call `check` before a file below the folder is written: it raises where that must
    not be. None ends it."""
    _claims.pop(folder, None)
    if check:
        _claims[folder] = check


def check_claim(path: Path) -> None:
    """Call the checks of the folders that a path is in, or is."""
    for folder, check in list(_claims.items()):
        if path.is_relative_to(folder):
            check()


def _umask() -> int:
    """This process's umask, which only Linux tells without setting it: that is not thread-safe."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            return next(int(line.split()[1], 8) for line in status if line.startswith("Umask:"))
    except (OSError, StopIteration):
        return 0o022


def write_json(path: Path, value: Any) -> None:
    """Write JSON that every reader takes: numbers that are not finite become null."""
    write_atomic(path, (json.dumps(finite(value), indent=1, allow_nan=False) + "\n").encode())


def finite(value: Any) -> Any:
    """A JSON-able value with null in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def read_regular(path: Path, largest: int = LARGEST_JSON) -> bytes:
    """The content of a regular file of at most `largest` bytes.

    Raises:
        OSError: it is not there or cannot be read.
        DamagedFile: it is something else (a folder, a pipe that would never end), or larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise DamagedFile(f"{path} has {size} bytes, at most {largest} are expected")
        return file.read(size)  # not `largest`, which would be allocated


def open_regular(path: Path) -> io.BufferedReader:
    """A regular file, open for reading. OSError where it cannot be opened, DamagedFile where it is
    something else."""
    # Opening a pipe without O_NONBLOCK waits for somebody to write into it.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return open(handle, "rb")
    os.close(handle)
    raise DamagedFile(f"{path} is not a regular file")


@contextmanager
def plain_name(path: Path) -> Iterator[str]:
    """Another name of a regular file, for libraries that take only names in UTF-8 and would wait
    for a pipe. Raises as `open_regular`."""
    with open_regular(path) as file:
        yield f"/dev/fd/{file.fileno()}"


def read_json(path: Path, kind: type[Kind]) -> Kind:
    """The JSON object (dict) or array (list) in a file; NaN and infinities are read as null.

    Raises:
        OSError: it is not there or cannot be read.
        DamagedFile: it holds anything else.
    """
    content = read_regular(path)
    try:
        value = json.loads(content, parse_constant=lambda _: None, parse_float=_finite_float)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is not JSON: {_why(error)}") from None
    if not isinstance(value, kind):
        expected = "an object" if kind is dict else "an array"
        raise DamagedFile(f"{path} does not hold {expected}")
    if _is_deep(value):
        raise DamagedFile(f"{path} is nested more than {DEEPEST_JSON} deep")
    return value


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return str(error)
    return "it has a number of thousands of digits"


def _finite_float(digits: str) -> float | None:
    """1e400 is infinite to Python, without being spelt so."""
    return value if math.isfinite(value := float(digits)) else None


def _is_deep(value: Any) -> bool:
    """Whether it would exhaust the stack of whoever walks it, printing included."""
    level = [value]
    for _ in range(DEEPEST_JSON):
        level = [item for held in level
                 for item in (held.values() if isinstance(held, dict) else held)
                 if isinstance(item, dict | list)]
    return bool(level)


def number(value: Any) -> float:
    """A finite number that JSON gave, as a float; nan for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):  # an integer of hundreds of digits
            return float(value) if math.isfinite(value) else math.nan
    return math.nan


def whole(value: Any, low: int = 0) -> int | None:
    """A whole number that JSON gave, of 63 bits and at least `low`; None for anything else."""
    found = number(value)
    return int(value) if low <= found < 2**63 and found == int(found) else None

"""Files that are written atomically, and not trusted when they are read.

Run folders are copied between machines and edited by hand, so what is read may be damaged, hostile
or not a file at all. Everything that no checksum covers is read through `read_json`.
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

LARGEST_JSON = 1 << 28  # bytes; a history of a million records is smaller
DEEPEST_JSON = 50  # levels of nesting; our own files have five
Kind = TypeVar("Kind", dict[str, Any], list[Any])


# Folders of this process's runs, and the check that is called before each write to one.
_claims: dict[Path, Callable[[], None]] = {}


class DamagedFile(InputError):
    """A file exists, but its content is wrong. The message starts with its path."""


def write_atomic(path: Path, *content: bytes | memoryview, durable: bool = True,
                 secret: bool = False) -> None:
    """Write a file atomically: neither a reader nor a crash can ever find half of it.

    A new file, with the permissions that the umask leaves, replaces the old one.

    content: pieces of the content, in order.
    durable: wait until the file is on the disk; otherwise it may be lost in a power failure.
    secret: with permissions for the owner alone, from the beginning.

    Raises:
        OSError: it cannot be written; the error names the file.
        FolderLost: the run's folder belongs to another run (see `claim`).
    """
    check_claim(path)
    name = ""
    try:
        make_folder(path.parent)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            if not secret:
                os.fchmod(file.fileno(), 0o666 & ~_umask())  # mkstemp gives 600
            for piece in content:
                file.write(piece)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        check_claim(path)
        os.replace(name, path)
    except BaseException as error:
        with suppress(OSError):  # it may have been removed with its folder
            os.unlink(name)
        if isinstance(error, OSError):
            check_claim(path)
            raise on_disk(error, path, sum(map(len, content))) from None
        raise


def make_folder(folder: Path) -> None:
    """Create a folder and those above it, except a folder that a run has claimed: if that is lost
    between the check and this, it must not appear again.

    Raises:
        OSError: it cannot be created.
        FolderLost: the run's folder belongs to another run, or is gone (see `claim`).
    """
    check_claim(folder)
    if folder in _claims or folder.is_dir():
        return
    make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileNotFoundError:
        check_claim(folder)
        raise


def copy_files(source: Path, target: Path) -> None:
    """Copy the files below a folder, each one atomically. Permissions are not copied: those of a
    read-only cache would prevent the run from being started again."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            write_atomic(target / path.relative_to(source), path.read_bytes())


def on_disk(error: OSError, path: Path, needed: int = 0) -> OSError:
    """An OSError that names the file being written and, if the disk is full, the free space.

    needed: size of the file in bytes, if known.
    """
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
    """From now on call `check` before each write to a file below the folder; it raises an error if
    the file must not be written. None removes the check."""
    _claims.pop(folder, None)
    if check:
        _claims[folder] = check


def check_claim(path: Path) -> None:
    """Call the checks of all claimed folders that contain the path, or are the path."""
    for folder, check in list(_claims.items()):
        if path.is_relative_to(folder):
            check()


def _umask() -> int:
    """This process's umask, from Linux's /proc: os.umask can only read it by setting it, which is
    not thread-safe."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            return next(int(line.split()[1], 8) for line in status if line.startswith("Umask:"))
    except (OSError, StopIteration):
        return 0o022


def write_json(path: Path, value: Any) -> None:
    """Write standard JSON: numbers that are not finite become null."""
    write_atomic(path, (json.dumps(finite(value), indent=1, allow_nan=False) + "\n").encode())


def finite(value: Any) -> Any:
    """A value with None in place of NaN and infinities, which JSON does not have."""
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
        OSError: the file does not exist or cannot be read.
        DamagedFile: it is not a regular file (but a folder, or a pipe that never ends), or larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise DamagedFile(f"{path} has {size} bytes; must be at most {largest}")
        return file.read(size)  # `largest` bytes would be allocated


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading. OSError if it cannot be opened, DamagedFile if it is not a
    regular file."""
    # Without O_NONBLOCK, opening a pipe waits until another process opens it for writing.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return open(handle, "rb")
    os.close(handle)
    raise DamagedFile(f"{path} is not a regular file")


@contextmanager
def plain_name(path: Path) -> Iterator[str]:
    """A path in ASCII to a regular file, for libraries that accept only UTF-8 paths and would block
    on a pipe. Raises the same errors as `open_regular`."""
    with open_regular(path) as file:
        yield f"/dev/fd/{file.fileno()}"


def read_json(path: Path, kind: type[Kind]) -> Kind:
    """The JSON object (dict) or array (list) in a file; NaN and infinities become None.

    Raises:
        OSError: the file does not exist or cannot be read.
        DamagedFile: it contains anything else.
    """
    content = read_regular(path)
    try:
        value = json.loads(content, parse_constant=lambda _: None, parse_float=_finite_float)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is not JSON: {_reason(error)}") from None
    if not isinstance(value, kind):
        expected = "an object" if kind is dict else "an array"
        raise DamagedFile(f"{path} does not hold {expected}")
    if _is_deep(value):
        raise DamagedFile(f"{path} is nested more than {DEEPEST_JSON} levels deep")
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return str(error)
    return "it contains a number with thousands of digits"


def _finite_float(digits: str) -> float | None:
    """None for numbers that overflow to infinity, such as 1e400."""
    return value if math.isfinite(value := float(digits)) else None


def _is_deep(value: Any) -> bool:
    """Whether the nesting could exhaust the stack of code that walks it, such as printing."""
    level = [value]
    for _ in range(DEEPEST_JSON):
        level = [item for held in level
                 for item in (held.values() if isinstance(held, dict) else held)
                 if isinstance(item, dict | list)]
    return bool(level)


def number(value: Any) -> float:
    """A finite number from JSON as a float; nan for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):  # an integer with hundreds of digits
            return float(value) if math.isfinite(value) else math.nan
    return math.nan


def whole(value: Any, low: int = 0) -> int | None:
    """An integer from JSON that is >= `low` and < 2**63; None for anything else."""
    found = number(value)
    return int(value) if low <= found < 2**63 and found == int(found) else None

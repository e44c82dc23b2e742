"""Files that are only ever appended to: a line for each entry, on the disk before it counts."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

from fedrun.common import locks
from fedrun.common.files import DamagedFile, on_disk
from fedrun.secure.identity import derive

Entry = TypeVar("Entry", bound=tuple[Any, ...])


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """No other process is in such a block of this file. Busy after a minute if one does not end."""
    try:
        lock = locks.acquire(Path(f"{path}.lock"), 60.0)
    except locks.Busy as holder:
        raise locks.Busy(f"{path}: is in use by {holder}") from None
    try:
        yield
    finally:
        lock.release()


def sync_folder(folder: Path) -> None:
    """Wait until the folder's new files are in it, or a power failure could take them."""
    os.fsync(handle := os.open(folder, os.O_RDONLY))
    os.close(handle)


def line_of(purpose: bytes, values: list[Any], before: str) -> tuple[bytes, str]:
    """An entry's line, and its checksum. before: that of the line before."""
    checksum = derive(purpose, before, json.dumps(values)).hex()
    return json.dumps([*values, checksum]).encode() + b"\n", checksum


class Chain(ABC, Generic[Entry]):
    """An append-only file, which several processes may share; checksums cover all lines before."""

    purpose: bytes
    remedy = "restore it"

    def __init__(self, path: Path, origin: str = "") -> None:
        """origin: what the first checksum covers besides its line."""
        self.path, self._end, self._checksum = path, 0, origin
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        sync_folder(path.parent)

    @abstractmethod
    def parse(self, values: list[Any]) -> Entry:
        """A line's entry. TypeError or ValueError if it is none."""

    def values(self, entry: Entry) -> list[Any]:
        """What `parse` makes the entry of."""
        return list(entry)

    @abstractmethod
    def keep(self, entry: Entry) -> None:
        """Called once with each entry on the disk, in order."""

    @contextmanager
    def up_to_date(self) -> Iterator[None]:
        """All entries were given to `keep`, and within the block nobody adds one. DamagedFile,
        OSError, Busy."""
        with alone(self.path):
            self._read()
            yield

    def append(self, *entries: Entry) -> None:
        """Within `up_to_date`: on return all entries are on the disk. OSError if the disk fails."""
        lines, checksum = b"", self._checksum
        for entry in entries:
            line, checksum = self._line(entry, checksum)
            lines += line
        try:
            written = os.write(self._file, lines)
            os.fsync(self._file)  # also of what an earlier process wrote
        except OSError as error:
            raise on_disk(error, self.path) from None
        if written < len(lines):
            raise OSError(f"{self.path}: the disk is full")
        self._end, self._checksum = self._end + len(lines), checksum
        for entry in entries:
            self.keep(entry)

    def _line(self, entry: Entry, before: str) -> tuple[bytes, str]:
        return line_of(self.purpose, self.values(entry), before)

    def _read(self) -> None:
        """Read what was added. A line without an end was cut off by a crash: it never counted."""
        status = os.fstat(self._file)
        if (length := status.st_size - self._end) < 0:
            raise DamagedFile(f"{self.path}: has lost its end; restore it")
        if not status.st_nlink or not os.path.samestat(status, os.stat(self.path)):
            raise DamagedFile(f"{self.path}: was removed or replaced; restore it")
        *lines, torn = os.pread(self._file, length, self._end).split(b"\n")
        for line in lines:
            try:
                *values, _ = json.loads(line)
                entry = self.parse(values)
                again, checksum = self._line(entry, self._checksum)
                if line + b"\n" != again:
                    raise ValueError
            except (ValueError, TypeError, RecursionError):
                raise DamagedFile(f"{self.path}: damaged at byte {self._end}; {self.remedy}"
                                  ) from None
            self._end, self._checksum = self._end + len(again), checksum
            self.keep(entry)
        if torn:
            os.ftruncate(self._file, self._end)

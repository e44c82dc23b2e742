"""Disks that are full."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NoReturn


def no_space(path: Path | str | None = None) -> OSError:
    """The system's error for a disk without room, with or without the file's name."""
    text = os.strerror(errno.ENOSPC)
    return OSError(errno.ENOSPC, text) if path is None else OSError(errno.ENOSPC, text, str(path))


def full(*_: object, **__: object) -> NoReturn:
    """Stands in for a function that writes."""
    raise no_space()

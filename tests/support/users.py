"""Processes of several users on one machine, for tests that run as root."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from tests.support.runs import ROOT

CLONE_NEWNS = 0x20000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000


def become(uid: int) -> None:
    """Become another user, for good; only root can. Where Python is in a folder that is root's
    alone, what is above it is replaced for this process, by a folder that all can enter."""
    python = Path(sys.base_prefix).resolve()
    closed = [folder for folder in python.parents if not folder.stat().st_mode & 0o001]
    if closed:
        _uncover(python, closed[-1])
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _uncover(folder: Path, closed: Path) -> None:
    """Let `closed` hold nothing but `folder`, in a mount namespace of this process."""
    assert not ROOT.is_relative_to(closed)
    _checked(ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS))
    _mount("none", "/", "", MS_REC | MS_PRIVATE)
    held = os.open(folder, os.O_PATH)
    _mount("tmpfs", str(closed), "tmpfs", 0, "mode=755")
    folder.mkdir(parents=True)
    _mount(f"/proc/self/fd/{held}", str(folder), "", MS_BIND | MS_REC)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    _checked(ctypes.CDLL(None, use_errno=True).mount(
        source.encode(), target.encode(), kind.encode(), flags, data.encode()))


def _checked(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

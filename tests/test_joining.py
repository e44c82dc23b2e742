"""What ranks tell each other once they have connected, and what a site says before."""

from __future__ import annotations

import builtins
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrun.common.errors import InputError
from fedrun.common.log import LOGGER
from fedrun.config import FederatedConfig
from fedrun.data.partition import Shards
from fedrun.data.site_texts import keep_tokenizer
from fedrun.data.sites import IDENTITY, Site, SiteEntry, Sites, read_sites, write_sites
from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.handshake import Membership
from fedrun.distributed.launch import Launch
from fedrun.federation.secure_sum import PlanRefused
from fedrun.flags import resolve
from fedrun.joining import agree_on_sizes, place, proof_of
from fedrun.secure.identity import Identity, public_text
from fedrun.start import RunRefused

NORTH, SERVER = Launch(1, 3), Launch(0, 3)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A folder with those of a server and two sites, and the file of the sites. What a site does to
    its process is undone."""
    keys = {}
    for name in ("server", "north", "south"):
        (tmp_path / name).mkdir()
        keys[name] = public_text(Identity.create(tmp_path / name / IDENTITY).public)
    write_sites(tmp_path / "sites.yaml", Sites("trial", keys["server"], (
        SiteEntry(name="north", key=keys["north"], clients=2),
        SiteEntry(name="south", key=keys["south"]))))
    umask, handlers = os.umask(0o022), LOGGER.handlers.copy()
    yield tmp_path
    os.umask(umask)
    LOGGER.handlers[:] = handlers


def config(home: Path, **flags: str) -> FederatedConfig:
    made = resolve("fed_avg", {"sites": str(home / "sites.yaml"), "config": "tiny", **flags})
    assert isinstance(made, FederatedConfig)
    return made


def at(home: Path, name: str) -> Site:
    return Site("" if name == "server" else name, "" if name == "server" else "text.txt",
                home / name)


def test_a_site_proves_who_it_is_and_writes_for_nobody_else(home: Path) -> None:
    proof = proof_of(config(home), at(home, "north"), NORTH)
    assert proof is not None
    assert (proof.name, proof.run, [*proof.sites]) == ("north", "", ["north", "south"])
    (home / "written").touch()
    assert stat.S_IMODE((home / "written").stat().st_mode) == 0o600
    assert stat.S_IMODE((home / "north" / "log").stat().st_mode) == 0o600
    server = proof_of(config(home), at(home, "server"), SERVER)
    assert server is not None
    assert len(server.run) == 32
    assert not (home / "server" / "log").exists()


def test_one_owner_proves_nothing(home: Path) -> None:
    assert proof_of(config(home), Site("", "{site}.txt", None), Launch()) is None
    assert proof_of(resolve("fed_avg", {"config": "tiny"}), None, NORTH) is None


def test_a_key_that_is_missing_or_another_one_is_named(home: Path) -> None:
    (home / "south" / IDENTITY).chmod(0o644)
    for name, wrong in (("north", "its key is not the one of south"),
                        ("south", f"{home}/south/{IDENTITY}: must be a key's file, for its owner"),
                        ("nowhere", f"no key there ({IDENTITY}); `fedrun sites key` makes one")):
        with pytest.raises(InputError, match=r"^--site_dir") as error:
            proof_of(config(home), Site("south", "text.txt", home / name), NORTH)
        assert wrong in str(error.value)


def test_a_site_needs_the_package(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("fedrun.secure"):
            raise ImportError(name)
        return imported(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'fedrun\[secure\]'"):
        proof_of(config(home), at(home, "north"), NORTH)


def test_private_settings_that_contradict_are_refused_before_connecting(home: Path) -> None:
    with pytest.raises(InputError, match=r"^--site west: must be one of north, south"):
        proof_of(config(home), Site("west", "text.txt", home / "north"), NORTH)
    with pytest.raises(InputError, match=r"^--server colocated: must be dedicated"):
        proof_of(config(home, server="colocated"), at(home, "north"), NORTH)
    with pytest.raises(InputError, match=r"^--site_dir: sites of their own need a process"):
        proof_of(config(home), at(home, "north"), Launch())


def test_a_tokenizer_is_written_once(tmp_path: Path) -> None:
    file = keep_tokenizer(tmp_path, b"{}")
    before = file.stat()
    time.sleep(0.02)
    assert keep_tokenizer(tmp_path, b"{}") == file
    after = file.stat()  # of which reading may change a time
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert keep_tokenizer(tmp_path, b"[]") != file
    file.write_bytes(b"{")  # damaged
    assert keep_tokenizer(tmp_path, b"{}").read_bytes() == b"{}"


class Answered(ControlPlane):
    """The server's, as if the sites had said this."""

    def __init__(self, *said: dict[str, Any]) -> None:
        super().__init__()
        self.said = said
        self.membership = Membership("run", ("", "north", "north", "south"))

    def gather(self, message: Any) -> list[Any] | None:
        return [message, *self.said]


def said(*sizes: int, code: str = "") -> dict[str, Any]:
    return {"sizes": sizes, "code": code}


def test_all_learn_the_sizes_and_each_site_has_its_own_text(home: Path) -> None:
    sites = read_sites(home / "sites.yaml")
    sizes = agree_on_sizes(Answered(said(4, 5), said(4, 5), said(6)), sites, [], "")
    assert sizes == [4, 5, 6]
    text = np.arange(24).reshape(6, 4)
    shards = place(Shards([np.arange(6)], texts=[text]), sizes, sites, "south")
    assert [len(shard) for shard in shards.train] == [0, 0, 6]
    assert shards.texts[2] is text
    assert shards.sizes == sizes
    assert place(Shards([]), sizes, sites, "").sizes == sizes


@pytest.mark.parametrize("lie", [[4, 5, 60], [4, 5], [4, 5, 6, 6]])
def test_a_site_takes_no_other_sizes_than_its_own(home: Path, lie: list[int]) -> None:
    sites, own = read_sites(home / "sites.yaml"), Shards([np.arange(6)], texts=[np.zeros((6, 4))])
    assert place(own, [40, 5, 6], sites, "south").sizes == [40, 5, 6]  # of others it knows none
    with pytest.raises(PlanRefused, match="the server hands out other sizes of this site's"):
        place(own, lie, sites, "south")


@pytest.mark.parametrize(("reports", "problem"), [
    ((said(4, 5), said(4, 5), said(code="text")), "site south: its text cannot be read, or is too "
     "little for its clients (its own log says more)"),
    ((said(4, 5), said(4, 6), said(6)), "site north: its processes have read different text"),
    ((said(4, 5), said(code="memory"), said(6)), "site north: out of memory"),
    ((said(4, 5), said(4, 5), said(6, code="/home/s")), "site south: an unexpected error"),
    ((said(4), said(4), said(6)), "site north: has 1 clients, but 2 in the file of --sites")])
def test_all_learn_which_site_cannot_take_part(home: Path, reports: tuple[dict[str, Any], ...],
                                               problem: str) -> None:
    with pytest.raises(RunRefused) as error:
        agree_on_sizes(Answered(*reports), read_sites(home / "sites.yaml"), [], "")
    assert str(error.value).startswith(problem)

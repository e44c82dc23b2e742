"""Checkpoints that a server and real sites write together, each in a folder of its own: whoever is
killed, and whenever, there is a step that all of them have."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedrun.records.checkpoint import GLOBAL
from tests.support.site_starts import (
    CLIENTS,
    Start,
    config_of,
    flip,
    folder_at,
    manifests,
    saved,
    steps_at,
)

SITES = tuple(CLIENTS)
KILLS = ("part 1 of 4 is written", "part 3 of 4 is written", "part 4 of 4 is written",
         "all parts are reported", "the manifest is written", "the sites keep what is left")


# ---- kills ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("before", [(), (2, 4)])
@pytest.mark.parametrize("moment", KILLS)
def test_after_a_kill_the_newest_common_step_is_found(moment: str, before: tuple[int, ...],
                                                      tmp_path: Path) -> None:
    saved(tmp_path, *before)
    first = Start(tmp_path)
    assert first.begin() == (before[-1] if before else 0)
    for done in first.save(8):
        if done == moment:
            break
    else:
        pytest.fail(f"there is no moment: {moment}")
    first.kill()
    committed = [*before[-1:], *([8] if moment in KILLS[-2:] else [])]
    second = Start(tmp_path)
    assert second.begin() == (committed[-1] if committed else 0)
    assert all(steps_at(tmp_path, site) == manifests(tmp_path) for site in SITES)
    for _ in second.save(8 if moment not in KILLS[-2:] else 10):
        pass
    second.kill()


def test_two_steps_are_left_at_the_server_and_at_each_site(tmp_path: Path) -> None:
    start = Start(tmp_path)
    assert start.begin() == 0
    for step in (2, 4, 6, 8):
        for done in start.save(step):
            if done == "all parts are reported":
                most = {2: 1, 4: 2}.get(step, 3)
                assert [len(steps_at(tmp_path, site)) for site in SITES] == [most] * 3
    assert [steps_at(tmp_path, site) for site in SITES] == [[6, 8]] * 3
    assert manifests(tmp_path) == start.coordinator.kept == [6, 8]
    start.kill()
    for step in (6, 8):
        held = {path.name for path in folder_at(tmp_path, "north", step).iterdir()}
        assert held == {"client_0.safetensors", "client_1.safetensors", "client_2.safetensors",
                        "site_0.json", "site_1.json"}
        assert {path.name for path in (config_of(tmp_path).run_dir / "checkpoints" /
                                       f"step_{step:06d}").iterdir()
                } == {GLOBAL, "server.json", "manifest.json"}


class Killed(BaseException):
    """Stands for the end of all processes."""


class Killer:
    """Ends a run before the n-th call that makes a file visible or removes one; counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.number, self.count = number, 0
        for name in ("replace", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if "/." not in str(path) or args:  # not a half-written file that is cleaned up
                self.count += 1
                if self.count == self.number:
                    raise Killed
            return real(path, *args, **kwargs)
        return call


def killed_at(number: int, root: Path) -> int:
    """Kill a run of four checkpoints at a call; what is left is taken up, also where the newest
    step is damaged at the server. Returns how many calls there were."""
    first, committed = Start(root), list[int]()
    with pytest.MonkeyPatch.context() as monkeypatch:
        killer = Killer(monkeypatch, number)
        try:
            first.begin()
            for step in (2, 4, 6, 8):
                for _ in first.save(step):
                    pass
        except Killed:
            pass
        finally:
            first.kill()
    committed = manifests(root)
    second = Start(root)
    assert (second.decide().step or 0) == (committed[-1] if committed else 0)
    if len(committed) > 1:
        flip(config_of(root).run_dir / "checkpoints" / f"step_{committed[-1]:06d}" / GLOBAL)
        assert second.decide().step == committed[-2]
    assert second.begin() == (committed[-2] if len(committed) > 1 else sum(committed))
    second.kill()
    return killer.count


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kill_at_any_change_of_a_file(tmp_path: Path) -> None:
    count = killed_at(10**9, tmp_path / "0")
    assert count > 60
    for number in range(1, count + 1):
        killed_at(number, tmp_path / str(number))


@pytest.mark.parametrize("committed", [1, 3])
def test_while_the_servers_disk_is_slow_no_site_drops_what_it_may_still_commit(
        committed: int, tmp_path: Path) -> None:
    saved(tmp_path, 2, 4)
    start = Start(tmp_path)
    start.begin()
    queued = list[Callable[[], None]]()
    for step in (6, 8, 10):
        queued += start.coordinator.collect([[], *start.write(step)])
        start.keep()
    list(start.write(12))  # and nobody has reported it
    start.keep()
    assert steps_at(tmp_path, "south") == [2, 4, 6, 8, 10, 12]
    for commit in queued[:committed]:
        commit()
        start.keep()
    start.kill()
    second = Start(tmp_path)
    assert second.begin() == [4, 6, 8, 10][committed]
    assert steps_at(tmp_path, "south") == manifests(tmp_path)
    second.kill()


@pytest.mark.parametrize("ranks", [("", "north", "south", "east"),
                                   ("", "east", "south", "north", "north", "north"),
                                   ("", "south", "east", "east", "north")])
def test_it_goes_on_with_other_processes_at_the_sites(ranks: tuple[str, ...], tmp_path: Path
                                                      ) -> None:
    saved(tmp_path, 2, 4)
    other = Start(tmp_path, ranks)
    assert other.begin() == 4
    for _ in other.save(6):
        pass
    other.kill()
    again = Start(tmp_path)
    assert again.begin() == 6
    again.kill()

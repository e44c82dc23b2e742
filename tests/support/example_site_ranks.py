"""Ranks of sites with --dp example: python -m tests.support.example_site_ranks FOLDER CASE ...

A case is MASKED:PLANE:WHO:WHY: whether sums are (masked or clear), how the workers of a site reach
each other (as in every_site.py), and which site refuses the second round: nobody, because it would
cost more than --max_epsilon (spent), or because its disk is full (full). The first site has two
workers.
"""

from __future__ import annotations

import errno
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.data_plane import DataPlane
from fedrun.distributed.launch import Launch, detect
from fedrun.distributed.runtime import connect
from fedrun.federation.noise_keeper import Keeper, TooMuchSpent, level_of
from fedrun.federation.sequence_noise import SequenceNoise
from fedrun.federation.site_keys import digest_of
from fedrun.federation.worker import Worker
from fedrun.protecting import hiding, make_keeper
from fedrun.protocol import aggregate
from fedrun.secure.masks import Session
from tests.support.every_site import joined
from tests.support.private import EXAMPLE, PRIVATE
from tests.support.site_runs import config_with

ROUNDS = 2


class Watch:
    """Notes the names of this rank's masks, and how many vectors were summed."""

    def __init__(self) -> None:
        self.masks, self.vectors = list[str](), 0
        mask, reduce = Session.mask, DataPlane.reduce

        def masked(session: Session, number: int, name: str, bits: int) -> Any:
            self.masks.append(name)
            return mask(session, number, name, bits)

        def reduced(plane: DataPlane, parts: Any, mask: Any = None) -> tuple[Tensor, ...]:
            self.vectors += 1
            return reduce(plane, parts, mask)

        changed: Any = (Session, DataPlane)
        changed[0].mask, changed[1].reduce = masked, reduced


def refuse(keeper: Keeper, why: str) -> None:
    """Let this site refuse the last round."""
    healthy = keeper.release
    changed: Any = keeper

    def release(plan: Any, *args: Any) -> tuple[bytes, bool]:
        if plan.round < ROUNDS:
            return healthy(plan, *args)
        if why == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise TooMuchSpent(f"round {plan.round}: it would cost too much")

    changed.release = release


def rounds(worker: Worker, watch: Watch) -> list[dict[str, Any]]:
    """What this rank says of all rounds."""
    said = []
    for number in range(1, ROUNDS + 1):
        before = digest_of(worker.global_model)
        watch.masks, watch.vectors = [], 0
        plan = worker.schedule.plan(number, 0.0)
        assert not worker.train(plan).clients
        report = aggregate(worker, plan)
        after = digest_of(worker.global_model)
        said.append({"failure": report.failure, "charged": report.charged, "tail": report.tail,
                     "model": after, "changed": after != before, "masks": watch.masks,
                     "vectors": watch.vectors})
    return said


def one(folder: Path, launch: Launch, control: ControlPlane, case: str, watch: Watch) -> None:
    masked, plane, who, why = case.split(":")
    config = config_with(folder, "fed_avg", PRIVATE | EXAMPLE | {
        "rounds": str(ROUNDS), "lr": "1e-2", "sequence_length": "4", "batch_size": "2",
        "seed": str(zlib.crc32(case.encode()))})
    runtime, experiment, schedule, worker = joined(folder, launch, control, config, case, plane)
    site, sites = experiment.site, experiment.sites
    assert site is not None
    assert sites is not None
    said: dict[str, Any] = {}
    if worker is not None:
        if masked == "clear":
            worker.secure, runtime.data_plane.masked = None, False
        keeper, level = None, level_of(config, schedule, worker.flat.size)
        if runtime.data_plane.site_leader:
            keeper = make_keeper(experiment, level, schedule, None, [])
            if site.name == who:
                refuse(keeper, why)
        noise = hiding(experiment, level, worker, runtime, keeper)
        assert isinstance(noise, SequenceNoise)
        worker.noise = noise
        said = {"site": site.name, "leads": keeper is not None, "secret": noise._secret.hex(),
                "rounds": rounds(worker, watch), "paid": [] if keeper is None else [
                    [one.round, [keeper.first + k for k in one.cohort]]
                    for one in keeper._known()]}
    everyone = control.gather(said)
    if everyone is not None:
        check(case, everyone[1:], schedule.cohort(1), sites.names)
    control.share()


def check(case: str, said: list[dict[str, Any]], cohort: list[int], names: list[str]) -> None:
    masked, _, who, why = case.split(":")
    secrets = {name: {one["secret"] for one in said if one["site"] == name} for name in names}
    assert all(len(found) == 1 for found in secrets.values()), "the workers of a site share one"
    assert len(set.union(*secrets.values())) == len(names), "which no other has"
    codes = {"spent": "spent", "full": "noise", "nothing": ""}
    for place in range(ROUNDS):
        ends = place == ROUNDS - 1 and why != "nothing"
        found = [one["rounds"][place] for one in said]
        assert len({one["model"] for one in found}) == 1
        for rank, one in enumerate(found):
            leads, refuses = said[rank]["leads"], ends and said[rank]["site"] == who
            assert one["failure"] == ("" if not ends else codes[why] if refuses and leads
                                      else "masks")
            assert one["changed"] == (not ends)
            assert one["vectors"] == (0 if ends else 1)
            assert one["charged"] == (leads and not ends), (rank, one)
            assert set(one["masks"]) == (set() if not leads or masked == "clear" else {
                "count", "vector", "noiseless" if refuses else "noised",
                *([] if ends else ["tail"])})
            taken, *_, tokens, losses = one["tail"][:7] if one["tail"] else [0] * 7
            assert (tokens, losses) == (0, 0), "nothing of them leaves"
            assert taken == (len(cohort) if rank == 0 and not ends else 0)
    paid = [one["paid"] for one in said if one["leads"]]
    for number in range(1, ROUNDS + 1):
        clients = [k for log in paid for numbered, own in log if numbered == number for k in own]
        left = number == ROUNDS and why != "nothing"
        assert clients == cohort if not left else 0 < len(clients) < len(cohort)


def main() -> None:
    torch.set_num_threads(1)
    folder, *cases = sys.argv[1:]
    launch, watch = detect(os.environ), Watch()
    with connect(launch, True, 240.0) as control:
        for case in cases:
            one(Path(folder), launch, control, case, watch)
    if launch.rank == 0:
        sys.stdout.write(f"{len(cases)} cases as they must be\n")


if __name__ == "__main__":
    main()

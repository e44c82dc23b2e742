"""Ranks of sites with --dp client: python -m tests.support.private_site_ranks FOLDER CASE ...

A case is SITES:COHORT:PLANE:SPOILED: as in every_site.py, and the clients whose update in the last
round is not finite, such as 1+2, or none. In a folder of the case are all updates before they are
clipped, the keys of the sites' shares, and models. Rank 0 makes each round by hand and compares.
"""

from __future__ import annotations

import math
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.launch import Launch, detect
from fedrun.distributed.runtime import connect
from fedrun.federation.noise import Noise
from fedrun.federation.noise_keeper import Keeper, level_of
from fedrun.federation.worker import Worker
from fedrun.privacy.shares import SharedLevel
from fedrun.protecting import hiding, make_keeper
from fedrun.secure.masks import Session
from fedrun.secure.noise import NoiseKey
from tests.support.every_site import joined
from tests.support.private import CLIP, PRIVATE, round_by_hand
from tests.support.site_runs import config_with

ROUNDS = 2


class Recorder:
    """Writes down what a rank knows of the round of this number."""

    def __init__(self, folder: Path, spoiled: set[int]) -> None:
        self.folder, self.number, self.masks = folder, 0, list[str]()
        clip, round_key, mask = Noise.clip, NoiseKey.round_key, Session.mask

        def clipped(noise: Noise, client: int, update: Tensor) -> bool:
            if self.number == ROUNDS and client in spoiled:
                update[7] = math.nan
            np.save(self.path(f"update_{client}"), update.numpy())
            return clip(noise, client, update)

        def keyed(key: NoiseKey, binding: Any) -> bytes:
            made = round_key(key, binding)
            self.path(f"key_{self.site}.npy").write_bytes(made)
            return made

        def masked(session: Session, number: int, name: str, bits: int) -> Any:
            self.masks.append(name)
            return mask(session, number, name, bits)

        changed: Any = (Noise, NoiseKey, Session)
        changed[0].clip, changed[1].round_key, changed[2].mask = clipped, keyed, masked
        self.site = ""

    def path(self, name: str) -> Path:
        return self.folder / f"{self.number}_{name}"


def rounds(worker: Worker, recorder: Recorder, keeper: Keeper | None) -> dict[str, Any]:
    """All rounds; what this rank says of them."""
    charged, tails = [], []
    for number in range(1, ROUNDS + 1):
        recorder.number = number
        plan = worker.schedule.plan(number, 0.0)
        if worker.runtime.worker == 0:
            np.save(recorder.path("start"), worker.global_model.numpy())
        reported = worker.train(plan)
        assert not reported.clients
        report = worker.aggregate(plan)
        assert not report.failure, report
        charged.append(report.charged)
        tails += report.tail
        if worker.runtime.worker == 0:
            np.save(recorder.path("end"), worker.global_model.numpy())
    return {"charged": charged, "tails": tails, "masks": recorder.masks,
            "released": [] if keeper is None else [
                [release.round, list(release.cohort)] for release in keeper._known()]}


def one(folder: Path, launch: Launch, control: ControlPlane, case: str) -> None:
    count, cohort, plane, spoiled = case.split(":")
    not_finite = set() if spoiled == "none" else {int(k) for k in spoiled.split("+")}
    record = folder / f"record {case}"
    record.mkdir(exist_ok=True)
    config = config_with(folder / count, "fed_avg", PRIVATE | {
        "rounds": str(ROUNDS), "cohort": cohort, "lr": "1e-2",
        "seed": str(zlib.crc32(case.encode()))})
    runtime, experiment, schedule, worker = joined(folder / count, launch, control, config, case,
                                                   plane)
    sites, site = experiment.sites, experiment.site
    assert sites is not None
    assert site is not None
    said, recorder = None, Recorder(record, not_finite)
    if worker is not None:
        recorder.site, keeper = site.name, None
        level = level_of(config, schedule, worker.flat.size)
        if runtime.data_plane.site_leader:
            keeper = make_keeper(experiment, level, schedule, None, [])
        worker.noise = hiding(experiment, level, worker, runtime, keeper)
        said = rounds(worker, recorder, keeper)
    everyone = control.gather(said)
    if everyone is not None:
        assert control.membership is not None
        leaders = control.membership.leaders
        for rank, one_said in enumerate(everyone[1:], 1):
            leads = rank in leaders.values()
            assert one_said["charged"] == [leads] * ROUNDS
            assert one_said["tails"] == []
            assert set(one_said["masks"]) == ({"count", "terms", "noised", "vector"} if leads
                                              else set())
        check(record, schedule, level_of(config, schedule, 1), not_finite)
        without = 0
        for name, rank in leaders.items():
            own = sites.clients_of(name)
            paid = [[number, [k - own.start for k in schedule.cohort(number) if k in own]]
                    for number in range(1, ROUNDS + 1)]
            assert everyone[rank]["released"] == paid
            without += sum(not clients for _, clients in paid)
        sys.stdout.write(f"{without} times a site had no client\n")
    recorder.number = 0  # it stays between, and does nothing more
    control.share()


def check(record: Path, schedule: Any, level: Any, not_finite: set[int]) -> None:
    assert isinstance(level, SharedLevel)
    names = schedule.sites.names
    for number in range(1, ROUNDS + 1):
        cohort = schedule.cohort(number)
        updates = [np.load(record / f"{number}_update_{k}.npy") for k in cohort]
        for k, update in zip(cohort, updates, strict=True):
            assert np.isfinite(update).all() == (number < ROUNDS or k not in not_finite)
        assert number == ROUNDS or any(np.linalg.norm(u.astype(float)) > CLIP for u in updates)
        keys = [(record / f"{number}_key_{name}.npy").read_bytes() for name in names]
        assert len(set(keys)) == len(names)
        start, end = (np.load(record / f"{number}_{what}.npy") for what in ("start", "end"))
        made = round_by_hand(start, updates, keys, len(cohort), level.hidden)
        assert np.array_equal(made, end), f"round {number}"


def main() -> None:
    torch.set_num_threads(1)
    folder, *cases = sys.argv[1:]
    launch = detect(os.environ)
    with connect(launch, True, 240.0) as control:
        for case in cases:
            one(Path(folder), launch, control, case)
    if launch.rank == 0:
        sys.stdout.write(f"{len(cases)} cases the same\n")


if __name__ == "__main__":
    main()

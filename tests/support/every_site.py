"""Rounds with masked sums between sites, in every way: every_site.py FOLDER CASE ...

On as many ranks as a server and the workers of the sites make. Rank 0 trains the same clients by
itself, in a simulation, and every worker must get the same bits as that: of the model, of the
server's own vectors and of the tail.
"""

from __future__ import annotations

import itertools
import os
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from fedrun.config import FederatedConfig
from fedrun.data.partition import Shards
from fedrun.data.sites import Site, Sites, read_sites
from fedrun.data.tokens import TokenData
from fedrun.distributed import runtime as runtime_module
from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.data_plane import DataPlane
from fedrun.distributed.handshake import Membership
from fedrun.distributed.launch import Launch, detect
from fedrun.distributed.runtime import Runtime, build_runtime, connect
from fedrun.experiment import Experiment
from fedrun.federation.schedule import Schedule
from fedrun.federation.site_keys import digest_of
from fedrun.federation.worker import Worker
from fedrun.flags import configs_dir
from fedrun.protecting import secure
from fedrun.protocol import make_worker
from tests.support.made_data import made
from tests.support.site_runs import config_with


def preset(name: str) -> dict[str, str]:
    """The flags of a preset, but for its model."""
    given = yaml.safe_load((configs_dir() / "models" / f"{name}.yaml").read_text())
    return {flag: str(value) for flag, value in given.items() if flag != "model"}


METHODS: dict[str, tuple[str, dict[str, str]]] = {
    "fed_avg": ("fed_avg", {}), "uniform": ("fed_avg", {"weighting": "uniform"}),
    "trained": ("fed_avg", {"weighting": "trained"}),
    "clipped": ("fed_avg", {"client_clip": "0.05", "lr_schedule": "cosine", "local_updates": "6",
                            "local_updates_schedule": "quadratic"}),
    "average": ("fed_avg", {"client_moments": "average"}),
    "average_sqrt": ("fed_avg", {"client_moments": "average_sqrt", "grad_clip": "1",
                                 "moments_every": "1,2"}),
    "average_rows": ("fed_avg", {"client_moments": "average_rows", "grad_clip": "1"}),
    "int8": ("fed_avg", {"aggregation": "int8"}),
    "int8_moments": ("fed_avg", {"aggregation": "int8", "client_moments": "average_sqrt",
                                 "grad_clip": "1", "moments_every": "1,2"}),
    "fast": ("fed_avg", preset("federated_fast")),
    "fed_momentum": ("fed_momentum", {}), "diloco": ("diloco", {}), "fed_adam": ("fed_adam", {}),
    "fed_yogi": ("fed_yogi", {}), "fed_adagrad": ("fed_adagrad", {}),
    "fed_fisher": ("fed_fisher", {}),
    "relative": ("fed_fisher", {"fisher_floor_mode": "relative"}),
    "fed_sgd": ("fed_sgd", {}),
    "fed_geometric_median": ("fed_geometric_median", {"weiszfeld_steps": "1"}),
    "two_steps": ("fed_geometric_median", {"weiszfeld_steps": "2", "client_clip": "0.5"}),
    "three_steps": ("fed_geometric_median", {})}
FEWEST = {"two_steps": 4, "three_steps": 5}
"""Of sites, and of clients in a round, for some of them."""
ROUNDS = 3
PROVENANCE = {"content": "", "partition": "", "init_from": None, "plugin": ""}


def shards_of(data: TokenData, sites: Sites, site: str) -> Shards:
    """The clients' shards, of unequal sizes: of this site's own clients, beside all sizes."""
    sizes = [3 + k % 3 for k in range(sites.num_clients)]
    ends = [0, *itertools.accumulate(sizes)]
    own = sites.clients_of(site) if site else range(sites.num_clients)
    nothing = np.empty(0, np.int64)
    train = [np.arange(a, b) if k in own else nothing
             for k, (a, b) in enumerate(itertools.pairwise(ends))]
    return Shards(train, texts=[data.train] * len(sizes), agreed=sizes)


def results(worker: Worker, plans: Schedule) -> dict[str, Any]:
    """What a worker has after ROUNDS rounds: digests of its vectors, and each round's tail."""
    tails = []
    for number in range(1, ROUNDS + 1):
        plan = plans.plan(number, 0.0)
        assert not worker.train(replace(plan, evaluate=True)).clients
        report = worker.aggregate(replace(plan, evaluate=True))
        assert not report.failure, report
        tails.append(report.tail)
    return {"tails": tails, "vectors": {
        name: digest_of(vector) for name, vector in worker.global_state.named().items()}}


def experiment_of(config: FederatedConfig, sites: Sites, site: Site) -> Experiment:
    data = made([400] * 20)
    return Experiment(config, data, shards_of(data, sites, site.name), None, {**PROVENANCE},
                      sites=sites, site=site)


def joined(own: Path, launch: Launch, control: ControlPlane, config: FederatedConfig, case: str,
           plane: str) -> tuple[Runtime, Experiment, Schedule, Worker | None]:
    """All ranks: what each has of a run between the sites of the folder, with keys agreed on.
    plane: gloo or shared, which is how workers of a site reach each other."""
    sites = read_sites(own / "sites.yaml")
    names = sites.names
    # The first sites have two workers each, if there are enough.
    workers = sorted(names[k % len(names)] for k in range(launch.world_size - 1))
    owners = ("", *sorted(workers, key=names.index))
    control.membership = Membership(f"run {case}", owners, tuple(names))
    machine = 0 if plane == "gloo" else 7
    runtime_module.machine_id = lambda: machine  # type: ignore[attr-defined]
    runtime = build_runtime(launch, torch.device("cpu"), control, {"case": case})
    me = owners[launch.rank]
    experiment = experiment_of(config, sites, Site(me, "", own / me if me else None))
    schedule = Schedule(config, experiment.shards.sizes, sites)
    worker = make_worker(experiment, schedule, runtime, None)
    secure(experiment, schedule, None, worker, runtime, 0)
    return runtime, experiment, schedule, worker


def one(folder: Path, launch: Launch, control: ControlPlane, case: str) -> None:
    """All ranks: one case, METHOD:SITES:COHORT:PLANE."""
    method, count, cohort, plane = case.split(":")
    name, flags = METHODS[method]
    # Each from another model: the journals let no other cohort start from the same.
    config = config_with(folder / count, name, {
        "rounds": str(ROUNDS), "cohort": cohort, "seed": str(zlib.crc32(case.encode())), **flags})
    runtime, experiment, schedule, worker = joined(folder / count, launch, control, config, case,
                                                   plane)
    assert experiment.sites is not None
    found = None if worker is None else results(worker, schedule)
    if worker is not None:
        assert worker.secure is not None
        assert (worker.secure.leader is not None) == runtime.data_plane.site_leader
    everyone = control.gather(found)
    if everyone is not None:
        expected = simulated(config, experiment.sites)
        for rank, result in enumerate(everyone[1:], 1):
            assert result["vectors"] == expected["vectors"], f"{case}: rank {rank} differs"
        assert everyone[1]["tails"] == expected["tails"], f"{case}: the tails differ"
        assert all(tail[0] for tail in expected["tails"])
    control.share()


def simulated(config: FederatedConfig, sites: Sites) -> dict[str, Any]:
    """The same clients, all in this process, with nothing masked."""
    alone = Runtime(detect({}), torch.device("cpu"), (0,), ControlPlane(), DataPlane())
    experiment = experiment_of(config, sites, Site("", "", None))
    schedule = Schedule(config, experiment.shards.sizes, sites)
    worker = make_worker(experiment, schedule, alone, None)
    assert worker is not None
    return results(worker, schedule)


def main() -> None:
    torch.set_num_threads(1)
    folder, *cases = sys.argv[1:]
    launch = detect(os.environ)
    with connect(launch, True, 60.0) as control:
        for case in cases:
            one(Path(folder), launch, control, case)
    if launch.rank == 0:
        sys.stdout.write(f"{len(cases)} cases the same\n")


if __name__ == "__main__":
    main()

"""What protects clients, made before the first round: the masks of sites, the noise of --dp."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedrun.common.errors import FedrunError, explain
from fedrun.common.log import ERROR, log
from fedrun.config import FederatedConfig
from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.runtime import Runtime
from fedrun.experiment import Experiment, identity
from fedrun.federation.early_end import RunEnded
from fedrun.federation.example_spending import ExampleSpending
from fedrun.federation.messages import RoundDecision, decode, encode
from fedrun.federation.noise import Noise
from fedrun.federation.noise_keeper import RUNS, Keeper, Level, Standing, keeper_of, level_of
from fedrun.federation.schedule import Schedule
from fedrun.federation.secure_sum import SecureSum
from fedrun.federation.sequence_noise import SequenceNoise
from fedrun.federation.server import Server
from fedrun.federation.site_keys import KeysRefused, Leader, agree, digest_of
from fedrun.federation.site_noise import hiding_between_sites, site_keeper_of, together
from fedrun.federation.spending import Spending
from fedrun.federation.worker import Worker
from fedrun.joining import problem_of
from fedrun.model.pretrained import parameters_of
from fedrun.privacy.example_level import ExampleLevel
from fedrun.records.checkpoint import Checkpoint
from fedrun.start import RunRefused

REFUSED = "refused"  # in place of what a keeper says


def secure(experiment: Experiment, schedule: Schedule, server: Server | None,
           worker: Worker | None, runtime: Runtime, done: int) -> None:
    """All ranks, with --secure_sum: make the keys of this start, and let the worker use them. In a
    simulation there are none."""
    config, control, sites = experiment.federated, runtime.control, experiment.sites
    leader, plan = None, b""
    assert sites is not None
    require_one_machine(runtime)
    if control.membership is not None:
        if worker is not None and runtime.data_plane.site_leader:
            site, seed = experiment.site, experiment.config.seed
            assert site is not None
            assert site.folder is not None
            leader = Leader.open(site.name, site.folder, sites, control.membership.run, seed,
                                 experiment.shards, experiment.data)
            plan = hashlib.sha256(json.dumps([
                identity(experiment), experiment.shards.sizes, sites.digest(),
                digest_of(worker.global_model)], sort_keys=True).encode()).digest()
        try:
            agree(control, leader, plan)
        except KeysRefused as error:
            if server is not None:
                server.announce(RoundDecision(str(error)))
            control.share()  # all ranks: nobody leaves before the reason is printed
            raise RunEnded(str(error)) from None
    if worker is not None:
        worker.secure = SecureSum(config, sites, schedule, experiment.data.vocab_size,
                                  runtime.data_plane, done, leader,
                                  runtime.launch.local_world_size)


def require_one_machine(runtime: Runtime) -> None:
    """FedrunError on the workers of a site that are on several machines: what they sum among
    themselves, before the mask, would travel in the clear, through the server's machine too."""
    plane = runtime.data_plane
    if plane.of_site and plane.machines > 1:
        raise FedrunError(f"--site_dir: the workers of this site are on {plane.machines} machines; "
                          "must be on one, since what they sum among themselves has no mask")


@dataclass(frozen=True)
class Protection:
    """What --dp needs in this start of a run, as `arrange` has found it."""

    level: Level
    keeper: Keeper | None
    """On the first worker, or that of each site: the log of what was spent."""
    spending: Spending | None
    """On the server."""


def arrange(experiment: Experiment, runtime: Runtime, checkpoint: Checkpoint | None
            ) -> Protection | None:
    """All ranks, before anything in the run's folder is touched: with --dp the first worker, or
    that of each site, opens the log of what was spent, and the server hears of it. RunRefused on
    all of them if there is no noise to be had, or no round to be made."""
    if not isinstance(experiment.config, FederatedConfig) or not experiment.config.private:
        return None
    config, control, schedule = experiment.config, runtime.control, experiment.schedule
    level, keeper, said = None, None, dict[str, Any]()
    earlier = earlier_runs(control, runtime.is_server, checkpoint)
    try:
        level = level_of(config, schedule, parameters_of(
            config.model, config.model.rows(experiment.data.vocab_size)))
        if runtime.worker is not None and runtime.data_plane.site_leader:
            keeper = make_keeper(experiment, level, schedule, checkpoint, earlier)
            said = encode(keeper.standing)
    except (FedrunError, OSError) as error:
        said = {REFUSED: explain(error)}
        if level is not None and experiment.at_site and experiment.site is not None:
            log(said[REFUSED], ERROR)  # the line stays there
            said = {REFUSED: problem_of(experiment.site.name, "noise")}
    everyone, spending = control.gather(said), None
    if everyone is not None:
        told = [one for one in everyone if one]
        said = next((one for one in told if REFUSED in one), {}) or encode(together(
            [decode(Standing, one) for one in told], schedule))
    if runtime.is_server and level is not None and REFUSED not in said:
        spending = (Spending if config.dp == "client" else ExampleSpending)(
            config, schedule, level, decode(Standing, said),
            checkpoint.step if checkpoint is not None else 0)
        if refused := spending.refusal():
            said = {REFUSED: refused}
    said = control.share(said if runtime.is_server else None)
    if REFUSED in said:
        raise RunRefused(said[REFUSED])
    assert level is not None
    return Protection(level, keeper, spending)


def protect(experiment: Experiment, found: Protection, server: Server | None,
            worker: Worker | None, runtime: Runtime) -> None:
    """All ranks, with --dp: the server records what the run will cost, and each worker gets its
    part of the noise."""
    if server is not None:
        assert found.spending is not None
        server.spending = found.spending
        server.spending.begin(server.flat.vector)
    if worker is not None:                                              # workers <-> workers
        assert found.level.size == worker.flat.size
        worker.noise = hiding(experiment, found.level, worker, runtime, found.keeper)


def hiding(experiment: Experiment, level: Level, worker: Worker, runtime: Runtime,
           keeper: Keeper | None) -> Noise:
    """Workers: this one's part of the noise. keeper: on those that have one."""
    plane, sites = runtime.data_plane, experiment.sites
    require_one_machine(runtime)
    if isinstance(level, ExampleLevel):
        return SequenceNoise(level, plane, keeper, worker.flat, sites, worker.secure)
    if sites is None:
        return Noise(level, plane, keeper)
    return hiding_between_sites(level, plane, keeper, sites, worker.secure)


def earlier_runs(control: ControlPlane, is_server: bool, checkpoint: Checkpoint | None
                 ) -> list[str]:
    """All ranks, between sites of their own: the runs that the model of the checkpoint has come
    from, which the server knows."""
    if control.membership is None:
        return []
    known = checkpoint.server.get(RUNS, []) if is_server and checkpoint is not None else []
    return list(control.share(known if is_server else None))


def make_keeper(experiment: Experiment, level: Level, schedule: Schedule,
                checkpoint: Checkpoint | None, earlier: Sequence[str]) -> Keeper:
    """That of the first worker, or of a site of its own."""
    config, shards, data = experiment.federated, experiment.shards, experiment.data
    site, provenance = experiment.site, experiment.provenance
    if site is None or site.folder is None:
        return keeper_of(config, level, schedule, shards, data, provenance, checkpoint)
    done = 0 if checkpoint is None else checkpoint.step
    return site_keeper_of(config, level, schedule, shards, data, provenance, earlier, done,
                          site.folder, site.name)

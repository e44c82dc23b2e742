"""One run on this rank, from preparation to its end, successful or not."""

from __future__ import annotations

import os
import shlex
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedrun import central, protocol
from fedrun.common.errors import Diverged, InputError, explain
from fedrun.common.files import copy_files, write_json
from fedrun.common.limits import TooLittle, shortage
from fedrun.common.log import ERROR, WARNING, log, print_log
from fedrun.common.terminal import visible
from fedrun.config import FederatedConfig, RunConfig
from fedrun.data.given import GivenData
from fedrun.data.site_settings import require_steps
from fedrun.data.sites import Site
from fedrun.data.tokenizer import ids_size
from fedrun.distributed.connect import NotConnected, decline, exposure
from fedrun.distributed.handshake import Proof
from fedrun.distributed.launch import Launch, detect
from fedrun.distributed.runtime import Runtime, build_runtime, choose_device, connect
from fedrun.distributed.stopping import StopRequest
from fedrun.experiment import (
    CorpusCheck,
    Experiment,
    environment,
    identity,
    prepare_experiment,
)
from fedrun.federation.early_end import RunEnded
from fedrun.joining import (
    agree_on_start,
    hardware_of_workers,
    join,
    problem_of,
    proof_of,
    states_of,
    take_up,
)
from fedrun.model.compilation import compile_kernels, use_local_cache
from fedrun.model.hardware import Hardware, hardware, together
from fedrun.model.kernels import import_warning
from fedrun.model.precision import exact_fp32, make_deterministic
from fedrun.privacy.accountant import require_accounting
from fedrun.protecting import arrange
from fedrun.records.checkpoint import latest_step
from fedrun.records.outcome import read_outcome, write_failure
from fedrun.records.privacy import write_privacy
from fedrun.records.recorder import OnRound
from fedrun.records.restore import finish_from_checkpoint, move_obstacles, warn_of_missing_records
from fedrun.records.run_dir import ENVIRONMENT
from fedrun.records.run_files import LOCK
from fedrun.records.run_lock import guard_run_dir, lock_token, release_run_dir
from fedrun.records.trackers import check_tracker
from fedrun.start import RunRefused, prepare_run_dir
from fedrun.unused import idle

SECONDS_TO_SEE_A_FILE = 30.0  # on a network file system


@dataclass(frozen=True)
class Prepared:
    """A run on this rank, ready to connect."""

    given: RunConfig
    """Before --init_from changed it."""
    experiment: Experiment
    check: CorpusCheck
    launch: Launch
    device: torch.device
    proof: Proof | None = None
    """Of who this is, in a run between sites of their own."""


def run(config: RunConfig, site: Site | None = None) -> int:
    """The command: prepare, connect, train. Returns the exit code: 0 if done or stopped, 1 if the
    run failed and the reason was printed.

    site: the private settings of a run with --sites.

    Raises InputError for what the user has to change, before any process group exists.
    """
    launch = detect(os.environ)
    print_log(quiet=launch.local_rank > 0)
    try:
        prepared = prepare(config, launch, site=site)
    except InputError:
        if site is not None and site.folder is not None and launch.rank:
            decline(launch, problem_of(site.name or f"of rank {launch.rank}", "settings"))
        raise
    try:
        train(prepared)
    except (RunRefused, NotConnected, TooLittle):
        raise
    except Exception as error:
        report(error, launch, prepared.experiment.at_site)
        return 1
    folder = config.run_dir
    if launch.rank == 0 and read_outcome(folder).get("outcome") == "finished":
        log(next_commands(folder))
    return 0


def next_commands(folder: Path) -> str:
    """What the command line prints when a run has finished: what can be done with it."""
    runs, ours = shlex.quote(str(folder.parent)), folder.parent == RunConfig.data_dir
    name = shlex.quote(folder.name if ours else str(folder))
    return visible(f'next: fedrun generate {name} "The function"; fedrun report'
                   + ("" if ours else f" --data_dir {runs}"))


def report(error: Exception, launch: Launch, at_site: bool = False) -> None:
    """On each rank: print the error that ended a run, unless the server has, for the same user."""
    if isinstance(error, RunEnded):
        if at_site:
            log(str(error).rpartition("\n")[2], ERROR)
    elif isinstance(error, Diverged):
        log(str(error), ERROR)
    elif line := shortage(error) or explain(error):
        log(line if launch.alone else f"rank {launch.rank}: {line}", ERROR)
    else:
        log(f"rank {launch.rank} ends with the error above", ERROR,
            "".join(traceback.format_exception(error)))


def prepare(config: RunConfig, launch: Launch, data: GivenData | None = None,
            site: Site | None = None) -> Prepared:
    """Set this process up, read text and weights, and start to verify them. InputError for what the
    user has to change.

    data: in place of --dataset's. site: the private settings of a run with --sites.
    """
    if not isinstance(config, FederatedConfig) and not launch.alone:
        raise InputError(f"central runs in one process, but {launch.world_size} were started: "
                         f"use `python -m fedrun central`")
    proof = proof_of(config, site, launch)
    if warning := exposure(launch):
        log(warning, WARNING)
    torch.set_num_threads(config.threads)
    if proof is None or not proof.name:  # a site records nothing
        check_tracker(config)
    device = choose_device(config.device, launch, _dedicated(config))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL uses the current device
        use_local_cache(config.deterministic)
    if config.deterministic:
        make_deterministic(config.device != "cpu" and config.dtype != "fp64"
                           and torch.cuda.is_available())
    experiment = prepare_experiment(config, device, data, site)
    check = CorpusCheck(experiment, launch)
    if not experiment.real:  # refused before connecting if there is nothing to do
        _ = experiment.length
        if isinstance(config, FederatedConfig):
            _ = experiment.schedule
    else:  # of text that is not read yet, what the settings alone say
        require_steps(experiment.federated, experiment.federated.local_updates)
        if experiment.federated.dp == "example":
            require_accounting()
    return Prepared(config, experiment, check, launch, device, proof)


def train(prepared: Prepared, on_round: OnRound | None = None) -> None:
    """All ranks: connect and train. An error is recorded in the run's folder and raised.

    on_round: called by the server after each round, or step of a central run.
    """
    launch, run_dir = prepared.launch, prepared.experiment.config.run_dir
    try:
        ended = _connect_and_train(prepared, on_round)
    except (RunRefused, NotConnected, TooLittle, RunEnded):
        raise
    except Exception as error:
        if launch.rank == 0:
            line = shortage(error) or explain(error) or str(error).partition("\n")[0]
            write_failure(run_dir, line, "diverged" if isinstance(error, Diverged) else "error")
        raise
    finally:
        if not prepared.experiment.at_site:
            release_run_dir(run_dir)
    if launch.rank == 0 or prepared.experiment.at_site:
        log(ended)


def _connect_and_train(prepared: Prepared, on_round: OnRound | None) -> str:
    """All ranks: the run itself, started as rank 0 decides. Returns the line to end with."""
    experiment, launch, device = prepared.experiment, prepared.launch, prepared.device
    config, here = experiment.config, hardware(device)
    remarks = warnings(prepared.given, experiment)
    with connect(launch, _dedicated(config), config.timeout, prepared.proof) as control:
        if control.membership is None:
            data = prepared.check.agree(control)
        else:
            experiment = join(experiment, control, prepared.check, device)
            data = experiment.data
            here = replace(here, host=control.membership.host(launch.rank, launch.local_rank))
        workers = hardware_of_workers(control, here)
        experiment = experiment.on(workers.values())
        states = states_of(experiment, control, prepared.proof)
        start = agree_on_start(control, experiment, workers, states)
        experiment = experiment.decided(start.dtype, data)
        config = experiment.config
        if config.dtype == "fp32":
            exact_fp32()
        if launch.rank == 0 and (line := describe_gpus(workers)):
            log(line)  # before the workers connect, which can fail
        same = identity(experiment)
        if states is not None:
            states.hold(start.token)
        else:
            token = "" if launch.alone else wait_for_token(config.run_dir, start.token)
            guard_run_dir(config.run_dir, start.token)
            same |= {} if experiment.real else {
                "the folder of the run (--data_dir must be on a file system that all machines "
                "share)": token}
        runtime = build_runtime(launch, device, control, same)
        if start.finished:
            return (f"finished already: {config.run_dir} (a larger --rounds or --n_epochs trains "
                    "it further, --overwrite starts over)")
        checkpoint = take_up(control, experiment, start, states)
        # What is fully trained draws no more noise, and needs no folder for it.
        protection = None if start.fully_trained else arrange(experiment, runtime, checkpoint)
        if launch.rank == 0:
            move_obstacles(config.run_dir)
            members = control.membership
            prepare_run_dir(config, checkpoint, members.run if members else "")
            write_json(config.run_dir / ENVIRONMENT, environment(experiment, launch, workers))
            copy_files(data.tokenizer_path, config.run_dir / "tokenizer")
            if isinstance(config, FederatedConfig) and config.sites:
                write_privacy(config, experiment.real, launch.local_world_size > 1)
            if checkpoint is not None:
                warn_of_missing_records(config, checkpoint)
                if start.fully_trained:
                    finish_from_checkpoint(config, checkpoint, experiment.new_model("cpu"))
        control.share()  # all ranks: nobody writes into the folder before it is ready
        if start.fully_trained:
            return f"done: {config.run_dir}"
        folder = None if experiment.at_site else config.run_dir
        stopping = StopRequest(folder, folder and folder / LOCK, control.lost_peers, launch)
        with stopping.listening():
            remarks = launch_warnings(config, launch, workers, experiment.real) + remarks
            for warning in remarks if launch.rank == 0 else []:
                log(warning, WARNING)
            compile_in_turn(experiment, runtime, workers)
            if isinstance(config, FederatedConfig):
                stopped = protocol.train_federated(experiment, runtime, stopping, checkpoint,
                                                   on_round, states, protection)
            else:
                stopped = central.train_central(experiment, device, stopping, checkpoint, on_round)
        if states is not None:
            states.release()
            ended = f"stopped by {stopped}" if stopped else "done"
            return f"{ended}: what the run leaves is in the server's folder"
        return (f"stopped by {stopped}: {config.run_dir} ({_next(config, stopped)})" if stopped else
                f"done: {config.run_dir}")


def describe_gpus(workers: Mapping[int, Hardware]) -> str:
    """One line on the workers' GPUs and what runs on them; empty if they compute on CPUs."""
    found = [worker for worker in workers.values() if worker.gpu]
    if not found:
        return ""
    libraries = ", ".join(f"{name} {version}" for name, version in found[0].versions.items())
    return (f"GPUs: {len(found)} x {together(worker.gpu for worker in found)}; kernels "
            f"{found[0].kernels}; {libraries}")


def compile_in_turn(experiment: Experiment, runtime: Runtime, workers: Mapping[int, Hardware]
                    ) -> None:
    """All ranks, if workers are GPUs: the first worker of each machine compiles the kernels of a
    local step; then the others do, and find them in the machine's cache.

    From here to the end of the first round a rank may be silent for longer than after it.
    """
    if not any(worker.gpu for worker in workers.values()):
        return
    config, control, me = experiment.config, runtime.control, runtime.rank
    control.compiling(True)  # until the first round is done: see protocol.py
    if me == 0 and any(not worker.kernels.endswith("own") for worker in workers.values()):
        log("compiling kernels: minutes, unless an earlier run has left them in the cache")
    first = {worker.host: rank for rank, worker in reversed(list(workers.items()))}
    for turn in (True, False):
        if me in workers and turn == (me in first.values()):
            compile_kernels(config, experiment.data.vocab_size, runtime.device, config.batch_size,
                            config.sequence_length)
        control.gather(None)
        control.share()  # all ranks: wait until these have compiled


def _next(config: RunConfig, stopped: str) -> str:
    """What the same command will do after this run was stopped, by whom."""
    if stopped.startswith("--max_epsilon"):
        return "its next round would pass that"
    step = latest_step(config.run_dir)
    without = " without --overwrite" * config.overwrite
    return (f"the same command{without} resumes from step {step}" if step else
            "the same command starts over: no checkpoint was written")


def _dedicated(config: RunConfig) -> bool:
    return isinstance(config, FederatedConfig) and config.server == "dedicated"


def wait_for_token(run_dir: Path, token: str) -> str:
    """The token in the lock of the run's folder, as this machine sees it: a network file system may
    show it with a delay."""
    deadline = time.monotonic() + SECONDS_TO_SEE_A_FILE
    while (seen := lock_token(run_dir)) != token and time.monotonic() < deadline:
        time.sleep(0.2)
    return seen


def warnings(given: RunConfig, experiment: Experiment) -> list[str]:
    """Settings that have no effect, or probably not the intended one. `given`: before --init_from
    changed the config."""
    config = experiment.config
    found = list(idle(given).values())
    if (config.init_from and ids_size(given.tokenizer) is None
            and given.tokenizer not in (config.tokenizer, RunConfig.tokenizer)):
        found.append(f"--tokenizer {given.tokenizer} has no effect with --init_from "
                     f"{config.init_from}, which brings its own")
    if len(experiment.data.validation) == 1:
        found.append(f"validation is 1 sequence of {config.sequence_length} tokens, too few for "
                     "its perplexity to say much: more text, a larger --val_fraction or a smaller "
                     "--sequence_length gives more")
    if getattr(config, "secure_sum", False) and experiment.site and not experiment.site.folder:
        found.append("--secure_sum hides nothing here: this is a simulation, whose owner has the "
                     "text of all sites")
    return found + (config.warnings() if isinstance(config, FederatedConfig) else [])


def launch_warnings(config: RunConfig, launch: Launch, found_hardware: Mapping[int, Hardware],
                    real_sites: bool = False) -> list[str]:
    """The same for how the run was launched, and where."""
    found = []
    if real_sites and launch.local_world_size > 1:
        found.append("processes of sites run on the server's machine: this is a demonstration, "
                     "whose text and updates the owner of the machine can read")
    if isinstance(config, FederatedConfig):
        workers = max(1, launch.world_size - int(_dedicated(config)))
        if workers > config.num_clients:
            found.append(f"{workers} workers for {config.num_clients} clients: "
                         f"{workers - config.num_clients} will only help to evaluate")
        if config.offload != "none" and not any(one.gpu for one in found_hardware.values()):
            found.append(f"--offload {config.offload} has no effect on CPUs")
        if launch.alone and config.server != FederatedConfig.server:
            found.append(f"--server {config.server} has no effect in one process")
    if config.device != "cpu" and torch.cuda.is_available() and import_warning():
        found.append(import_warning())
    return found

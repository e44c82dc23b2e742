"""One run on this rank, from preparation to its end, successful or not."""

from __future__ import annotations

import dataclasses
import os
import shlex
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedrun import central, protocol
from fedrun.common.errors import Diverged, InputError, explain
from fedrun.common.files import copy_files, write_json
from fedrun.common.limits import TooLittle, shortage
from fedrun.common.log import ERROR, WARNING, log, print_log
from fedrun.common.terminal import visible
from fedrun.config import FederatedConfig, RunConfig
from fedrun.data.given import GivenData
from fedrun.data.tokenizer import ids_size
from fedrun.distributed.connect import NotConnected, exposure
from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.launch import Launch, detect
from fedrun.distributed.runtime import Runtime, build_runtime, choose_device, connect
from fedrun.distributed.stopping import StopRequest
from fedrun.experiment import (
    CorpusCheck,
    Experiment,
    environment,
    hardware_of_workers,
    identity,
    prepare_experiment,
    require_alike,
    resolve_dtype,
)
from fedrun.model.compilation import compile_kernels, use_local_cache
from fedrun.model.hardware import Hardware, hardware, together
from fedrun.model.kernels import ignores_determinism, import_warning
from fedrun.model.precision import exact_fp32
from fedrun.records.checkpoint import latest_step
from fedrun.records.outcome import read_outcome, write_failure
from fedrun.records.recorder import OnRound
from fedrun.records.restore import finish_from_checkpoint, move_obstacles, warn_of_missing_records
from fedrun.records.run_dir import ENVIRONMENT
from fedrun.records.run_files import LOCK
from fedrun.records.run_lock import guard_run_dir, lock_token, release_run_dir
from fedrun.records.trackers import check_tracker
from fedrun.start import RunRefused, StartDecision, decide_start, prepare_run_dir
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


def run(config: RunConfig) -> int:
    """The command: prepare, connect, train. Returns the exit code: 0 if done or stopped, 1 if the
    run failed and the reason was printed.

    Raises InputError for what the user has to change, before any process group exists.
    """
    launch = detect(os.environ)
    print_log(quiet=launch.local_rank > 0)
    prepared = prepare(config, launch)
    try:
        train(prepared)
    except (RunRefused, NotConnected, TooLittle):
        raise
    except Exception as error:
        report(error, launch)
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


def report(error: Exception, launch: Launch) -> None:
    """On each rank: print the error that ended a run, unless the server has."""
    if isinstance(error, protocol.RunEnded):
        return
    if isinstance(error, Diverged):
        log(str(error), ERROR)
    elif line := shortage(error) or explain(error):
        log(line if launch.alone else f"rank {launch.rank}: {line}", ERROR)
    else:
        log(f"rank {launch.rank} ends with the error above", ERROR,
            "".join(traceback.format_exception(error)))


def prepare(config: RunConfig, launch: Launch, data: GivenData | None = None) -> Prepared:
    """Set this process up, read text and weights, and start to verify them. InputError for what the
    user has to change.

    data: in place of --dataset's.
    """
    if not isinstance(config, FederatedConfig) and not launch.alone:
        raise InputError(f"central runs in one process, but {launch.world_size} were started: "
                         f"use `python -m fedrun central`")
    if warning := exposure(launch):
        log(warning, WARNING)
    torch.set_num_threads(config.threads)
    check_tracker(config)
    device = choose_device(config.device, launch, _dedicated(config))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL uses the current device
        use_local_cache(config.deterministic)
    if config.deterministic:
        make_deterministic(config.device != "cpu" and config.dtype != "fp64"
                           and torch.cuda.is_available())
    experiment = prepare_experiment(config, device, data)
    check = CorpusCheck(experiment, launch)
    _ = experiment.length  # refused before connecting if there is nothing to do
    return Prepared(config, experiment, check, launch, device)


def train(prepared: Prepared, on_round: OnRound | None = None) -> None:
    """All ranks: connect and train. An error is recorded in the run's folder and raised.

    on_round: called by the server after each round, or step of a central run.
    """
    launch, run_dir = prepared.launch, prepared.experiment.config.run_dir
    try:
        ended = _connect_and_train(prepared, on_round)
    except (RunRefused, NotConnected, TooLittle, protocol.RunEnded):
        raise
    except Exception as error:
        if launch.rank == 0:
            line = shortage(error) or explain(error) or str(error).partition("\n")[0]
            write_failure(run_dir, line, "diverged" if isinstance(error, Diverged) else "error")
        raise
    finally:
        release_run_dir(run_dir)
    if launch.rank == 0:
        log(ended)


def _connect_and_train(prepared: Prepared, on_round: OnRound | None) -> str:
    """All ranks: the run itself, started as rank 0 decides. Returns the line to end with."""
    experiment, launch, device = prepared.experiment, prepared.launch, prepared.device
    config, here = experiment.config, hardware(device)
    remarks = warnings(prepared.given, experiment)
    with connect(launch, _dedicated(config), config.timeout) as control:
        data = prepared.check.agree(control)
        workers = hardware_of_workers(control, here)
        experiment = experiment.on(workers.values())
        start = _agree(control, experiment, workers)
        experiment = experiment.decided(start.dtype, data)
        config = experiment.config
        if config.dtype == "fp32":
            exact_fp32()
        if launch.rank == 0 and (line := describe_gpus(workers)):
            log(line)  # before the workers connect, which can fail
        token = "" if launch.alone else wait_for_token(config.run_dir, start.token)
        guard_run_dir(config.run_dir, start.token)
        runtime = build_runtime(launch, device, control, identity(experiment) | {
            "the folder of the run (--data_dir must be on a file system that all machines share)":
            token})
        if start.finished:
            return (f"finished already: {config.run_dir} (a larger --rounds or --n_epochs trains "
                    "it further, --overwrite starts over)")
        checkpoint = start.open()
        if launch.rank == 0:
            move_obstacles(config.run_dir)
            prepare_run_dir(config, checkpoint)
            write_json(config.run_dir / ENVIRONMENT, environment(experiment, launch, workers))
            copy_files(data.tokenizer_path, config.run_dir / "tokenizer")
            if checkpoint is not None:
                warn_of_missing_records(config, checkpoint)
                if start.fully_trained:
                    finish_from_checkpoint(config, checkpoint, experiment.new_model("cpu"))
        control.share()  # all ranks: nobody writes into the folder before it is ready
        if start.fully_trained:
            return f"done: {config.run_dir}"
        stopping = StopRequest(config.run_dir, config.run_dir / LOCK, control.lost_peers, launch)
        with stopping.listening():
            for warning in launch_warnings(config, launch) + remarks if launch.rank == 0 else []:
                log(warning, WARNING)
            compile_in_turn(experiment, runtime, workers)
            if isinstance(config, FederatedConfig):
                stopped = protocol.train_federated(experiment, runtime, stopping, checkpoint,
                                                   on_round)
            else:
                stopped = central.train_central(experiment, device, stopping, checkpoint, on_round)
        return f"stopped by {stopped}: {config.run_dir} ({_next(config)})" if stopped else (
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


def _next(config: RunConfig) -> str:
    """What the same command will do after this run was stopped."""
    step = latest_step(config.run_dir)
    return (f"the same command resumes from step {step}" if step else
            "the same command starts over: no checkpoint was written")


def _agree(control: ControlPlane, experiment: Experiment, workers: Mapping[int, Hardware]
           ) -> StartDecision:
    """All ranks: how rank 0 decides to start. RunRefused on all of them if it refuses."""
    config, message = experiment.config, dict[str, Any]()
    if control.rank == 0:
        try:
            require_alike(workers, config.deterministic)
            message = dataclasses.asdict(decide_start(
                config, experiment.length, lambda c: resolve_dtype(c, workers.values()),
                experiment.provenance))
        except RunRefused as error:
            message = {"refused": str(error)}
    message = control.share(message)
    if "refused" in message:
        raise RunRefused(message["refused"])
    return StartDecision(**message)


def _dedicated(config: RunConfig) -> bool:
    return isinstance(config, FederatedConfig) and config.server == "dedicated"


def make_deterministic(official_kernels: bool) -> None:
    """Deterministic kernels of torch, cuBLAS, mamba-ssm and causal-conv1d; call before the first of
    them is imported.

    official_kernels: whether workers take the last two where they are installed: on GPUs, but in
    fp64. InputError if they have no deterministic mode.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ |= {"MAMBA_DETERMINISTIC": "1", "CAUSAL_CONV1D_DETERMINISTIC": "1"}
    # Under these mamba-ssm chooses the kernels' blocks by a timing, or otherwise than other ranks.
    for name in [*os.environ]:
        if name == "TRITON_CACHE_AUTOTUNING" or name.startswith("TRITON_AUTOTUNE_BLOCK_SIZE_"):
            del os.environ[name]
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before it is written; filling it first would cost a pass over it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if official_kernels and (package := ignores_determinism()):
        raise InputError("--deterministic: the results would differ from run to run with the "
                         f"installed {package} (pip install --upgrade); without the package, "
                         "torch does its part")


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
    return found + (config.warnings() if isinstance(config, FederatedConfig) else [])


def launch_warnings(config: RunConfig, launch: Launch) -> list[str]:
    """The same for how the run was launched, and where."""
    found = []
    if isinstance(config, FederatedConfig):
        workers = max(1, launch.world_size - int(_dedicated(config)))
        if workers > config.num_clients:
            found.append(f"{workers} workers for {config.num_clients} clients: "
                         f"{workers - config.num_clients} will only help to evaluate")
        if launch.alone and config.server != FederatedConfig.server:
            found.append(f"--server {config.server} has no effect in one process")
    if config.device != "cpu" and torch.cuda.is_available() and import_warning():
        found.append(import_warning())
    return found

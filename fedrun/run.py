"""One run from its beginning to its end, orderly or not, on this rank."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from fedrun import central, protocol
from fedrun.common.errors import Diverged, InputError, explain
from fedrun.common.files import copy_files, write_json
from fedrun.common.limits import TooLittle, shortage
from fedrun.common.terminal import visible
from fedrun.config import CentralConfig, FederatedConfig, RunConfig
from fedrun.data.tokens import prepare
from fedrun.distributed.connect import NotConnected, exposure
from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.launch import Launch, detect
from fedrun.distributed.runtime import build_runtime, choose_device, connect
from fedrun.distributed.stopping import StopRequest
from fedrun.experiment import (
    CorpusCheck,
    environment,
    fit_vocabulary,
    identity,
    resolve_dtype,
    start_from,
    versions,
    workers_device,
)
from fedrun.federation.plan import Schedule, Shards
from fedrun.model.kernels import kernel_path, on_gpu
from fedrun.model.memory import TO_LOAD, TO_TRAIN, require_memory
from fedrun.model.pretrained import find_pretrained
from fedrun.records.checkpoint import latest_step
from fedrun.records.outcome import write_failure
from fedrun.records.provenance import Length, corpus_digests
from fedrun.records.restore import finish_from_checkpoint, move_obstacles, warn_of_missing_records
from fedrun.records.run_dir import ENVIRONMENT
from fedrun.records.run_files import LOCK
from fedrun.records.run_lock import guard_run_dir, lock_token, release_run_dir
from fedrun.records.trackers import check_tracker
from fedrun.start import RunRefused, StartDecision, decide_start, prepare_run_dir
from fedrun.unused import idle

SECONDS_TO_SEE_A_FILE = 30.0  # over a network file system


def run(config: RunConfig) -> int:
    """Prepare, connect, train. The exit code: 0 done or stopped, 1 failed with a message on stderr.

    Raises ValueError for what the user has to change, before any process group exists.
    """
    launch = detect(os.environ)
    federated = isinstance(config, FederatedConfig)
    if not federated and not launch.alone:
        raise InputError(f"central runs in one process, but {launch.world_size} were started: "
                         f"use `python -m fedrun central`")
    if warning := exposure(launch):
        _say(f"warning: {warning}")
    torch.set_num_threads(config.threads)
    check_tracker(config)
    device = choose_device(config.device, launch, _dedicated(config))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL takes the current one
    if config.deterministic:
        make_deterministic()
    notes = list(idle(config).values())
    if config.init_from:
        given, config = config, start_from(config)
        if given.tokenizer not in (config.tokenizer, RunConfig.tokenizer):
            notes.append(f"--tokenizer {given.tokenizer} has no effect with --init_from "
                         f"{config.init_from}, which brings its own")
    data = prepare(config.dataset, config.tokenizer, config.sequence_length,
                   config.cache_dir.expanduser(), say=_say_from(launch),
                   check=config.partition == "dirichlet",  # whose topics are made of the tokens
                   reading=config.reading)
    if config.init_from:
        data = fit_vocabulary(config, data)
    require_memory(config.model, config.model.rows(data.vocab_size),
                   TO_TRAIN if device.type == "cpu" else TO_LOAD,
                   f"--init_from {config.init_from}" if config.init_from else
                   f"--config {config.config}")
    check = CorpusCheck(config, launch, data)
    partition = ""
    if isinstance(config, FederatedConfig):  # what only the data can refuse, before connecting
        shards = Shards(config, data)
        length = Length(config, Schedule(config, shards.sizes).rounds_per_epoch)
        partition = shards.digest()
    else:
        assert isinstance(config, CentralConfig)
        length = central.length(config, sum(map(len, central.owned_shards(config, data))))
    provenance = {**corpus_digests(data.fingerprint), "partition": partition,
                 "versions": versions(), "kernels": kernel_path(workers_device(config, device)),
                 "init_from": config.init_from
                 and find_pretrained(config.init_from, "--init_from").digest()}
    try:
        ended = _connect_and_train(config, length, check, launch, device, provenance, notes)
    except (RunRefused, NotConnected, TooLittle):
        raise
    except protocol.RunEnded:
        return 1
    except Diverged as error:
        write_failure(config.run_dir, str(error), "diverged")
        print(f"fedrun: {error}", file=sys.stderr, flush=True)
        return 1
    except Exception as error:
        line = shortage(error) or explain(error)
        if launch.rank == 0:
            write_failure(config.run_dir, line or str(error).partition("\n")[0])
        who = "" if launch.alone else f"rank {launch.rank}: "
        print(f"fedrun: error: {who}{line}" if line else
              f"{traceback.format_exc()}fedrun: rank {launch.rank} ends with the error above",
              file=sys.stderr, flush=True)
        return 1
    finally:
        release_run_dir(config.run_dir)
    if launch.rank == 0:
        print(visible(ended), flush=True)
    return 0


def _connect_and_train(config: RunConfig, length: Length, check: CorpusCheck, launch: Launch,
                       device: torch.device, provenance: dict[str, Any], notes: list[str]) -> str:
    """All ranks: the run itself, as rank 0 says that it begins. The line to end with.

    notes: what to warn of, when it begins."""
    with connect(launch, _dedicated(config), config.timeout) as control:
        data = check.agree(control)
        beginning = _agree(control, config, length, device, provenance)
        config = dataclasses.replace(config, dtype=beginning.dtype)
        seen = "" if launch.alone else wait_for_token(config.run_dir, beginning.token)
        guard_run_dir(config.run_dir, beginning.token)
        runtime = build_runtime(launch, device, control, identity(config, data, device, provenance) | {
            "the clients' shards": provenance["partition"],
            "the folder of the run (--data_dir has to be one that all machines share)": seen})
        if beginning.finished:
            return (f"finished already: {config.run_dir} (a larger --rounds or --n_epochs "
                    "trains it further, --overwrite starts over)")
        found = beginning.open()
        if launch.rank == 0:
            move_obstacles(config.run_dir)
            prepare_run_dir(config, found)
            write_json(config.run_dir / ENVIRONMENT,
                       environment(launch, device, data) | {"made_with": provenance})
            copy_files(data.tokenizer_path, config.run_dir / "tokenizer")
            if found:
                warn_of_missing_records(config, found)
            if found and beginning.fully_trained:
                finish_from_checkpoint(config, data, found)
        control.share()  # all ranks: nobody writes into the folder before it is ready
        if beginning.fully_trained:
            return f"done: {config.run_dir}"
        stopping = StopRequest(config.run_dir, config.run_dir / LOCK, control.lost_peers,
                               quiet=launch.rank > 0)
        with stopping.listening():
            _warn(config, launch, notes)
            if isinstance(config, FederatedConfig):
                stopped = protocol.train_federated(config, data, runtime, stopping, provenance, found)
            else:
                assert isinstance(config, CentralConfig)
                stopped = central.train_central(config, data, device, stopping, provenance, found)
        if not stopped:
            return f"done: {config.run_dir}"
        kept = latest_step(config.run_dir)
        then = (f"resumes from step {kept}" if kept
                else "starts over: no checkpoint was written")
        return f"stopped by {stopped}: {config.run_dir} (the same command {then})"


def _agree(control: ControlPlane, config: RunConfig, length: Length, device: torch.device,
           provenance: dict[str, Any]) -> StartDecision:
    """All ranks: the beginning that rank 0 decides on, or its refusal."""
    message: dict[str, Any] = {}
    if control.rank == 0:
        try:
            message = dataclasses.asdict(decide_start(
                config, length, lambda c: resolve_dtype(c, device), provenance))
        except RunRefused as error:
            message = {"refused": str(error)}
    message = control.share(message)
    if "refused" in message:
        raise RunRefused(message["refused"])
    return StartDecision(**message)


def _dedicated(config: RunConfig) -> bool:
    return isinstance(config, FederatedConfig) and config.server == "dedicated"


def make_deterministic() -> None:
    """Deterministic kernels of torch, cuBLAS and mamba-ssm; before the first of them runs."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["MAMBA_DETERMINISTIC"] = "1"
    torch.use_deterministic_algorithms(True)


def wait_for_token(run_dir: Path, token: str) -> str:
    """What the lock of the run's folder says here: the token, once a network file system shows it.
    """
    deadline = time.monotonic() + SECONDS_TO_SEE_A_FILE
    while (seen := lock_token(run_dir)) != token and time.monotonic() < deadline:
        time.sleep(0.2)
    return seen


def _warn(config: RunConfig, launch: Launch, found: list[str]) -> None:
    if isinstance(config, FederatedConfig):
        found = found + config.warnings()
        workers = max(1, launch.world_size - int(_dedicated(config)))
        if workers > config.num_clients:
            found.append(f"{workers} workers for {config.num_clients} clients: "
                         f"{workers - config.num_clients} will only help to evaluate")
        if launch.alone and config.server != FederatedConfig.server:
            found.append(f"--server {config.server} has no effect in one process")
    if config.device != "cpu" and torch.cuda.is_available() and on_gpu() == "own":
        found.append("mamba-ssm is not installed: GPUs scan sequences by torch alone, which is "
                     "slower (see the README on GPUs)")
    for warning in found if launch.rank == 0 else []:
        print(visible(f"fedrun: warning: {warning}"), flush=True)


def _say(line: str) -> None:
    print(visible(f"fedrun: {line}"), flush=True)


def _say_from(launch: Launch):  # type: ignore[no-untyped-def]
    def say(line: str) -> None:
        if launch.local_rank == 0:
            print(line, file=sys.stderr, flush=True)
    return say

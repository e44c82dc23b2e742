"""One run from its beginning to its end, orderly or not, on this rank."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fedrun import central, protocol
from fedrun.checkpoint import newest
from fedrun.comm import Control, LostRanks
from fedrun.config import CentralConfig, Dtype, FederatedConfig, RunConfig
from fedrun.connect import NotConnected, exposure
from fedrun.data.tokens import TokenData, prepare
from fedrun.errors import Diverged, one_line
from fedrun.files import write_json
from fedrun.launch import Launch, detect
from fedrun.limits import TooLittle, shortage
from fedrun.model.kernels import kernel_path, on_gpu
from fedrun.model.precision import bf16_in_hardware
from fedrun.plan import Schedule, Shards
from fedrun.pretrained import find_pretrained, fit_vocabulary, start_from
from fedrun.rundir import lock_token, write_failure
from fedrun.runtime import choose_device, connected, join
from fedrun.start import Beginning, Refused, begin, make_ready
from fedrun.stopping import StopRequest
from fedrun.track import check_tracker

SECONDS_TO_SEE_A_FILE = 30.0  # over a network file system


def run(config: RunConfig) -> int:
    """Prepare, connect, train. The exit code: 0 done or stopped, 1 failed with a message on stderr.

    Raises ValueError for what the user has to change, before any process group exists.
    """
    launch = detect(os.environ)
    federated = isinstance(config, FederatedConfig)
    if not federated and not launch.alone:
        raise ValueError(f"central runs in one process, but {launch.world_size} were started: "
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
    if config.init_from:
        config = start_from(config)
    data = prepare(config.dataset, config.tokenizer, config.sequence_length,
                   config.cache_dir.expanduser(), say=_say_from(launch))
    if config.init_from:
        data = fit_vocabulary(config, data)
    partition = ""
    if isinstance(config, FederatedConfig):  # what only the data can refuse, before connecting
        shards = Shards(config, data)
        Schedule(config, shards.sizes)
        partition = shards.digest()
    made_with = {"corpus": digest(data), "partition": partition, "versions": versions(),
                 "kernels": kernel_path(workers_device(config, device))}
    try:
        ended = _connect_and_train(config, data, launch, device, made_with)
    except (Refused, NotConnected, TooLittle):
        raise
    except protocol.RunEnded:
        return 1
    except Exception as error:
        if launch.rank == 0:
            write_failure(config.run_dir, str(error).partition("\n")[0],
                          "diverged" if isinstance(error, Diverged) else "error")
        told = isinstance(error, LostRanks | Diverged)
        if why := one_line(error) if told else shortage(error):
            print(f"fedrun: error: rank {launch.rank}: {why}", file=sys.stderr, flush=True)
        else:
            print(f"{traceback.format_exc()}fedrun: rank {launch.rank} ends with the error above",
                  file=sys.stderr, flush=True)
        return 1
    if launch.rank == 0:
        print(ended, flush=True)
    return 0


def _connect_and_train(config: RunConfig, data: TokenData, launch: Launch, device: torch.device,
                       made_with: dict[str, Any]) -> str:
    """All ranks: the run itself, as rank 0 says that it begins. The line to end with."""
    with connected(launch, _dedicated(config), config.timeout) as control:
        beginning = _agree(control, config, device, made_with)
        config = dataclasses.replace(config, dtype=beginning.dtype)
        seen = "" if launch.alone else wait_for_token(config.run_dir, beginning.token)
        runtime = join(launch, device, control, identity(config, data, device) | {
            "the clients' shards": made_with["partition"],
            "the folder of the run (--data_dir has to be one that all machines share)": seen})
        if beginning.finished:
            return f"finished already: {config.run_dir} (--overwrite begins anew)"
        found = beginning.open()
        if launch.rank == 0:
            make_ready(config, found)
            write_json(config.run_dir / "environment.json", environment(launch, device, data))
            shutil.copytree(data.tokenizer_path, config.run_dir / "tokenizer", dirs_exist_ok=True)
        control.share()  # all ranks: nobody writes into the folder before it is ready
        stopping = StopRequest(config.run_dir, control.lost_peers, quiet=launch.rank > 0)
        with stopping.listening():
            if isinstance(config, FederatedConfig):
                _warn(config, launch)
                stopped = protocol.run(config, data, runtime, stopping, made_with, found)
            else:
                assert isinstance(config, CentralConfig)
                stopped = central.run(config, data, device, stopping, made_with, found)
        if not stopped:
            return f"done: {config.run_dir}"
        kept = newest(config.run_dir)
        then = f"goes on after step {kept}" if kept else "begins anew: no checkpoint was written"
        return f"stopped by {stopped}: {config.run_dir} (the same command {then})"


def _agree(control: Control, config: RunConfig, device: torch.device, made_with: dict[str, Any]
           ) -> Beginning:
    """All ranks: the beginning that rank 0 decides on, or its refusal."""
    message: dict[str, Any] = {}
    if control.rank == 0:
        try:
            message = dataclasses.asdict(begin(config, lambda c: resolve_dtype(c, device),
                                               made_with, _say))
        except Refused as error:
            message = {"refused": str(error)}
    message = control.share(message)
    if "refused" in message:
        raise Refused(message["refused"])
    return Beginning(**message)


def _dedicated(config: RunConfig) -> bool:
    return isinstance(config, FederatedConfig) and config.server == "dedicated"


def workers_device(config: RunConfig, device: torch.device) -> torch.device:
    """A device like the workers': a dedicated server computes on the CPU but answers for the GPUs
    beside it. Ranks that come to different answers do not train together (see `identity`)."""
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda", 0) if on_gpu else device


def resolve_dtype(config: RunConfig, device: torch.device) -> Dtype:
    """What --dtype amounts to here: by what the hardware can do, never by a timing.

    ValueError for bf16 without hardware.
    """
    has_bf16 = bf16_in_hardware(workers_device(config, device))
    if config.dtype == "bf16" and not has_bf16:
        raise ValueError(f"--dtype bf16: no hardware for it on {platform.node()}, where it would "
                         "be emulated, many times slower than fp32; accepted is auto, fp32 or fp64")
    if config.dtype == "auto":
        return "bf16" if has_bf16 else "fp32"
    return config.dtype


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


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("torch", "numpy", "transformers", "datasets",
                                         "tokenizers")}


def environment(launch: Launch, device: torch.device, data: TokenData) -> dict[str, object]:
    """What a reader of the run folder needs to know of the machine and the data."""
    return {"versions": versions(), "processes": launch.world_size, "device": str(device),
            "device_name": torch.cuda.get_device_name(device) if device.type == "cuda"
            else platform.processor() or platform.machine(), "host": platform.node(),
            "kernels": kernel_path(device), "corpus": data.fingerprint}


def identity(config: RunConfig, data: TokenData, device: torch.device) -> dict[str, str]:
    """What must be equal on all ranks for their sums to mean anything."""
    start = {} if config.init_from is None else {
        "the weights of --init_from": find_pretrained(config.init_from, "--init_from").digest()}
    able = config.dtype != "bf16" or bf16_in_hardware(device)
    return ({f"--{k}": json.dumps(v) for k, v in config.results_dict().items()}
            | {f"version of {k}": v for k, v in versions().items()}
            | {"the tokenised corpus": digest(data), "worker kernels": kernel_path(device),
               "worker hardware for --dtype": config.dtype if able else "none"} | start)


def digest(data: TokenData) -> str:
    """A short name of the tokenised corpus."""
    told = json.dumps(data.fingerprint, sort_keys=True).encode()
    return hashlib.sha256(told).hexdigest()[:16]


def _warn(config: FederatedConfig, launch: Launch) -> None:
    workers = max(1, launch.world_size - int(_dedicated(config)))
    found = config.warnings()
    if workers > config.num_clients:
        found.append(f"{workers} workers for {config.num_clients} clients: "
                     f"{workers - config.num_clients} will only help to evaluate")
    if config.device != "cpu" and torch.cuda.is_available() and on_gpu() == "own":
        found.append("mamba-ssm is not installed: GPUs scan sequences by torch alone, which is "
                     "slower (see the README on GPUs)")
    for warning in found if launch.rank == 0 else []:
        print(f"fedrun: warning: {warning}", flush=True)


def _say(line: str) -> None:
    print(f"fedrun: {line}", flush=True)


def _say_from(launch: Launch):  # type: ignore[no-untyped-def]
    def say(line: str) -> None:
        if launch.local_rank == 0:
            print(line, file=sys.stderr, flush=True)
    return say

"""One run from its beginning to its end, orderly or not, on this rank."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import sys
import traceback
from importlib.metadata import version

import torch

from fedrun import central, protocol
from fedrun.config import CentralConfig, Dtype, FederatedConfig, RunConfig
from fedrun.data.tokens import TokenData, prepare
from fedrun.model.kernels import kernel_path, on_gpu
from fedrun.model.precision import bf16_in_hardware
from fedrun.plan import Schedule, Shards
from fedrun.pretrained import find_pretrained, fit_vocabulary, start_from
from fedrun.rundir import open_run_dir, write_json
from fedrun.runtime import Launch, choose_device, connected, detect
from fedrun.track import check_tracker


def run(config: RunConfig) -> int:
    """Prepare, connect, train. The exit code: 0 done, 1 failed with a message on stderr.

    Raises ValueError for what the user has to change, before any process group exists.
    """
    launch = detect(os.environ)
    federated = isinstance(config, FederatedConfig)
    if not federated and not launch.alone:
        raise ValueError(f"central runs in one process, but {launch.world_size} were started: "
                         f"use `python -m fedrun central`")
    dedicated = isinstance(config, FederatedConfig) and config.server == "dedicated"
    torch.set_num_threads(config.threads)
    check_tracker(config)
    device = choose_device(config.device, launch, dedicated)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL takes the current one
    config = dataclasses.replace(config, dtype=resolve_dtype(config, device))
    if config.init_from:
        config = start_from(config)
    data = prepare(config.dataset, config.tokenizer, config.sequence_length,
                   config.cache_dir.expanduser(), say=_say_from(launch))
    if config.init_from:
        data = fit_vocabulary(config, data)
    if isinstance(config, FederatedConfig):  # what only the data can refuse, before connecting
        Schedule(config, Shards(config, len(data.train)).sizes)
    if launch.rank == 0:
        open_run_dir(config)
        write_json(config.run_dir / "environment.json", environment(launch, device, data))
        shutil.copytree(data.tokenizer_path, config.run_dir / "tokenizer", dirs_exist_ok=True)
    try:
        if isinstance(config, FederatedConfig):
            _warn(config, launch, dedicated)
            with connected(launch, device, dedicated, config.timeout,
                           identity(config, data, device)) as runtime:
                protocol.run(config, data, runtime)
        else:
            assert isinstance(config, CentralConfig)
            central.run(config, data, device)
    except protocol.RunEnded:
        return 1
    except Exception:
        print(f"{traceback.format_exc()}fedrun: rank {launch.rank} ends with the error above",
              file=sys.stderr, flush=True)
        return 1
    if launch.rank == 0:
        print(f"done: {config.run_dir}", flush=True)
    return 0


def resolve_dtype(config: RunConfig, device: torch.device) -> Dtype:
    """What --dtype amounts to here: by what the hardware can do, never by a timing.

    A dedicated server computes on the CPU but answers for the GPUs beside it. Ranks that come to
    different answers do not train together (see `identity`). ValueError for bf16 without hardware.
    """
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    has_bf16 = bf16_in_hardware(torch.device("cuda", 0) if on_gpu else device)
    if config.dtype == "bf16" and not has_bf16:
        raise ValueError(f"--dtype bf16: no hardware for it on {platform.node()}, where it would "
                         "be emulated, many times slower than fp32; accepted is auto, fp32 or fp64")
    if config.dtype == "auto":
        return "bf16" if has_bf16 else "fp32"
    return config.dtype


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
    corpus = hashlib.sha256(json.dumps(data.fingerprint, sort_keys=True).encode()).hexdigest()
    return ({f"--{k}": json.dumps(v) for k, v in config.results_dict().items()}
            | {f"version of {k}": v for k, v in versions().items()}
            | {"the tokenised corpus": corpus[:16], "worker kernels": kernel_path(device)} | start)


def _warn(config: FederatedConfig, launch: Launch, dedicated: bool) -> None:
    workers = max(1, launch.world_size - int(dedicated))
    found = config.warnings()
    if workers > config.num_clients:
        found.append(f"{workers} workers for {config.num_clients} clients: "
                     f"{workers - config.num_clients} will only help to evaluate")
    if config.device != "cpu" and torch.cuda.is_available() and on_gpu() == "own":
        found.append("mamba-ssm is not installed: GPUs scan sequences by torch alone, which is "
                     "slower (see the README on GPUs)")
    for warning in found if launch.rank == 0 else []:
        print(f"fedrun: warning: {warning}", flush=True)


def _say_from(launch: Launch):  # type: ignore[no-untyped-def]
    def say(line: str) -> None:
        if launch.local_rank == 0:
            print(line, file=sys.stderr, flush=True)
    return say

"""What a run is made of, and whether all ranks have the same: weights, text, type, versions."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from fedrun.common.errors import InputError
from fedrun.config import Dtype, RunConfig
from fedrun.data.tokens import TokenData, verify
from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.launch import Launch
from fedrun.model.kernels import kernel_path
from fedrun.model.precision import bf16_in_hardware
from fedrun.model.pretrained import find_pretrained
from fedrun.records.provenance import settings_equal_on_all_ranks
from fedrun.start import RunRefused

Config = TypeVar("Config", bound=RunConfig)


# ---- first weights -------------------------------------------------------------------------------

def start_from(config: Config) -> Config:
    """The config of a run under --init_from: the model's shape, its tokenizer where it has one, and
    its name as the config's in the run folder's name."""
    assert config.init_from is not None
    found = find_pretrained(config.init_from, "--init_from")
    if found.folder.resolve().is_relative_to(config.run_dir.resolve()):
        raise InputError(f"--init_from {config.init_from}: this run would replace it; choose "
                         "another --run_name or --data_dir")
    tokenizer = config.tokenizer if found.tokenizer is None else str(found.tokenizer)
    # The name of what is meant, since `.` and `..` have none.
    name = re.sub(r"[^\w-]", "_", Path(os.path.abspath(Path(config.init_from).expanduser())).name)
    return dataclasses.replace(config, config=name, model=found.model, tokenizer=tokenizer)


def fit_vocabulary(config: RunConfig, data: TokenData) -> TokenData:
    """`data` with the vocabulary of the --init_from model, which may have rows to spare."""
    assert config.init_from is not None
    found = find_pretrained(config.init_from, "--init_from")
    if data.vocab_size > found.vocab_size:
        raise InputError(f"--tokenizer {config.tokenizer}: its {data.vocab_size} tokens are more "
                         f"than the {found.vocab_size} of --init_from {config.init_from}; give the "
                         "tokenizer that the model was trained with")
    return dataclasses.replace(data, vocab_size=found.vocab_size)


# ---- text ----------------------------------------------------------------------------------------

class CorpusCheck:
    """One rank a machine compares the cached files of the corpus with their checksums, in a thread
    beside sharding and connecting; what is damaged is named and made again."""

    def __init__(self, config: RunConfig, launch: Launch, data: TokenData) -> None:
        self.config, self.data = config, data
        self._problem = ""
        self._thread: threading.Thread | None = None
        if launch.local_rank == 0:
            self._thread = threading.Thread(target=self._check, name="fedrun-corpus", daemon=True)
            self._thread.start()

    def _check(self) -> None:
        def say(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        config = self.config
        try:
            self._problem = "the corpus could not be checked (see above)"  # an error of our own
            verify(config.dataset, config.tokenizer, config.cache_dir, say,
                   config.reading)
            self.data.reopen()
            self._problem = ""
        except (ValueError, OSError) as error:  # ConnectionError and TimeoutError are among them
            self._problem = str(error)

    def agree(self, control: ControlPlane) -> TokenData:
        """All ranks: the corpus, mapped from files that were compared; RunRefused, on all of them,
        where it is damaged on some machine and cannot be made again."""
        if self._thread:
            self._thread.join()
        problems = control.gather(self._problem)
        told = control.share(problems and next(filter(None, problems), ""))
        if told:
            raise RunRefused(told)
        return self.data.reopen()


# ---- type and provenance -------------------------------------------------------------------------

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
        raise InputError(f"--dtype bf16: no hardware for it on {platform.node()}, where it would "
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


def identity(config: RunConfig, data: TokenData, device: torch.device,
             provenance: dict[str, Any]) -> dict[str, str]:
    """What must be equal on all ranks for their sums to mean anything."""
    able = config.dtype != "bf16" or bf16_in_hardware(device)
    return ({f"--{k}": json.dumps(v) for k, v in settings_equal_on_all_ranks(config).items()}
            | {f"version of {k}": v for k, v in provenance["versions"].items()}
            | {"the tokenised corpus": provenance["content"],
               "the tokens of the corpus": data.content,
               "the weights of --init_from": str(provenance["init_from"]),
               "worker kernels": kernel_path(device),
               "worker hardware for --dtype": config.dtype if able else "none"})

"""Compilation of the Triton kernels that GPUs run, which takes minutes the first time.

mamba-ssm's kernels have some 125 configurations on our path, of which the fastest is found by
trying them. All of them are compiled then, and again whenever Triton's cache lacks them.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import torch

from fedrun.common.log import WARNING, log
from fedrun.model.base import Model
from fedrun.model.build import DTYPES, ModelSettings, new_model, uninitialised_model
from fedrun.model.config import ModelConfig

CACHE = "TRITON_CACHE_DIR"


def use_local_cache(deterministic: bool) -> None:
    """Make Triton keep compiled kernels on a local disk, unless the user has chosen a folder. Call
    before Triton is imported.

    Its default is in the home directory, and many ranks that compile into a network file system at
    once fail there. Unless `deterministic`, Triton also keeps which configuration was the fastest.
    """
    if not os.environ.get(CACHE):
        folder = Path(tempfile.gettempdir()) / f"fedrun-triton-{os.getuid()}"
        if _is_ours_alone(folder):
            os.environ[CACHE] = str(folder)
        else:
            log(f"{CACHE}: {folder} is not a folder that only this user can write; Triton keeps "
                "compiled kernels in its default folder", WARNING)
    if not deterministic:
        os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")


def _is_ours_alone(folder: Path) -> bool:
    """Make a folder, unless it exists; whether no other user can put kernels there."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    return (stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
            and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def compile_kernels(settings: ModelSettings, vocab_size: int, device: torch.device, batch: int,
                    length: int) -> None:
    """Compile the kernels of a local step by computing a gradient of this shape, with a model of
    its own that is dropped. Changes the state of no random numbers."""
    model: Model = _zeros(settings, vocab_size, device) if isinstance(
        settings.model, ModelConfig) else new_model(settings, vocab_size, device)
    loss, _ = model.compute_grad(torch.zeros(batch, length, dtype=torch.long, device=device))
    loss.item()  # waits for the device


def _zeros(settings: ModelSettings, vocab_size: int, device: torch.device) -> Model:
    """A Mamba-2 model whose parameters are zero."""
    with torch.device("meta"):
        model = uninitialised_model(settings, vocab_size)
    model.to(DTYPES[settings.dtype]).to_empty(device=device)
    if model.config.tie_embeddings:  # `to_empty` makes two tensors of it
        model.lm_head.weight = model.backbone.embedding.weight
    for parameter in model.parameters():
        parameter.detach().zero_()
    return model

"""A run's folder: complete by itself, every file in it whole or absent.

    config.json            the resolved settings
    environment.json       versions, devices, fingerprint of the corpus
    training_history.json  a record for each evaluated step
    events.jsonl           a line for each step
    model.safetensors      the last good global model, in mamba-ssm's names
    server/params/step_000030.npz, server/deltas/...    (central: params/, deltas/)
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from torch import Tensor

from fedrun.config import RunConfig

# The parameters of a Mamba-2 block whose change is studied, as the model names them.
_STUDIED = {"in_proj.weight": "in_proj", "A_log": "A_log", "D": "D", "dt_bias": "dt_bias"}


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: whoever opens it, or a crash, never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_json(path: Path, value: Any) -> None:
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def open_run_dir(config: RunConfig) -> None:
    """Server: make the run's folder, empty but for config.json.

    A folder that holds the same settings is used again; ValueError, with the settings that differ,
    where it holds others and --overwrite was not given, or where it is no run's folder at all.
    """
    path = config.run_dir
    try:
        if path.exists():
            _refuse_other(config, path)
            shutil.rmtree(path)
        write_json(path / "config.json", config.to_dict())
    except OSError as error:
        raise ValueError(f"--data_dir {config.data_dir}: the folder {path} cannot be written: "
                         f"{error.strerror}") from None


def _refuse_other(config: RunConfig, path: Path) -> None:
    held: dict[str, Any] | None = None
    if (path / "config.json").is_file():
        with suppress(ValueError):
            held = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if held is None:
        if any(path.iterdir()):
            raise ValueError(f"--run_name {config.name}: {path} exists and is no run's folder; "
                             "choose another --run_name or --data_dir")
        return
    mine = config.results_dict()
    differing = [k for k in mine if held.get(k) != mine[k]]
    if differing and not config.overwrite:
        told = ", ".join(f"{k} {held.get(k)} there, {mine[k]} here" for k in differing)
        raise ValueError(f"--run_name {config.name}: {path} holds a run with other settings "
                         f"({told}); choose another --run_name, or --overwrite to replace it")


def save_model(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """The model as safetensors, names and shapes as `tensors` gives them."""
    write_whole(path, save({name: t.contiguous().cpu() for name, t in tensors}))


def studied(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, np.ndarray]:
    """in_proj, A_log, D and dt_bias of every layer as float32, keyed `layers.0.in_proj`."""
    found = {}
    for name, tensor in tensors:
        _, _, rest = name.partition("layers.")
        layer, _, parameter = rest.partition(".mixer.")
        if parameter in _STUDIED:
            array = tensor.detach().float().cpu().numpy()
            found[f"layers.{layer}.{_STUDIED[parameter]}"] = array.copy()
    return found


def save_studied(folder: Path, step: int, now: Mapping[str, np.ndarray],
                 start: Mapping[str, np.ndarray]) -> None:
    """`folder`/params/step_000030.npz and the change since the start, `folder`/deltas/..."""
    deltas = {f"delta_{name}": now[name] - start[name] for name in now}
    for kind, arrays in (("params", now), ("deltas", deltas)):
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_whole(folder / kind / f"step_{step:06d}.npz", buffer.getvalue())

"""A run's model on disk, and snapshots of the parameters whose change over the run is plotted."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from torch import Tensor

from fedrun.common.files import write_atomic
from fedrun.training.params import FlatParams


def save_model(path: Path, tensors: Iterable[tuple[str, Tensor]],
               metadata: dict[str, str] | None = None) -> None:
    """Write a model as safetensors, with the names and shapes of `tensors`."""
    write_atomic(path, save({name: t.contiguous().cpu() for name, t in tensors}, metadata))


def tracked_parameters(flat: FlatParams, vector: Tensor) -> dict[str, np.ndarray]:
    """Copies as float32 of the parameters whose snapshots a run saves, by their names there
    (`layers.0.in_proj`); {} if the model tracks none. vector: (size,) of the layout of `flat`."""
    tracked = flat.names.tracked
    return {tracked[name]: tensor.detach().float().cpu().numpy().copy()
            for name, tensor in flat.views(vector) if name in tracked}


def save_snapshot(folder: Path, step: int, now: Mapping[str, np.ndarray],
                  start: Mapping[str, np.ndarray]) -> None:
    """Write tracked parameters to `folder`/params/step_000030.npz, and their change since the start
    to `folder`/deltas/step_000030.npz; nothing if there are none."""
    if not now:
        return
    deltas = {f"delta_{name}": now[name] - start[name] for name in now}
    for kind, arrays in (("params", now), ("deltas", deltas)):
        _write(folder / kind, step, arrays)


def _write(folder: Path, step: int, arrays: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(folder / f"step_{step:06d}.npz", buffer.getvalue())


class SnapshotWriter:
    """Saves snapshots of one model at its evaluated steps, and before them its start, as
    params/step_000000.npz.

    While the disk is full they queue in memory. The next evaluation tries again, and so does the
    next checkpoint, which is not committed without them.
    """

    MAX_QUEUED = 3  # snapshots of a model's size each

    def __init__(self, folder: Path, start: Mapping[str, np.ndarray]) -> None:
        """start: the tracked parameters before the first step."""
        self._folder, self._start, self._start_written = folder, start, False
        self._queue: list[tuple[int, Mapping[str, np.ndarray]]] = []

    @property
    def full(self) -> bool:
        """Whether the queue has no place for another snapshot."""
        return len(self._queue) >= self.MAX_QUEUED

    def add(self, step: int, now: Mapping[str, np.ndarray]) -> None:
        """Queue the tracked parameters of a step for the next `write`; nothing if there are none.
        """
        if not now:
            return
        self._queue.append((step, now))

    def write(self) -> None:
        """Write the start if this process has not yet, and the queued snapshots, oldest first.
        Raises OSError if the disk does not take them; those not written stay queued."""
        if self._start and not self._start_written:
            _write(self._folder / "params", 0, self._start)
            self._start_written = True
        while self._queue:
            save_snapshot(self._folder, *self._queue[0], self._start)
            self._queue.pop(0)

"""The global state, which is the same on every worker: the global model, and all else that is kept
from one round to the next.

Between the server and real sites it travels vector by vector: for a checkpoint a site's worker
sends it, for a run that resumes the server hands it out. It is what all of them know: sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedrun.aggregation.base import Aggregator
from fedrun.common.errors import InputError
from fedrun.common.log import WARNING, log
from fedrun.common.pinned import PinnedMemory
from fedrun.config import FederatedConfig
from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.data_plane import DataPlane
from fedrun.records.checkpoint import DTYPES, GLOBAL, Checkpoint

State = Mapping[str, Tensor]
STEPS = "int8.steps", "int4.steps"
_TYPES = {name: dtype for dtype, name in DTYPES.items()}


class GlobalState:
    """A worker's replica, which it shares with the others of its node.

    With --offload global that of a GPU waits in the host's page-locked memory. Whoever computes
    with it brings it over slice by slice (`common.pinned.brought`), or all at once into memory that
    is there anyway; the server update writes its slices back. Not run on a GPU.
    """

    def __init__(self, config: FederatedConfig, vector: Tensor, plane: DataPlane,
                 aggregator: Aggregator, odd: Aggregator | None = None,
                 rows: Tensor | None = None) -> None:
        """Workers: as it is before the first round. vector: the model's, (size,), of which as much
        is shared as the aggregator sums; the rest (--personal) stays as it is. odd: with --overlap,
        what sums every other round. rows: with --client_moments average_rows, their means."""
        self._pinned = PinnedMemory() if (config.offload == "global"
                                          and vector.device.type == "cuda") else None
        self._plane = plane
        self.model = self._replica(vector)
        """The global model, (size,). In place of personal parameters it has what the run started
        from: no other values are everybody's, since clients' own never leave them."""
        self.shared = self.model[:aggregator.size]
        """What is averaged of it; this and all others but `carried` and `rows`: (shared_size,)."""
        shared = vector[:aggregator.size]
        self.server = {name: self._replica(torch.full_like(shared, value))
                       for name, value in config.strategy.state.items()}
        """The method's own, by name."""
        self.moments = {name: self._replica(torch.zeros_like(shared))
                        for name in config.averaged_moments} or None
        """The optimizer's moments as they were averaged last, if clients share them."""
        self.rows = {} if rows is None else {"moments.rows": rows}
        """The means of `row_averages`, (rows,), if clients share those; always on the device."""
        self.carried = {f"{config.aggregation}.{n}": t for n, t in aggregator.carried.items()} | {
            f"{config.aggregation}.odd.{n}": t for n, t in (odd.carried if odd else {}).items()}
        """What the aggregator makes the next round's steps of, with int8 and int4."""
        self.sections = {f"{config.aggregation}.{n}": t
                         for n, t in aggregator.carried_in_sections.items()}
        """What is the same on all only after the aggregator's `complete`."""
        aggregator.averages = self.moments or {}

    def _replica(self, vector: Tensor) -> Tensor:
        if self._pinned is None:
            return self._plane.replicated(vector)
        return self._pinned.empty_like(vector).copy_(vector)

    def named(self) -> dict[str, Tensor]:
        """All of it by the names that checkpoints use: the tensors themselves."""
        return self.replicated() | self.sections

    def replicated(self) -> dict[str, Tensor]:
        """What is the same on all workers after every round."""
        return {"model": self.model} | {
            f"server.{name}": t for name, t in self.server.items()} | {
            f"moments.{name}": t for name, t in (self.moments or {}).items()
            } | self.rows | self.carried

    def load(self, checkpoint: Checkpoint, warns: bool) -> None:
        """Workers: take what a checkpoint holds. warns: whether this one says what is missing."""
        tensors = checkpoint.tensors(GLOBAL)
        for name, tensor in self.named().items():
            # Of versions whose int8 took a maximum over clients, or whose int4 had longer blocks.
            if name in STEPS and (name not in tensors or len(tensors[name]) != len(tensor)):
                if warns:
                    log(f"checkpoint {checkpoint.folder} has no steps for --aggregation {name[:4]} "
                        "as this version makes them; they start over, so the results are not those "
                        "of the run that made it", WARNING)
                continue
            self._plane.write(tensor, tensors[name])


# ---- between the server and sites ----------------------------------------------------------------


@dataclass(frozen=True)
class Vector:
    """What is said of a vector before it is sent."""

    name: str
    size: int
    type: str
    """As safetensors names it: F32."""

    @property
    def dtype(self) -> torch.dtype:
        """InputError for a type that no state has."""
        if self.type not in _TYPES:
            raise InputError(f"{self.name}: no vector is of the type {self.type[:10]}")
        return _TYPES[self.type]


def layout(state: State) -> list[Vector]:
    """The vectors of a state, in the order in which they are sent."""
    return [Vector(name, vector.numel(), DTYPES[vector.dtype]) for name, vector in state.items()]


def send(control: ControlPlane, state: State) -> None:
    """First worker -> server. On return the vectors may change; the last may still be on its way.
    """
    for vector in state.values():
        control.copy_to_server(vector)


def receive(control: ControlPlane, vectors: list[Vector]) -> dict[str, Tensor]:
    """Server: what `send` sends, on the CPU."""
    return {vector.name: control.receive_copy(vector.size, vector.dtype) for vector in vectors}


def hand_out(control: ControlPlane, state: State | None) -> dict[str, Tensor]:
    """Server -> all ranks: the state that the server reads from its checkpoint, on the CPU. The
    argument of other ranks is ignored."""
    announced = control.share(None if state is None else [
        [vector.name, vector.size, vector.type] for vector in layout(state)])
    return {vector.name: control.share_vector(
        None if state is None else state[vector.name], vector.size, vector.dtype)
        for vector in (Vector(*values) for values in announced)}

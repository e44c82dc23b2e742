"""fedrun's side of the overhead: one rank of a run whose clients do not train.

    RANK=... python -m tests.benchmarks.fedrun_rounds --params 27 --clients 4   (see ranks.py)

In: all that fedrun does in a round of `protocol.run`, from one plan of the server to the next: the
plan, a worker loads the global model for each of its clients, takes the difference, checks, scales,
rounds and adds it, reports; verdict, all-reduce of the workers, server update, reports and the
run's event line. Out: the batch, the gradient and the optimizer's step. In their place a client
moves one element in a thousand by a fixed step, which takes no time and shows at the end that the
updates have arrived; Fisher diagonals are fixed and dense. Kernels take as long for zeros as for
anything else.

A block of rounds ends with one more, not counted, in which all workers at once measure the floor
(`Floor`) on the memory that they have just used. The clock is one for all processes of a machine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.benchmarks.ranks import Commands, end_with_parent

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as fedrun's own entry point does

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fedrun import protocol, server, worker
from fedrun.client import Client, LocalLosses
from fedrun.config import FederatedConfig, ModelConfig
from fedrun.data.tokens import TokenData
from fedrun.launch import detect
from fedrun.model.mamba2 import Mamba2LM
from fedrun.plan import Plan, Verdict
from fedrun.runtime import Runtime, connected, join
from fedrun.settings import resolve
from fedrun.stopping import LOCK, StopRequest

MOVED = slice(0, None, 1009)  # the elements that a client moves
STEP = 2.0**-12
SEQUENCES = 4  # of a client; nobody reads them


def shape(params: float) -> ModelConfig:
    """The presets' one-layer model, narrower where that is too large, with as many rows of the
    embedding as make `params` million parameters."""
    small = ModelConfig(d_model=32, d_state=16, headdim=16)
    config = small if params < 0.5 else ModelConfig(d_model=256) if params < 5 else ModelConfig()
    rest = sum(p.numel() for p in tensors(config)) - config.d_model
    rows = round((1e6 * params - rest) / config.d_model)
    if rows < 1:
        raise ValueError(f"--params {params}: accepted is {rest / 1e6:.3g} or more")
    return dataclasses.replace(config, pad_vocab_multiple=rows)


def tensors(config: ModelConfig) -> list[Tensor]:
    """The parameters of a model, without memory, in the order of their names."""
    with torch.device("meta"):
        return [p for _, p in sorted(Mamba2LM(config, config.rows(1)).named_parameters())]


def shapes(params: float) -> list[list[int]]:
    return [list(p.shape) for p in tensors(shape(params))]


class Floor:
    """What a round cannot do without, by torch's own kernels, one pass each.

    Subtract, scale and add for every client of the worker (for a method with a product in its
    term, multiply); the bare `dist.all_reduce` of the same buffer in the same group; apply. Passes
    over a 64-bit sum are of its width: float64 in place of int64. Nothing is checked, rounded or
    loaded.
    """

    def __init__(self, side: worker.Worker) -> None:
        self.side = side
        self.group = side.runtime.data_plane.group
        size, terms = side.flat.size, side.terms
        kind = torch.float32 if terms.buffer.element_size() == 4 else torch.float64
        sums = terms.buffer[:-1].view(kind)
        self.sums = [sums[i * size:(i + 1) * size] for i in range(len(terms.sums))]

    def measure(self) -> dict[str, list[float]]:
        """Beginning and end of each part on this worker."""
        spans = {}
        for name, part in (("local", self.local), ("all_reduce", self.all_reduce),
                           ("apply", self.apply)):
            for number, one in enumerate(self.sums):  # what integers leave may be no number
                one.fill_(number)
            if self.group:
                dist.barrier(self.group)
            began = time.monotonic()
            part()
            spans[name] = [began, time.monotonic()]
        return spans

    def local(self) -> None:
        client, model = self.side.flat.vector, self.side.global_model
        for _ in self.side.clients:
            client.sub_(model)
            if self.side.fisher:
                client.mul_(self.side.fisher.diagonal)
            for i, one in enumerate(self.sums):
                # Of sums of 64 bits the other is as wide as the term.
                one.add_(client if one.dtype == client.dtype else self.sums[i - 1], alpha=0.25)

    def all_reduce(self) -> None:
        if self.group:
            dist.all_reduce(self.side.terms.buffer, group=self.group)

    def apply(self) -> None:
        for vector in self.side.state.values():
            vector.mul_(1.0)
        first, *others = self.sums
        if others:
            first.div_(others[0])  # as many bytes as model.addcdiv_(first, second)
        elif first.dtype == torch.float32:
            self.side.flat.vector.add_(first, alpha=0.25)
        else:
            first.mul_(0.5)


class MeasuredWorker(worker.Worker):
    """A worker that measures the floor in every round that ends a block."""

    rounds_per_block: int

    def __init__(self, config: FederatedConfig, data: TokenData, runtime: Runtime,
                 checkpoint: None = None) -> None:
        super().__init__(config, data, runtime, checkpoint)
        if self.fisher:
            diagonal = self.fisher.diagonal.uniform_(1e-6, 1e-4)
            self.fisher = SimpleNamespace(diagonal=diagonal, begin=lambda: None,  # type: ignore
                                          finish=lambda: diagonal)
        self.floor = Floor(self)
        self.at_start = self.global_model[MOVED].clone()

    def train(self, plan: Plan) -> dict[str, Any]:
        ends_block = plan.round % (self.rounds_per_block + 1) == 0
        floor = {"floor": self.floor.measure()} if ends_block else {}
        if ends_block:
            moved = self.global_model[MOVED] - self.at_start
            assert bool((moved != 0).all()), "no update has arrived"
            assert bool(moved.isfinite().all()), "the model is not finite"
        return super().train(plan) | floor


def move(self: Client, *_: Any, **__: Any) -> LocalLosses:
    """In place of local training."""
    self.flat.vector[MOVED].add_(STEP)
    return LocalLosses(torch.zeros((), dtype=torch.float64), 1)


def gradient(self: Client, *_: Any) -> LocalLosses:
    """In place of a gradient, for the method that sums them."""
    self.flat.grad[MOVED] = STEP
    return LocalLosses(torch.zeros((), dtype=torch.float64), 1)


class MeasuredServer(server.Server):
    """A server that runs rounds when it is asked to, and takes their times."""

    rounds_per_block: int
    commands: Commands

    def plan(self, number: int) -> dict[str, Any]:
        now = time.monotonic()
        if number == 1:
            self.times: list[float] = []
            self.floors: list[dict[str, Any]] = []
            last = self.commands.next() is None
        elif (number - 1) % (self.rounds_per_block + 1) == 0:
            self._answer()
            last = self.commands.next() is None
        else:
            self.times.append(now - self.began)
            last = False
        self.began = time.monotonic()
        return super().plan(number) | {"evaluate": False, "save": False, "last": last}

    def record(self, plan: Plan, verdict: Verdict, reports: list[dict[str, Any]],
               model: Tensor | None) -> None:
        self.floors += [report["floor"] for report in reports if "floor" in report]
        super().record(plan, verdict, reports, model)

    def _answer(self) -> None:
        spans = {name: max(f[name][1] for f in self.floors) - min(f[name][0] for f in self.floors)
                 for name in self.floors[0]}
        self.commands.answer({"rounds": self.times, "all_reduce": spans["all_reduce"],
                              "passes": spans["local"] + spans["apply"]})
        self.times, self.floors = [], []


def settings(arguments: argparse.Namespace, folder: str) -> FederatedConfig:
    found = resolve(arguments.method, {
        "num_clients": arguments.clients, "rounds": 10**6, "dtype": "fp32", "data_dir": folder,
        "checkpoint_freq": None, "device": "cpu", "batch_size": 1, "sequence_length": 2,
        "timeout": 300.0, "threads": int(os.environ["OMP_NUM_THREADS"])})
    assert isinstance(found, FederatedConfig)
    return dataclasses.replace(found, model=shape(arguments.params))


def main() -> None:
    commands = Commands()
    end_with_parent()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=float, required=True, help="million")
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--method", default="fed_avg")
    parser.add_argument("--block", type=int, default=3)
    arguments = parser.parse_args()
    launch = detect(os.environ)
    protocol.Worker, protocol.Server = MeasuredWorker, MeasuredServer  # type: ignore[misc]
    Client.train, Client.gradient = move, gradient  # type: ignore[method-assign, assignment]
    worker.mean_entropy = lambda *_: 1.0
    MeasuredWorker.rounds_per_block = MeasuredServer.rounds_per_block = arguments.block
    MeasuredServer.commands = commands
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fedrun-benchmark-"))
        config = settings(arguments, folder)
        torch.set_num_threads(config.threads)
        config.run_dir.mkdir(parents=True)
        (config.run_dir / LOCK).touch()
        sequences = np.zeros((SEQUENCES * arguments.clients, 2), dtype=np.uint16)
        data = TokenData(sequences, sequences[:1], 1, {}, Path())
        control = stack.enter_context(connected(launch, True, config.timeout))
        runtime = join(launch, torch.device("cpu"), control, {})
        stopping = StopRequest(config.run_dir, control.lost_peers, quiet=True)
        protocol.run(config, data, runtime, stopping, {})


if __name__ == "__main__":
    main()

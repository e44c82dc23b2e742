"""fedrun's side: one rank of a run whose rounds are started by command and timed (see ranks.py).

    RANK=... python -m tests.benchmarks.fedrun_rounds --params 27 --clients 4     without training
    RANK=... python -m tests.benchmarks.fedrun_rounds --train pure_ssm_1_layer --clients 4

Without training (--params), a round includes all that `protocol.train_federated` does from one plan
of the server to the next: the plan; for each client, the worker loads the global model, takes the
difference, checks, scales, rounds and adds it, and reports; the decision, the sum over workers, the
server update, the reports and the run's event line. It excludes the batch, the gradient and the
optimizer step. Instead, a client moves one element in a thousand by a fixed step, which takes no
time and shows at the end that updates have arrived. Fisher diagonals are fixed and dense. Kernels
take as long for zeros as for other values.

After each block, all workers measure the floor (`Floor`) at the same time, in a round that is not
counted, on the memory that they have just used. All processes of a machine share one clock.
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

from fedrun import protocol
from fedrun.config import FederatedConfig
from fedrun.data.tokens import TokenData
from fedrun.distributed import runtime
from fedrun.distributed.launch import detect
from fedrun.distributed.runtime import build_runtime, connect
from fedrun.distributed.stopping import StopRequest
from fedrun.experiment import resolve_dtype
from fedrun.federation import client_measures, server
from fedrun.federation.client import Client, LocalLosses
from fedrun.federation.messages import RoundDecision, RoundPlan, RoundReport, WorkerReport
from fedrun.federation.worker import Worker
from fedrun.flags import resolve
from fedrun.model.config import ModelConfig
from fedrun.model.hardware import hardware
from fedrun.model.mamba2 import Mamba2LM
from fedrun.records.run_files import LOCK
from tests.benchmarks.sgd import Task
from tests.support.experiments import experiment_of

MOVED = slice(0, None, 1009)  # the elements that a client changes
STEP = 2.0**-12
SEQUENCES = 4  # of a client
GPT2 = 50257  # its vocabulary
PAUSE = {"seconds": 0.0}  # of a client's training, which takes no time of this processor
# Where other parts are put in place of those of a run.
PROTOCOL: Any = protocol
MEASURES: Any = client_measures
CLIENT: Any = Client
RUNTIME: Any = runtime


def shape(params: float) -> ModelConfig:
    """The one-layer preset, narrower for small `params`, with as many rows of the embedding as give
    `params` million parameters."""
    small = ModelConfig(d_model=32, d_state=16, headdim=16)
    config = small if params < 0.5 else ModelConfig(d_model=256) if params < 5 else ModelConfig()
    rest = sum(p.numel() for p in tensors(config)) - config.d_model
    rows = round((1e6 * params - rest) / config.d_model)
    if rows < 1:
        raise ValueError(f"--params {params}: must be >= {rest / 1e6:.3g}")
    return dataclasses.replace(config, pad_vocab_multiple=rows)


def tensors(config: ModelConfig) -> list[Tensor]:
    """The parameters of a model, sorted by name, on the meta device."""
    with torch.device("meta"):
        return [p for _, p in sorted(Mamba2LM(config, config.rows(1)).named_parameters())]


def shapes(params: float) -> list[list[int]]:
    return [list(p.shape) for p in tensors(shape(params))]


class Floor:
    """The passes that a round needs at least, each by one of torch's kernels.

    Subtract, scale and add for every client of the worker (and multiply, for a method whose term is
    a product); the bare `dist.all_reduce` of the same buffer in the same group; apply. Passes over
    a 64-bit sum use float64 in place of int64. Nothing is checked, rounded or loaded.
    """

    def __init__(self, side: Worker) -> None:
        self.side = side
        self.group = side.runtime.data_plane.group
        size, buffer = side.flat.size, side.aggregator.buffer
        dtype = torch.float32 if buffer.element_size() == 4 else torch.float64
        self.sums = list(buffer[:-1].view(dtype).split(size))

    def measure(self) -> dict[str, float]:
        """When each part began and ended on this worker."""
        spans: dict[str, float] = {}
        parts = {"local": self.local, "all_reduce": self.all_reduce, "apply": self.apply}
        if not self.group:
            del parts["all_reduce"]
        for name, part in parts.items():
            for number, one in enumerate(self.sums):  # as floats, the integers may be nan
                one.fill_(number)
            if self.group:
                dist.barrier(self.group)
            began = time.monotonic()
            part()
            spans |= {f"{name} began": began, f"{name} ended": time.monotonic()}
        return spans

    def local(self) -> None:
        client, model = self.side.flat.vector, self.side.global_model
        for _ in self.side.clients:
            client.sub_(model)
            if self.side.fisher is not None:
                client.mul_(self.side.fisher.diagonal)
            for i, one in enumerate(self.sums):
                # If the sum has 64 bits, the other sum has the width of the term.
                one.add_(client if one.dtype == client.dtype else self.sums[i - 1], alpha=0.25)

    def all_reduce(self) -> None:
        dist.all_reduce(self.side.aggregator.buffer, group=self.group)

    def apply(self) -> None:
        for vector in self.side.global_state.server.values():
            vector.mul_(1.0)
        first, *others = self.sums
        if others:
            first.div_(others[0])  # as many bytes as model.addcdiv_(first, second)
        elif first.dtype == torch.float32:
            self.side.flat.vector.add_(first, alpha=0.25)
        else:
            first.mul_(0.5)


class KeepingWorker(Worker):
    """A worker that saves the global model after the last round that was asked for.

    The run's last round, which the end of the commands starts, comes after it.
    """

    out: str

    def train(self, plan: RoundPlan) -> WorkerReport:
        if plan.last and self.runtime.worker == 0:
            np.save(self.out, self.global_model.numpy())
        return super().train(plan)


class FloorWorker(Worker):
    """A worker that measures the floor in the round after every block."""

    block: int

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.fisher is not None:
            diagonal = self.fisher.diagonal.uniform_(1e-6, 1e-4)
            fisher: Any = SimpleNamespace(diagonal=diagonal, begin=lambda: None,
                                          finish=lambda: diagonal)
            self.fisher = self.terms.fisher = fisher
        self.floor = Floor(self)
        self.at_start = self.global_model[MOVED].clone()

    def train(self, plan: RoundPlan) -> WorkerReport:
        self.measured: dict[str, float] = {}
        if plan.round % (self.block + 1):
            return super().train(plan)
        moved = self.global_model[MOVED] - self.at_start
        assert bool((moved != 0).all()), "no update has arrived"
        assert bool(moved.isfinite().all()), "the model is not finite"
        self.measured = self.floor.measure()
        return super().train(plan)

    def aggregate(self, plan: RoundPlan) -> RoundReport:
        return dataclasses.replace(super().aggregate(plan), measured=self.measured)


def move(self: Client, *_: Any, **__: Any) -> LocalLosses:
    """Replaces local training."""
    time.sleep(PAUSE["seconds"])
    self.flat.vector[MOVED].add_(STEP)
    return LocalLosses(torch.zeros((), dtype=torch.float64), 1)


def gradient(self: Client, *_: Any) -> LocalLosses:
    """Replaces the gradient, for the method that sums gradients."""
    self.flat.grad[MOVED] = STEP
    return LocalLosses(torch.zeros((), dtype=torch.float64), 1)


class TimedServer(server.Server):
    """A server that runs a block of rounds per command and answers with their times."""

    block: int
    uncounted: int
    """Rounds after a block that are not timed, as they measure the floor."""
    commands: Commands
    began: float
    """Of the round that is on."""

    def plan(self, number: int) -> RoundPlan:
        now, place = time.monotonic(), (number - 1) % (self.block + self.uncounted)
        last = False
        if number > 1 and (place or not self.uncounted):
            self.times.append(now - self.began)
        if place == 0:
            if number > 1:
                self._answer()
            self.times: list[float] = []
            self.floors: list[dict[str, float]] = []
            last = self.commands.next() is None
        self.began = time.monotonic()
        return dataclasses.replace(super().plan(number), evaluate=False, save=False, last=last)

    def record(self, plan: RoundPlan, decision: RoundDecision, trained: list[WorkerReport],
               reports: list[RoundReport], model: Tensor | None,
               state: dict[str, Tensor] | None = None) -> None:
        self.floors += [report.measured for report in reports if report.measured]
        super().record(plan, decision, trained, reports, model, state)

    def _answer(self) -> None:
        answer: dict[str, Any] = {"rounds": self.times}
        if self.floors:
            parts = [key.removesuffix(" began") for key in self.floors[0] if "began" in key]
            spans = {name: max(f[f"{name} ended"] for f in self.floors)
                     - min(f[f"{name} began"] for f in self.floors) for name in parts}
            answer |= {"all_reduce": spans.get("all_reduce", 0.0),
                       "passes": spans["local"] + spans["apply"]}
        self.commands.answer(answer)


def measure_floor(arguments: argparse.Namespace) -> tuple[FederatedConfig, TokenData]:
    """Rounds without local training, and their floor."""
    PAUSE["seconds"] = arguments.pause
    if not arguments.overlap:  # the floor's buffer would be on its way
        PROTOCOL.Worker, TimedServer.uncounted = FloorWorker, 1
    CLIENT.train, CLIENT.gradient = move, gradient
    MEASURES.mean_entropy = lambda *_: 1.0
    FloorWorker.block = arguments.block
    sequences = np.zeros((SEQUENCES * arguments.clients, 2), dtype=np.uint16)
    config = settings(arguments, arguments.method, batch_size=1, sequence_length=2,
                      overlap=arguments.overlap)
    config = dataclasses.replace(config, model=shape(arguments.params))
    return config, TokenData(sequences, sequences[:1], 1, {}, Path())


def train_preset(arguments: argparse.Namespace) -> tuple[FederatedConfig, TokenData]:
    """Complete rounds, on random tokens of GPT-2's vocabulary."""
    config = settings(arguments, "fed_avg", config=arguments.train,
                      local_updates=arguments.local_updates)
    size = (SEQUENCES * config.batch_size * arguments.clients, config.sequence_length)
    sequences = np.random.default_rng(0).integers(GPT2, size=size, dtype=np.uint16)
    return config, TokenData(sequences, sequences[:1], GPT2, {}, Path())


def train_task(arguments: argparse.Namespace) -> tuple[FederatedConfig, TokenData]:
    """Rounds with the benchmark's plain SGD as local training, as in the other frameworks."""
    task = Task.from_json(arguments.task)

    def train(self: Client, model: Mamba2LM, steps: int, first_step: int, *_: Any, **__: Any
              ) -> LocalLosses:
        loss = task.train(model, self.flat, self.index, first_step // steps + 1)
        return LocalLosses(loss, steps * task.batch * (task.length - 1))

    PROTOCOL.Worker, KeepingWorker.out = KeepingWorker, arguments.out
    CLIENT.train = train
    sequences = np.zeros((SEQUENCES * arguments.clients, 2), dtype=np.uint16)
    config = settings(arguments, "fed_avg", batch_size=1, sequence_length=2, lr=task.lr,
                      local_updates=task.steps, dtype="fp32")
    config = dataclasses.replace(config, model=ModelConfig(**task.model))
    return config, TokenData(sequences, sequences[:1], task.vocabulary, {}, Path())


def settings(arguments: argparse.Namespace, method: str, **flags: Any) -> FederatedConfig:
    found = resolve(method, {
        "num_clients": arguments.clients, "rounds": 10**6, "device": "cpu",
        "checkpoint_freq": None, "timeout": 300.0, "data_dir": arguments.folder,
        "threads": int(os.environ["OMP_NUM_THREADS"])} | flags)
    assert isinstance(found, FederatedConfig)
    return dataclasses.replace(found, dtype=resolve_dtype(found, [hardware(torch.device("cpu"))]))


def main() -> None:
    TimedServer.commands = Commands()
    end_with_parent()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--block", type=int, default=3, help="rounds per command")
    parser.add_argument("--params", type=float, help="million; rounds without training")
    parser.add_argument("--method", default="fed_avg")
    parser.add_argument("--pause", type=float, default=0.0,
                        help="with --params: seconds that a client waits in place of its training")
    parser.add_argument("--overlap", action="store_true", help="with --params; without its floor")
    parser.add_argument("--apart", action="store_true",
                        help="as if every worker had its own machine")
    parser.add_argument("--train", help="a preset; complete rounds of fedrun")
    parser.add_argument("--local_updates", type=int, default=1)
    parser.add_argument("--task", help="JSON: a Task; complete rounds with SGD")
    parser.add_argument("--out", help="with --task: file for the global model at the end")
    arguments = parser.parse_args()
    if arguments.apart:
        RUNTIME.machine_id = lambda: 0
    launch = detect(os.environ)
    PROTOCOL.Server = TimedServer
    TimedServer.block, TimedServer.uncounted = arguments.block, 0
    with contextlib.ExitStack() as stack:
        arguments.folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="fedrun-benchmark-"))
        build = (measure_floor if arguments.params else train_task if arguments.task
                 else train_preset)
        config, data = build(arguments)
        torch.set_num_threads(config.threads)
        config.run_dir.mkdir(parents=True)
        (config.run_dir / LOCK).touch()
        control = stack.enter_context(connect(launch, True, config.timeout))
        joined = build_runtime(launch, torch.device("cpu"), control, {})
        stopping = StopRequest(config.run_dir, config.run_dir / LOCK, control.lost_peers,
                               launch)
        protocol.train_federated(experiment_of(config, data), joined, stopping)


if __name__ == "__main__":
    main()

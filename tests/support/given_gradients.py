"""A worker whose clients' gradients are given, for rounds of averaged moments by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedrun.config import FederatedConfig
from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.data_plane import DataPlane
from fedrun.distributed.launch import detect
from fedrun.distributed.runtime import Runtime
from fedrun.federation.client import Client
from fedrun.federation.worker import Worker
from fedrun.flags import resolve
from fedrun.training.params import ParamSlice
from tests.support import experiments
from tests.support.made_data import made

LR, DECAY, CLIP, BETA1, BETA2, EPS, MUON, STEPS = 1e-2, 0.1, 0.5, 0.8, 0.95, 1e-4, 0.85, 3
DATA = made([400, 300, 500])


def worker_of(plane: DataPlane | None = None, **flags: Any) -> Worker:
    config = resolve("fed_avg", {
        "config": "tiny", "rounds": 9, "batch_size": 2, "sequence_length": 4, "device": "cpu",
        "client_moments": "average_sqrt", "grad_clip": CLIP, "lr": LR, "weight_decay": DECAY,
        "beta1": BETA1, "beta2": BETA2, "eps": EPS, "local_updates": STEPS,
        **({"muon_momentum": MUON} if "muon" in flags.values() else {}), **flags})
    assert isinstance(config, FederatedConfig)
    runtime = Runtime(detect({}), torch.device("cpu"), (0,), ControlPlane(), plane or DataPlane())
    return experiments.worker_of(config, DATA, runtime)


def gradient(size: int, client: int, step: int) -> Tensor:
    """Of a client's step of the run: elements of all sizes, which differ from client to client."""
    scale = torch.randn(size, generator=torch.Generator().manual_seed(client), dtype=torch.float64)
    noise = torch.randn(size, generator=torch.Generator().manual_seed(1000 * (step + 1) + client),
                        dtype=torch.float64)
    return (2 * scale).exp() * (noise + 0.5) * (0.01 if step % 4 else 0.0001)  # not all clipped


def go(worker: Worker, rounds: int) -> list[tuple[list[int], list[float], int]]:
    """Rounds of a worker whose clients' gradients are the given ones: the cohorts, their weights,
    and the bytes that are reported."""
    at: tuple[int, int] = 0, 0

    def compute_grad(_: Tensor) -> tuple[Tensor, int]:
        nonlocal at
        worker.flat.grad.copy_(gradient(worker.flat.size, *at))
        at = at[0], at[1] + 1
        return torch.zeros(()), 4

    trained, whole = [], Client.train

    def train(client: Client, model: Any, steps: int, first_step: int, *args: Any, **kwargs: Any
              ) -> Any:
        nonlocal at
        at = client.index, first_step
        return whole(client, model, steps, first_step, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.model, "compute_grad", compute_grad)
        patch.setattr(Client, "train", train)
        for number in range(1, rounds + 1):
            plan = worker.schedule.plan(number, 0.0)
            report = worker.train(plan)
            assert not any(client.left_out for client in report.clients)
            worker.aggregate(plan)
            trained.append((plan.cohort, plan.weights, report.bytes))
    return trained


def of_muon(worker: Worker) -> list[ParamSlice]:
    return worker.flat.matrices if worker.config.local_optimizer == "muon" else []

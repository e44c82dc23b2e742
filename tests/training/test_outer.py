"""The outer optimizer of central runs, against torch.optim in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fedrun.config import CentralConfig
from fedrun.flags import resolve
from fedrun.training.optimizer import LocalOptimizer
from fedrun.training.outer import OuterOptimizer
from fedrun.training.params import FlatParams

EVERY, LR, OUTER_LR, MOMENTUM = 3, 0.05, 0.8, 0.6


def loss(model: nn.Module, step: int) -> torch.Tensor:
    x = torch.sin(torch.arange(12, dtype=torch.float64) * (step + 1)).reshape(4, 3)
    out: torch.Tensor = model(x)
    return (out - x.sum(1, keepdim=True)).square().mean()


@pytest.mark.parametrize(("warmup", "momenta"), [
    (False, [MOMENTUM] * 4), (True, [0.0, 1 / 2, MOMENTUM, MOMENTUM])])
def test_outer_steps_are_those_of_torch(warmup: bool, momenta: list[float]) -> None:
    """And a state that is saved and loaded in between, into another one, goes on as if it were not.
    """
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    fast, slow = copy.deepcopy(model), copy.deepcopy(model)
    adamw = torch.optim.AdamW(fast.parameters(), lr=LR, weight_decay=0.01)
    sgd = torch.optim.SGD(slow.parameters(), lr=OUTER_LR, momentum=MOMENTUM, nesterov=True)
    config = resolve("central", {"lr": LR, "outer_every": EVERY, "server_lr": OUTER_LR,
                                 "server_momentum": MOMENTUM, "server_momentum_warmup": warmup})
    assert isinstance(config, CentralConfig)
    flat = FlatParams(model)
    local, outer = LocalOptimizer(flat, config, 99), OuterOptimizer(flat, config)
    for step in range(1, 4 * EVERY + 1):
        flat.grad.zero_()
        loss(model, step).backward()
        local.step(step - 1)
        outer.after(step)
        adamw.zero_grad()
        loss(fast, step).backward()
        adamw.step()
        if step % EVERY == 0:
            momentum = momenta[step // EVERY - 1]
            sgd.param_groups[0].update(momentum=momentum, nesterov=momentum > 0)
            for p, q in zip(slow.parameters(), fast.parameters(), strict=True):
                p.grad = (p - q).detach()
                if not momentum:  # in which torch keeps no buffer
                    sgd.state[p]["momentum_buffer"] = p.grad.clone()
            sgd.step()
            fast.load_state_dict(slow.state_dict())
        for p, q in zip(model.parameters(), fast.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
        if step == 5:  # between two outer steps
            saved = {name: tensor.clone() for name, tensor in outer.state().items()}
            outer = OuterOptimizer(flat, config)
            outer.load_state(saved)

"""The local optimizer: AdamW on the flat vector, its schedule, and its moments' way in and out."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedrun.config import RunConfig
from fedrun.params import FlatParams
from fedrun.sums import adamw_step_bound


def scheduled_lr(config: RunConfig, step: int, steps: int) -> float:
    """Learning rate of step `step` (0, 1, ...) of `steps`: a linear warmup to --lr, then constant,
    or along half a cosine towards zero (Loshchilov & Hutter 2017, equation 5, without restarts)."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.lr_schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(steps - config.warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def update_bound(config: RunConfig, steps: int) -> float:
    """The largest element of an update after so many local steps (fixes the grid of the sums)."""
    return steps * adamw_step_bound(config.lr, config.weight_decay, config.beta1, config.beta2)


class LocalOptimizer:
    """AdamW (Loshchilov & Hutter 2019) on all parameters of a worker's model.

    total_steps: optimizer steps in the whole run, for the schedule.
    """

    def __init__(self, flat: FlatParams, config: RunConfig, total_steps: int) -> None:
        self.flat = flat
        self.config = config
        self.total_steps = total_steps
        self.parameter = flat.parameter()
        self.reset()

    def reset(self) -> None:
        """Start AdamW anew."""
        self.adamw = torch.optim.AdamW(
            [self.parameter], lr=self.config.lr, betas=(self.config.beta1, self.config.beta2),
            weight_decay=self.config.weight_decay, fused=True)

    def step(self, number: int) -> None:
        """Move the parameters along flat.grad; `number` is the step's place in the run, from 0."""
        if self.config.grad_clip is not None:
            norm = torch.linalg.vector_norm(self.flat.grad)
            self.flat.grad.mul_((self.config.grad_clip / (norm + 1e-6)).clamp_(max=1.0))
        self.adamw.param_groups[0]["lr"] = scheduled_lr(self.config, number, self.total_steps)
        self.adamw.step()

    def state(self) -> dict[str, Tensor]:
        """AdamW's `step`, `exp_avg` and `exp_avg_sq` themselves; empty before the first step."""
        return dict(self.adamw.state[self.parameter]) if self.adamw.state else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from copies of what `state` gave."""
        self.reset()
        device = self.parameter.device
        if state:
            self.adamw.state[self.parameter] = {k: v.to(device, copy=True)
                                                for k, v in state.items()}

    def take_moments(self) -> dict[str, Tensor]:
        """AdamW's moments, corrected for their bias in place: to be loaded before the next step.

        Corrected, since the second moment of a first step is a thousandth of the squared gradient,
        too small for the grid that squared gradients are summed on.
        """
        state = self.adamw.state[self.parameter]
        steps = int(state["step"])
        return {"exp_avg": state["exp_avg"].div_(1 - self.config.beta1**steps),
                "exp_avg_sq": state["exp_avg_sq"].div_(1 - self.config.beta2**steps)}

    def load_moments(self, moments: dict[str, Tensor], steps: int) -> None:
        """Go on from moments corrected for their bias, (size,) each, after so many steps."""
        state = self.adamw.state[self.parameter]
        if not state:
            state |= {"step": torch.zeros((), device=self.parameter.device),
                      "exp_avg": torch.empty_like(self.parameter.data),
                      "exp_avg_sq": torch.empty_like(self.parameter.data)}
        state["step"].fill_(steps)
        torch.mul(moments["exp_avg"], 1 - self.config.beta1**steps, out=state["exp_avg"])
        torch.mul(moments["exp_avg_sq"], 1 - self.config.beta2**steps, out=state["exp_avg_sq"])

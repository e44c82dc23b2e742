"""An outer optimizer around a local one: SNOO (2025, arXiv 2510.15830).

After every K optimizer steps, the way that they have moved the parameters, w_K - w_0, is taken for
a step against a gradient, and Nesterov's SGD makes it: from w_0, with a momentum that no step in
between sees. That is DiLoCo with one client, so its algebra is DiLoCo's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedrun.config import CentralConfig
from fedrun.strategies.base import ServerRound
from fedrun.strategies.fed_momentum import DiLoCo
from fedrun.training.params import FlatParams

PREFIX = "outer."  # of its tensors in a checkpoint


class OuterOptimizer:
    """Nesterov's SGD on what every --outer_every steps have moved the parameters by."""

    def __init__(self, flat: FlatParams, config: CentralConfig) -> None:
        assert config.outer_every is not None
        self.flat, self.every = flat, config.outer_every
        self.rule = DiLoCo(server_momentum=config.server_momentum, server_lr=config.server_lr,
                           server_momentum_warmup=config.server_momentum_warmup,
                           momentum_form="nesterov")
        self.start = flat.vector.clone()
        """The parameters after the last outer step, (size,)."""
        self.vectors = {name: torch.full_like(self.start, value)
                        for name, value in self.rule.state.items()}

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Make an outer step if one is due after optimizer step `step`, counted from 1."""
        number, rest = divmod(step, self.every)
        if rest:
            return
        self.rule.server_update(self.start, self.vectors, {"delta": self.flat.vector - self.start},
                                ServerRound(number))
        self.flat.vector.copy_(self.start)

    def state(self) -> dict[str, Tensor]:
        """Everything it needs to resume, by name, (size,) each. The tensors themselves."""
        return {PREFIX + name: tensor for name, tensor in
                (self.vectors | {"start": self.start}).items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore a saved state, which may hold other tensors too."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

"""FedMomentum: the server moves with momentum along the mean update S = sum_k p_k d_k / sum_k p_k.

    ema         v <- b v + (1 - b) S,  w <- w + eta v       (v starts at zero)
    heavy_ball  v <- b v + S,          w <- w + eta v
    nesterov    v <- b v + S,          w <- w + eta (S + b v)

The last two are torch.optim.SGD on the gradient -S: FedAvgM of Hsu, Qi & Brown (2019), "Measuring
the Effects of Non-Identical Data Distribution for Federated Visual Classification". Their steady
step is 1 / (1 - b) times as long as that of ema.

DiLoCo (Douillard et al. 2023, "DiLoCo: Distributed Low-Communication Training of Language Models")
is the nesterov form over many local AdamW steps, with eta 0.7 and b 0.9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedrun.common.errors import require
from fedrun.strategies.base import ServerRound
from fedrun.strategies.fed_avg import FedAvg

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FedMomentum(FedAvg):
    """Momentum on the server: the global model moves along a decaying sum of mean updates."""

    server_momentum: float = 0.9
    """Decay b of the server's momentum, in [0, 1)."""
    server_lr: float = 1.0
    """Server learning rate eta."""
    momentum_form: Literal["ema", "heavy_ball", "nesterov"] = "ema"
    """v <- b v + (1-b) S (ema), or the momentum of torch.optim.SGD on -S, plain (heavy_ball) or
    Nesterov's (nesterov), whose steady step is 1/(1-b) times as long."""

    def __post_init__(self) -> None:
        require(0 <= self.server_momentum < 1, "--server_momentum", self.server_momentum,
                "in [0, 1)")
        require(self.server_lr > 0, "--server_lr", self.server_lr, "> 0")

    @property
    def state(self) -> Mapping[str, float]:
        return {"momentum": 0.0}

    def server_update(self, model: Tensor, state: Mapping[str, Tensor], mean: Mapping[str, Tensor],
                      context: ServerRound) -> None:
        b, v, s = self.server_momentum, state["momentum"], mean["delta"]
        v.mul_(b).add_(s, alpha=1 - b if self.momentum_form == "ema" else 1.0)
        if self.momentum_form == "nesterov":
            model.add_(s.add_(v, alpha=b), alpha=self.server_lr)
        else:
            model.add_(v, alpha=self.server_lr)

    def warnings(self, local_updates: int) -> list[str]:
        stretch = self.server_lr / (1 - self.server_momentum)
        if self.momentum_form == "ema" or stretch <= 2 or local_updates >= 8:
            return []
        return [f"--server_lr {self.server_lr:g} with --server_momentum {self.server_momentum:g} "
                f"({self.momentum_form}) makes steady steps {stretch:.3g} times as long as the "
                f"mean update, too long for most runs with --local_updates {local_updates}"]


@dataclass(frozen=True)
class DiLoCo(FedMomentum):
    """DiLoCo: Nesterov momentum on the server over many local AdamW steps (see fed_momentum)."""

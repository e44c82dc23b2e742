"""FedMomentum: the server moves with momentum along the mean update S = sum_k p_k d_k / sum_k p_k.

    ema         v <- b v + (1 - b) S,  w <- w + eta v       (v starts at zero)
    heavy_ball  v <- b v + S,          w <- w + eta v
    nesterov    v <- b v + S,          w <- w + eta (S + b v)

The last two are torch.optim.SGD on the gradient -S: FedAvgM of Hsu, Qi & Brown (2019), "Measuring
the Effects of Non-Identical Data Distribution for Federated Visual Classification". Their steady
step is 1 / (1 - b) times as long as that of ema.

With --server_momentum_warmup the decay in round t = 1, 2, ... is min(b, 1 - 1/t): none of the zero
that v starts from is left after the first round, and until b is reached the ema is the plain mean
of all updates so far.

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
    server_momentum_warmup: bool = False
    """Let the momentum grow with the rounds t = 1, 2, ...: min(b, 1 - 1/t), which is 0, 1/2, 2/3
    and so on up to --server_momentum."""

    def __post_init__(self) -> None:
        require(0 <= self.server_momentum < 1, "--server_momentum", self.server_momentum,
                "in [0, 1)")
        require(self.server_lr > 0, "--server_lr", self.server_lr, "> 0")

    @property
    def state(self) -> Mapping[str, float]:
        return {"momentum": 0.0}

    def momentum_in(self, number: int) -> float:
        """The decay b in a round, counted from 1."""
        if self.server_momentum_warmup:
            return min(self.server_momentum, 1 - 1 / number)
        return self.server_momentum

    def server_update(self, model: Tensor, state: Mapping[str, Tensor], mean: Mapping[str, Tensor],
                      context: ServerRound) -> None:
        b, v, s = self.momentum_in(context.number), state["momentum"], mean["delta"]
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

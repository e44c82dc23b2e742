"""FedAdam, FedYogi, FedAdagrad: an adaptive server optimizer on the mean update S.

    m <- b1 m + (1 - b1) S
    v <- b2 v + (1 - b2) S^2                 (Adam)
    v <- v - (1 - b2) S^2 sign(v - S^2)      (Yogi)
    v <- v + S^2                             (Adagrad)
    w <- w + eta m / (sqrt(v) + tau)

Reddi et al. (2021), "Adaptive Federated Optimization", Algorithm 2: no bias correction, m starts at
zero and v at tau^2. The default learning rates are the best on the grids of
configs/experiments/methods.yaml.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedrun.common.errors import require
from fedrun.strategies.base import ServerRound
from fedrun.strategies.fed_avg import FedAvg

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FedAdagrad(FedAvg):
    """Adagrad on the server, fed with the mean update (Reddi et al. 2021)."""

    server_lr: float = 1e-2
    """Server learning rate eta: roughly how far an element moves in a round."""
    server_beta1: float = 0.0
    """Decay of the server's first moment, in [0, 1)."""
    tau: float = 1e-5
    """Degree of adaptivity: added to the denominator; its square is the second moment's first
    value."""

    def __post_init__(self) -> None:
        require(self.server_lr > 0, "--server_lr", self.server_lr, "> 0")
        require(0 <= self.server_beta1 < 1, "--server_beta1", self.server_beta1,
                "in [0, 1)")
        require(self.tau > 0, "--tau", self.tau, "> 0")

    @property
    def state(self) -> Mapping[str, float]:
        return {"exp_avg": 0.0, "exp_avg_sq": self.tau**2}

    def second_moment(self, v: Tensor, s: Tensor) -> None:
        """Update v in place with the mean update s."""
        v.addcmul_(s, s)

    def server_update(self, model: Tensor, state: Mapping[str, Tensor], mean: Mapping[str, Tensor],
                      context: ServerRound) -> None:
        m, v, s = state["exp_avg"], state["exp_avg_sq"], mean["delta"]
        m.lerp_(s, 1 - self.server_beta1)
        self.second_moment(v, s)
        model.addcdiv_(m, v.sqrt().add_(self.tau), value=self.server_lr)


@dataclass(frozen=True)
class FedAdam(FedAdagrad):
    """Adam on the server, fed with the mean update (Reddi et al. 2021)."""

    server_lr: float = 3e-3
    """Server learning rate eta: roughly how far an element moves in a round."""
    server_beta1: float = 0.9
    """Decay of the server's first moment, in [0, 1)."""
    server_beta2: float = 0.99
    """Decay of the server's second moment, in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.server_beta2 < 1, "--server_beta2", self.server_beta2,
                "in [0, 1)")

    def second_moment(self, v: Tensor, s: Tensor) -> None:
        v.mul_(self.server_beta2).addcmul_(s, s, value=1 - self.server_beta2)


@dataclass(frozen=True)
class FedYogi(FedAdam):
    """Yogi on the server, fed with the mean update (Reddi et al. 2021)."""

    def second_moment(self, v: Tensor, s: Tensor) -> None:
        squared = s * s
        v.addcmul_(squared, (v - squared).sign_(), value=self.server_beta2 - 1)

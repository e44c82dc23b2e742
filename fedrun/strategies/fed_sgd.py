"""FedSGD: a client sends one gradient at the global model, and the server takes an AdamW step.

    g = sum_k n_k g_k / sum_k n_k,   w <- AdamW(w, g)

n_k is the number of tokens in client k's loss, so g is the gradient of the mean loss over the
batches of the whole cohort, and the run equals `central` on these batches. McMahan et al. (2017),
section 2, with AdamW (Loshchilov & Hutter 2019, Algorithm 2, as in torch.optim.AdamW) for SGD.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedrun.strategies.base import BoundExponents, ClientReport, ServerRound, Strategy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FedSGD(Strategy):
    """One gradient a client and round, one AdamW step (--lr) on the server: central in parallel."""

    inputs: ClassVar[tuple[str, ...]] = ("gradient",)

    @property
    def sums(self) -> Mapping[str, BoundExponents]:
        return {"gradient": BoundExponents(gradient=1)}

    @property
    def state(self) -> Mapping[str, float]:
        return {"exp_avg": 0.0, "exp_avg_sq": 0.0}

    def plan_weights(self, shard_tokens: Sequence[int], round_tokens: int) -> list[float]:
        return [1 / (len(shard_tokens) * round_tokens)] * len(shard_tokens)

    def client_weight(self, planned: float, report: ClientReport, entropy_reference: float
                      ) -> float:
        return planned * report.tokens

    def client_term(self, client: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (client["gradient"],)

    def server_update(self, model: Tensor, state: Mapping[str, Tensor], mean: Mapping[str, Tensor],
                      context: ServerRound) -> None:
        g, m, v, t = mean["gradient"], state["exp_avg"], state["exp_avg_sq"], context.number
        model.mul_(1 - context.lr * context.weight_decay)
        m.lerp_(g, 1 - context.beta1)
        v.mul_(context.beta2).addcmul_(g, g, value=1 - context.beta2)
        denominator = v.sqrt().div_(math.sqrt(1 - context.beta2**t)).add_(context.eps)
        model.addcdiv_(m, denominator, value=-context.lr / (1 - context.beta1**t))

"""What a client that has just trained reports, as the vectors that its term is made of."""

from __future__ import annotations

from torch import Tensor

from fedrun.aggregation.base import Aggregator
from fedrun.aggregation.blocks import residual_of
from fedrun.aggregation.exact import MOMENTS
from fedrun.aggregation.int8 import BLOCK
from fedrun.federation.client import Client
from fedrun.strategies.base import Strategy
from fedrun.training import averaged_moments
from fedrun.training.fisher import FisherEstimate


def reported_vectors(client: Client, strategy: Strategy, aggregator: Aggregator,
                     fisher: FisherEstimate | None) -> dict[str, Tensor]:
    """The vectors by name, (shared_size,) each; its trained `parameters` stand for its update
    `delta`.

    aggregator: of this round. fisher: of the client's training, for a method that asks for it.
    """
    vectors: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    averaged = aggregator.moments
    besides = {name: client.residual(name) for name in map(residual_of, aggregator.residuals)}
    if aggregator.moment_steps:
        besides["peaks"] = averaged_moments.peaks(client.optimizer, BLOCK)
    if averaged != MOMENTS and set(MOMENTS) & set(strategy.inputs):
        moments = client.optimizer.bias_corrected_moments(copy=True)  # it keeps using its own
    moments |= (reported := averaged_moments.take(client.optimizer, averaged))
    for name in strategy.inputs:
        if name == "delta":
            vectors["parameters"] = client.flat.shared
        elif name == "gradient":
            vectors[name] = client.flat.grad
        elif name == "fisher":
            assert fisher is not None
            vectors[name] = fisher.finish()[:client.flat.shared_size]
        else:
            vectors[name] = moments[name]
    return vectors | reported | besides

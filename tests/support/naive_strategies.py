"""Recorded client outputs, and a naive aggregation for every method: dictionaries of tensors in
float64, written from the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedrun.aggregation.bounds import Bounds
from fedrun.aggregation.exact import MOMENTS, ExactAggregator
from fedrun.aggregation.update import ServerUpdate
from fedrun.strategies import Strategy
from fedrun.strategies.base import ClientReport, ServerRound
from fedrun.strategies.fed_avg import FedAvg
from fedrun.strategies.fed_entropy import FedEntropy
from fedrun.strategies.fed_fisher import FedFisher
from fedrun.strategies.fed_momentum import DiLoCo, FedMomentum
from fedrun.strategies.fed_opt import FedAdagrad, FedAdam, FedYogi
from fedrun.strategies.fed_sgd import FedSGD

SHAPES = {"embedding": (30, 7), "in_proj": (5, 11), "A_log": (3,)}
SIZE = sum(math.prod(shape) for shape in SHAPES.values())
UPDATE, GRADIENT = 0.02, 16.0
ROUND_TOKENS = 1000
LR, BETA1, BETA2, WEIGHT_DECAY, EPS = 3e-3, 0.9, 0.999, 0.01, 1e-3

Dict = dict[str, Tensor]


@dataclass
class Output:
    """What a client did in one round, recorded in float64."""

    shard_tokens: int
    tokens: int
    entropy: float
    vectors: Dict  # by name: delta, gradient, fisher, exp_avg, exp_avg_sq


def record(clients: int, seed: int) -> list[Output]:
    """Outputs in the sizes that occur: updates below UPDATE, gradients over many powers of ten."""
    generator = torch.Generator().manual_seed(seed)

    def spread(power: int = 1) -> Tensor:
        sizes = 10.0 ** (-5 * torch.rand(SIZE, generator=generator, dtype=torch.float64))
        return (torch.randn(SIZE, generator=generator, dtype=torch.float64) * sizes) ** power

    return [Output(1000 + 300 * k, ROUND_TOKENS - 10 * k, 5 + 0.3 * k - 0.1 * (seed % 20), {
        "delta": (torch.rand(SIZE, generator=generator, dtype=torch.float64) * 2 - 1) * UPDATE,
        "gradient": spread(), "fisher": spread(2), "exp_avg": spread(), "exp_avg_sq": spread(2)})
        for k in range(clients)]


@dataclass
class Server:
    """A model under a strategy, as workers keep it."""

    strategy: Strategy
    dtype: torch.dtype
    clients: int
    moments: bool = False
    exact: bool = True
    model: Tensor = field(init=False)
    number: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(99)
        self.model = torch.randn(SIZE, generator=generator, dtype=torch.float64).to(self.dtype)
        self.state = {name: torch.full_like(self.model, value)
                      for name, value in self.strategy.state.items()}
        self.averaged = {n: torch.zeros_like(self.model) for n in ("exp_avg", "exp_avg_sq")}
        self.reference = self.strategy.first_entropy_reference(400, self.clients)

    def round(self, outputs: Sequence[Output], left_out: Sequence[int] = (),
              zeroed: Sequence[int] = ()) -> ExactAggregator:
        self.number += 1
        averaged = MOMENTS if self.moments else ()
        terms = ExactAggregator(self.strategy, SIZE, self.model, self.exact, averaged)
        terms.begin(Bounds(UPDATE, GRADIENT))
        planned = self.strategy.plan_weights([o.shard_tokens for o in outputs], ROUND_TOKENS)
        names = (*self.strategy.inputs, *averaged)
        for k, (output, plan) in enumerate(zip(outputs, planned, strict=True)):
            if k in left_out:
                continue
            weight = self.strategy.client_weight(
                plan, ClientReport(0, output.tokens, 0.0, output.entropy), self.reference)
            vectors = {n: output.vectors[n].to(self.dtype) for n in names}
            assert not terms.add(vectors, 0.0 if k in zeroed else weight)
        self.reference = self.strategy.next_entropy_reference([o.entropy for o in outputs])
        ServerUpdate(self.strategy, terms).apply(self.model, self.state,
                    ServerRound(self.number, LR, BETA1, BETA2, WEIGHT_DECAY, EPS), self.averaged)
        return terms


# ---- the naive references -----------------------------------------------------------------------

def split(vector: Tensor) -> Dict:
    parts = vector.split([math.prod(shape) for shape in SHAPES.values()])
    return {name: part.reshape(shape)
            for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}


def mean(outputs: Sequence[Output], weights: Sequence[float], vector: str) -> Dict:
    return {name: sum((p * split(o.vectors[vector])[name]
                       for p, o in zip(weights, outputs, strict=True)),
                      start=torch.zeros(())) / sum(weights)
            for name in SHAPES}


def by_samples(outputs: Sequence[Output]) -> list[float]:
    return [o.shard_tokens for o in outputs]


def by_tokens(outputs: Sequence[Output]) -> list[float]:
    return [o.tokens for o in outputs]


Rule = Callable[[Dict, Dict, Sequence[Output], int], None]
"""Changes (model, memory) in place; memory starts empty."""


def plain(weights: Callable[[Sequence[Output]], Sequence[float]]) -> Rule:
    def rule(model: Dict, memory: Dict, outputs: Sequence[Output], number: int) -> None:
        step = mean(outputs, weights(outputs), "delta")
        for name in model:
            model[name] = model[name] + step[name]
    return rule


def entropy(temperature: float) -> Rule:
    return plain(lambda outputs: torch.softmax(
        torch.tensor([-o.entropy / temperature for o in outputs], dtype=torch.float64), 0).tolist())


def momentum(form: str, eta: float, *by_round: float) -> Rule:
    """by_round: the decay in rounds 1, 2, ...; the last one is that of all later rounds."""
    def rule(model: Dict, memory: Dict, outputs: Sequence[Output], number: int) -> None:
        b = by_round[min(number, len(by_round)) - 1]
        s = mean(outputs, by_samples(outputs), "delta")
        for name in model:
            v = memory.get(name, torch.zeros_like(model[name]))
            v = b * v + ((1 - b) * s[name] if form == "ema" else s[name])
            memory[name] = v
            model[name] = model[name] + eta * (s[name] + b * v if form == "nesterov" else v)
    return rule


def adaptive(kind: str, eta: float, b1: float, b2: float, tau: float) -> Rule:
    """Reddi et al. (2021), Algorithm 2."""
    def rule(model: Dict, memory: Dict, outputs: Sequence[Output], number: int) -> None:
        s = mean(outputs, by_samples(outputs), "delta")
        for name in model:
            m = memory.get(f"m {name}", torch.zeros_like(model[name]))
            v = memory.get(f"v {name}", torch.full_like(model[name], tau**2))
            m = b1 * m + (1 - b1) * s[name]
            square = s[name] ** 2
            v = {"adam": b2 * v + (1 - b2) * square,
                 "yogi": v - (1 - b2) * square * torch.sign(v - square),
                 "adagrad": v + square}[kind]
            memory[f"m {name}"], memory[f"v {name}"] = m, v
            model[name] = model[name] + eta * m / (v.sqrt() + tau)
    return rule


def fisher(floor: float, relative: bool) -> Rule:
    def rule(model: Dict, memory: Dict, outputs: Sequence[Output], number: int) -> None:
        total = sum(o.shard_tokens for o in outputs)
        everywhere = torch.cat([f.flatten() for f in
                                mean(outputs, by_samples(outputs), "fisher").values()]).mean()
        phi = floor * float(everywhere) if relative else floor
        for name in model:
            up, down = torch.zeros_like(model[name]), torch.zeros_like(model[name])
            for o in outputs:
                f = split(o.vectors["fisher"])[name] + phi
                up += o.shard_tokens / total * f * split(o.vectors["delta"])[name]
                down += o.shard_tokens / total * f
            model[name] = model[name] + up / down
    return rule


def adamw(model: Dict, memory: Dict, outputs: Sequence[Output], number: int) -> None:
    """torch.optim.AdamW on the mean gradient; `memory` keeps the moments."""
    g = mean(outputs, by_tokens(outputs), "gradient")
    for name in model:
        p = torch.nn.Parameter(model[name].clone())
        p.grad = g[name]
        optimizer = torch.optim.AdamW([p], lr=LR, betas=(BETA1, BETA2), eps=EPS,
                                      weight_decay=WEIGHT_DECAY)
        if number > 1:
            optimizer.state[p] = {"step": torch.tensor(float(number - 1)),
                                  "exp_avg": memory[f"m {name}"], "exp_avg_sq": memory[f"v {name}"]}
        optimizer.step()
        memory[f"m {name}"] = optimizer.state[p]["exp_avg"]
        memory[f"v {name}"] = optimizer.state[p]["exp_avg_sq"]
        model[name] = p.detach()


CASES: dict[str, tuple[Strategy, Rule]] = {
    "fed_avg samples": (FedAvg(), plain(by_samples)),
    "fed_avg trained": (FedAvg("trained"), plain(by_tokens)),
    "fed_avg uniform": (FedAvg("uniform"), plain(lambda outputs: [1.0] * len(outputs))),
    "fed_momentum ema": (FedMomentum(), momentum("ema", 1.0, 0.9)),
    "fed_momentum heavy_ball": (FedMomentum(server_lr=0.5, momentum_form="heavy_ball"),
                                momentum("heavy_ball", 0.5, 0.9)),
    "diloco": (DiLoCo("samples", 0.9, 0.7, "nesterov"), momentum("nesterov", 0.7, 0.9)),
    "diloco warmup": (DiLoCo("samples", 0.6, 0.7, "nesterov", server_momentum_warmup=True),
                      momentum("nesterov", 0.7, 0.0, 1 / 2, 0.6)),
    "fed_adam": (FedAdam(), adaptive("adam", 3e-3, 0.9, 0.99, 1e-5)),
    "fed_yogi": (FedYogi(tau=1e-3), adaptive("yogi", 3e-3, 0.9, 0.99, 1e-3)),
    "fed_adagrad": (FedAdagrad(), adaptive("adagrad", 1e-2, 0.0, 0.0, 1e-5)),
    "fed_entropy": (FedEntropy(), entropy(1.0)),
    "fed_entropy sharp": (FedEntropy(temperature=0.25), entropy(0.25)),
    "fed_fisher absolute": (FedFisher(), fisher(1e-8, relative=False)),
    "fed_fisher relative": (FedFisher(fisher_floor=1e-2, fisher_floor_mode="relative"),
                            fisher(1e-2, relative=True)),
    "fed_sgd": (FedSGD(), adamw),
}

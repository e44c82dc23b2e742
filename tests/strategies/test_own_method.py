"""Methods that are not in the package: what they ask of a client is computed for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from fedrun.strategies import STRATEGIES
from fedrun.strategies.base import BoundExponents, FisherSettings, ServerRound, Strategy
from fedrun.strategies.fed_avg import FedAvg
from fedrun.strategies.fed_fisher import FedFisher
from tests.support.runs import Run


@dataclass(frozen=True)
class OwnFisher(FedAvg):
    """FedFisher, reimplemented on the base classes alone."""

    inputs: ClassVar[tuple[str, ...]] = ("delta", "fisher")

    @property
    def sums(self) -> Mapping[str, BoundExponents]:
        return {"weighted": BoundExponents(update=1, gradient=2),
                "information": BoundExponents(gradient=2)}

    def client_term(self, client: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        floored = client["fisher"] + 1e-8
        return floored * client["delta"], floored

    def server_update(self, model: Tensor, state: Mapping[str, Tensor], mean: Mapping[str, Tensor],
                      context: ServerRound) -> None:
        model.addcdiv_(mean["weighted"], mean["information"])


@dataclass(frozen=True)
class OwnSequenceFisher(OwnFisher):
    """The same with another estimate."""

    @property
    def fisher_settings(self) -> FisherSettings:
        return FisherSettings("sequence")


@dataclass(frozen=True)
class OwnMoments(FedAvg):
    """A step along the clients' mean first moment, as AdamW scales it."""

    inputs: ClassVar[tuple[str, ...]] = ("delta", "exp_avg", "exp_avg_sq")

    @property
    def sums(self) -> Mapping[str, BoundExponents]:
        return {"delta": BoundExponents(update=1), "exp_avg": BoundExponents(update=1)}

    def client_term(self, client: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        step = client["exp_avg"] / (client["exp_avg_sq"].sqrt() + 1e-8)
        return client["delta"], step * -LR

    def server_update(self, model: Tensor, state: Mapping[str, Tensor], mean: Mapping[str, Tensor],
                      context: ServerRound) -> None:
        torch.testing.assert_close(mean["delta"], mean["exp_avg"], rtol=1e-6, atol=1e-12)
        model.add_(mean["exp_avg"])


@dataclass(frozen=True)
class OwnGradient(Strategy):
    """Plain SGD on the mean gradient."""

    inputs: ClassVar[tuple[str, ...]] = ("gradient",)

    @property
    def sums(self) -> Mapping[str, BoundExponents]:
        return {"gradient": BoundExponents(gradient=1)}

    def plan_weights(self, shard_tokens: Sequence[int], round_tokens: int) -> list[float]:
        return [1 / len(shard_tokens)] * len(shard_tokens)

    def client_term(self, client: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (client["gradient"],)

    def server_update(self, model: Tensor, state: Mapping[str, Tensor], mean: Mapping[str, Tensor],
                      context: ServerRound) -> None:
        model.sub_(mean["gradient"], alpha=0.5)


@dataclass(frozen=True)
class OwnMixture(OwnGradient):
    """A gradient beside training, which no client computes."""

    inputs: ClassVar[tuple[str, ...]] = ("delta", "gradient")


LR = 2e-3  # of the runs of these tests
METHODS = {"own_fisher": OwnFisher, "own_sequence_fisher": OwnSequenceFisher,
           "own_moments": OwnMoments, "own_gradient": OwnGradient, "own_mixture": OwnMixture}


@pytest.fixture(autouse=True)
def own_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, method in METHODS.items():
        monkeypatch.setitem(STRATEGIES, name, method)


FLAGS = ("--rounds", 3, "--num_clients", 2, "--dtype", "fp64")


@pytest.mark.parametrize(("own", "theirs"), [
    ("own_fisher", ("fed_fisher",)),
    ("own_sequence_fisher", ("fed_fisher", "--fisher", "sequence"))])
def test_fisher_diagonals_are_estimated_for_whoever_asks(run_here: Run, own: str,
                                                         theirs: tuple[str, ...]) -> None:
    ours = run_here(own, *FLAGS, name="own")
    assert ours.code == 0, ours.output
    assert ours.bits == run_here(*theirs, *FLAGS, name="theirs").bits


@pytest.mark.parametrize("moments", ["keep", "reset", "average"])
def test_moments_are_reported_and_kept(run_here: Run, moments: str) -> None:
    """With no weight decay, a first AdamW step is what its moments say; and reading them does not
    change the client's own."""
    rounds = ("--rounds", 1 if moments == "keep" else 2)
    flags = (*FLAGS, *rounds, "--weight_decay", 0, "--client_moments", moments)
    found = run_here("own_moments", *flags, name="own")
    assert found.code == 0, found.output
    plain = run_here("fed_avg", *flags, name="plain")
    for name, tensor in plain.model.items():
        torch.testing.assert_close(found.model[name], tensor, rtol=1e-6, atol=1e-10)


def test_a_gradient_is_taken_at_the_global_model(run_here: Run) -> None:
    assert not OwnGradient().trains
    found = run_here("own_gradient", *FLAGS)
    assert found.code == 0, found.output
    assert "gradient_norms" in found.history[-1]
    assert found.history[-1]["server_val_ppl"] < found.history[0]["server_val_ppl"]


def test_what_no_client_computes_is_refused(run_here: Run) -> None:
    found = run_here("own_mixture", *FLAGS)
    assert found.code == 2
    assert "gradient alone" in found.output
    assert FedFisher().fisher_settings == FisherSettings()

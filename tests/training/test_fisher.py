"""The Fisher estimates against torch.func on a model small enough to differentiate by sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from fedrun.model.config import ModelConfig
from fedrun.model.mamba2 import Mamba2LM
from fedrun.model.names import ParameterNames
from fedrun.strategies.base import FisherSettings
from fedrun.training.fisher import FisherEstimate
from fedrun.training.params import FlatParams

BATCH, LENGTH, VOCAB = 6, 9, 13


class Bigram(nn.Module):
    """A language model that torch.func can differentiate, with Mamba2LM's compute_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 4, dtype=torch.float64)
        self.mixer = nn.Linear(4, VOCAB, dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        """Summed loss of (b, l) token ids."""
        logits = self.mixer(torch.tanh(self.embedding(tokens[:, :-1])))
        return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")

    def compute_grad(self, tokens: Tensor) -> tuple[Tensor, int]:
        self.zero_grad(set_to_none=False)
        loss, count = self(tokens), tokens[:, 1:].numel()
        (loss / count).backward()
        return loss.detach(), count


@pytest.fixture
def model() -> Bigram:
    torch.manual_seed(5)
    return Bigram()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(VOCAB, (BATCH, LENGTH), generator=generator) for _ in range(3)]


def gradients(model: nn.Module, groups: Tensor, mean: bool) -> Tensor:
    """(groups, size): the gradient of each group's loss, summed or averaged over its tokens.

    groups: (groups, sequences, length). Parameters are sorted by name, as in FlatParams.
    """
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(p: dict[str, Tensor], tokens: Tensor) -> Tensor:
        value: Tensor = functional_call(model, p, (tokens,))
        return value / tokens[:, 1:].numel() if mean else value

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, groups)
    return torch.cat([found[name].flatten(1) for name in sorted(found)], dim=1)


def estimate(model: Any, settings: FisherSettings) -> Tensor:
    flat = FlatParams(model)
    fisher = FisherEstimate(flat, settings)
    fisher.begin()
    for batch in batches():
        loss, tokens = fisher.gradient(model, batch)
        assert tokens == BATCH * (LENGTH - 1)
        torch.testing.assert_close(loss, model(batch).detach(), rtol=1e-12, atol=0)
        expected = gradients(model, batch[None], mean=True)[0]
        torch.testing.assert_close(flat.grad, expected, rtol=1e-9, atol=1e-15)
    return fisher.finish().clone()


def test_the_batch_estimate_is_the_mean_of_squared_batch_gradients(model: Any) -> None:
    expected = torch.stack([gradients(model, b[None], mean=True)[0] ** 2 for b in batches()])
    found = estimate(model, FisherSettings())
    torch.testing.assert_close(found, expected.mean(0), rtol=1e-9, atol=0)


def test_the_sequence_estimate_is_the_mean_of_squared_sequence_gradients(model: Any) -> None:
    single = torch.cat(batches())[:, None]
    expected = (gradients(model, single, mean=False) ** 2).mean(0)
    torch.testing.assert_close(estimate(model, FisherSettings("sequence")), expected,
                               rtol=1e-9, atol=0)


@pytest.mark.parametrize("microbatches", [2, 3, 6])
def test_the_corrected_estimate_is_its_formula_over_microbatches(
        model: Bigram, microbatches: int) -> None:
    size = BATCH // microbatches
    expected = []
    for batch in batches():
        g = gradients(model, batch.unflatten(0, (microbatches, size)), mean=True)
        expected.append((g**2).mean(0) + (size - 1) * g.var(0, correction=1))
    found = estimate(model, FisherSettings("corrected", microbatches))
    torch.testing.assert_close(found, torch.stack(expected).mean(0), rtol=1e-9, atol=0)


def test_the_corrected_estimate_is_unbiased_and_the_batch_estimate_is_not(model: Any) -> None:
    """In expectation over batches: with microbatches of one the estimate is exact, and drawing
    microbatches of three from the same sequences comes near it."""
    generator = torch.Generator().manual_seed(1)
    pool = torch.randint(VOCAB, (40, LENGTH), generator=generator)
    exact = (gradients(model, pool[:, None], mean=True) ** 2).mean(0)
    flat = FlatParams(model)
    corrected, batch = (FisherEstimate(flat, settings) for settings in (
        FisherSettings("corrected"), FisherSettings("batch")))
    for _ in range(300):
        rows = pool[torch.randint(len(pool), (BATCH,), generator=generator)]
        corrected.gradient(model, rows)
        batch.gradient(model, rows)
    total = exact.sum()
    assert (corrected.finish().sum() / total).item() == pytest.approx(1, abs=0.1)
    assert batch.finish().sum() / total < 0.5  # the bias that `corrected` removes


def test_scope_is_zero_outside_the_mixers(model: Bigram) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model
            self.names = ParameterNames(mixers=frozenset({"layers.mixer.weight"}))

        def compute_grad(self, tokens: Tensor) -> tuple[Tensor, int]:
            return model.compute_grad(tokens)

    named: Any = Named()
    flat = FlatParams(named)
    fisher = FisherEstimate(flat, FisherSettings(scope="mixers"))
    fisher.gradient(named, batches()[0])
    values = dict(flat.views(fisher.finish()))
    assert not values["layers.embedding.weight"].any()
    assert values["layers.mixer.weight"].all()


@pytest.mark.parametrize("tied", [True, False])
def test_scope_untied_leaves_out_a_tied_embedding_alone(tied: bool) -> None:
    """The floor then makes it a plain average; an embedding and a head of their own are weighted
    like everything else."""
    language_model = Mamba2LM(ModelConfig(d_model=16, d_state=4, headdim=8, tie_embeddings=tied),
                              VOCAB)
    language_model.init_weights(0)
    flat = FlatParams(language_model)
    fisher = FisherEstimate(flat, FisherSettings(scope="untied"))
    fisher.gradient(language_model, batches()[0])
    without = {name for name, value in flat.views(fisher.finish()) if not value.any()}
    assert without == ({"backbone.embedding.weight"} if tied else set())


def test_the_embedding_and_head_of_mamba_count_once() -> None:
    language_model = Mamba2LM(ModelConfig(d_model=16, d_state=4, headdim=8), VOCAB)
    language_model.init_weights(0)
    flat = FlatParams(language_model.double())
    fisher = FisherEstimate(flat, FisherSettings())
    fisher.gradient(language_model, batches()[0])
    diagonal = fisher.finish().clone()
    language_model.compute_grad(batches()[0])
    assert torch.equal(diagonal, flat.grad**2)
    assert flat.size == sum(p.numel() for p in language_model.parameters())

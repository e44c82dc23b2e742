"""Generation with the recurrent step against the forward pass over whole sequences."""

from __future__ import annotations

import pytest
import torch

from fedrun.model.config import ModelConfig
from fedrun.model.generate import generate
from fedrun.model.mamba2 import Mamba2LM

VOCAB = 61


@pytest.fixture(params=[{}, {"ngroups": 2}, {
    "tie_embeddings": False, "proj_bias": True, "conv_bias": False, "norm_eps": 1e-2,
    "dt_lower": 0.01, "dt_upper": 0.05}], ids=["1 group", "2 groups", "unusual"])
def model(request: pytest.FixtureRequest) -> Mamba2LM:
    config = ModelConfig(n_layer=2, d_model=32, d_state=16, headdim=16, **request.param)
    lm = Mamba2LM(config, VOCAB)
    lm.init_weights(0)
    return lm.double()


def sequences(length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (3, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("prompt", [1, 2, 70])
def test_steps_equal_the_forward(model: Mamba2LM, prompt: int) -> None:
    """Prompts shorter than the convolution and longer than a chunk."""
    ids = sequences(prompt + 8)
    with torch.no_grad():
        expected = model(ids)
    logits, state = model.prefill(ids[:, :prompt])
    for t in range(prompt, ids.shape[1]):
        torch.testing.assert_close(logits, expected[:, t - 1], rtol=1e-10, atol=1e-12)
        logits = model.step(ids[:, t], state)
    torch.testing.assert_close(logits, expected[:, -1], rtol=1e-10, atol=1e-12)


def test_greedy_tokens_are_those_of_the_forward(model: Mamba2LM) -> None:
    ids = sequences(5)
    got = generate(model, ids, max_new_tokens=12)
    for t in range(12):
        with torch.no_grad():
            best = model(torch.cat([ids, got[:, :t]], dim=1))[:, -1].argmax(-1)
        assert torch.equal(got[:, t], best)


def test_the_state_does_not_grow(model: Mamba2LM) -> None:
    _, short = model.prefill(sequences(1))
    _, long = model.prefill(sequences(50))
    model.step(sequences(1)[:, 0], long)
    shapes = [[tensor.shape for tensor in layer] for layer in short]
    assert shapes == [[tensor.shape for tensor in layer] for layer in long]


def test_sampling_follows_the_generator_and_top_k(model: Mamba2LM) -> None:
    def sample(seed: int, top_k: int = 0) -> torch.Tensor:
        return generate(model, sequences(5), 20, temperature=5.0, top_k=top_k,
                        generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert torch.equal(sample(1, top_k=1), generate(model, sequences(5), 20))

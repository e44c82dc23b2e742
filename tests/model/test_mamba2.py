"""The model against transformers, its initialisation, its losses and gradients."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fedrun.model import kernels
from fedrun.model.config import ModelConfig
from fedrun.model.conv import causal_conv_silu
from fedrun.model.convert import to_transformers, to_transformers_config
from fedrun.model.mamba2 import Mamba2LM
from fedrun.model.norm import rms_norm

SMALL = ModelConfig(n_layer=2, d_model=64, d_state=32, headdim=16)
# Settings of models from other libraries, which runs have only if they start from such a model.
UNUSUAL = ModelConfig(n_layer=2, d_model=64, d_state=32, headdim=16, tie_embeddings=False,
                      proj_bias=True, conv_bias=False, norm_eps=1e-2, dt_lower=0.01, dt_upper=0.05)
VOCAB = 199


def build(config: ModelConfig = SMALL, seed: int = 0, **kwargs: torch.dtype) -> Mamba2LM:
    model = Mamba2LM(config, VOCAB, **kwargs)
    model.init_weights(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("proj.bias"):  # their initial value is zero
                p.copy_(torch.linspace(-1, 1, p.numel()))
    return model


def grad_of(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def tokens(batch: int, length: int, vocab: int = VOCAB) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    return torch.randint(vocab, (batch, length), generator=generator)


@pytest.mark.parametrize("config", [
    SMALL, ModelConfig(n_layer=1, d_model=64, d_state=32, headdim=16, ngroups=2), UNUSUAL,
    ModelConfig(n_layer=1, d_model=64, d_state=32, headdim=16, dt_lower=0.02)],
    ids=["2 layers", "2 groups", "unusual", "one limit"])
@pytest.mark.parametrize("length", [16, 100])
def test_logits_and_gradients_equal_transformers(config: ModelConfig, length: int) -> None:
    transformers = pytest.importorskip("transformers")
    ours = build(config)
    theirs = transformers.Mamba2ForCausalLM(to_transformers_config(config, VOCAB)).eval()
    theirs.load_state_dict(to_transformers(ours.state_dict()))
    ids = tokens(2, length)
    torch.testing.assert_close(ours(ids), theirs(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)

    loss_sum, count = ours.loss(ids)
    (loss_sum / count).backward()
    theirs(ids, labels=ids, use_cache=False).loss.backward()
    names = to_transformers(dict(ours.named_parameters()))
    references = dict(theirs.named_parameters())
    assert names.keys() == references.keys()
    for name, parameter in names.items():
        assert parameter.grad is not None
        error = (parameter.grad - references[name].grad).abs().max()
        assert error <= 1e-5 * references[name].grad.abs().max(), name


def test_names_and_shapes_are_those_of_mamba_ssm() -> None:
    model = Mamba2LM(ModelConfig(n_layer=1), 50257)
    i, conv = 1024, 1280
    layer = "backbone.layers.0"
    expected = {
        "backbone.embedding.weight": (50257, 512),
        f"{layer}.mixer.dt_bias": (16,), f"{layer}.mixer.A_log": (16,), f"{layer}.mixer.D": (16,),
        f"{layer}.mixer.in_proj.weight": (i + conv + 16, 512),
        f"{layer}.mixer.conv1d.weight": (conv, 1, 4), f"{layer}.mixer.conv1d.bias": (conv,),
        f"{layer}.mixer.norm.weight": (i,), f"{layer}.mixer.out_proj.weight": (512, i),
        f"{layer}.norm.weight": (512,), "backbone.norm_f.weight": (512,)}
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected
    assert model.state_dict().keys() == {*expected, "lm_head.weight"}
    assert model.lm_head.weight is model.backbone.embedding.weight


@pytest.mark.parametrize(("layers", "millions"), [(1, 27.45), (2, 29.17), (4, 32.61)])
def test_parameter_counts_of_the_presets(layers: int, millions: float) -> None:
    with torch.device("meta"):
        model = Mamba2LM(ModelConfig(n_layer=layers), 50257)
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 2) == millions


def test_initialisation_has_the_documented_distributions() -> None:
    config = ModelConfig(n_layer=4, d_model=256, d_state=64, headdim=4)  # 128 heads a layer
    model = build(config)
    embedding = model.backbone.embedding.weight
    assert abs(embedding.std() - 0.02) < 0.0005
    assert abs(embedding.mean()) < 0.0005

    def uniform(values: torch.Tensor, low: float, high: float) -> None:
        """In range, and mean and deviation of a uniform within 5 standard errors or so."""
        assert low <= values.min()
        assert values.max() <= high
        tolerance = 3 * (high - low) / math.sqrt(values.numel())
        assert abs(values.mean() - (low + high) / 2) < tolerance
        assert abs(values.std() - (high - low) / math.sqrt(12)) < tolerance

    mixers: list[Any] = [block.mixer for block in model.backbone.layers]
    uniform(torch.cat([m.A_log.exp() for m in mixers]), 1 - 1e-5, 16 + 1e-5)
    dt = torch.cat([F.softplus(m.dt_bias) for m in mixers])
    uniform(dt.log(), math.log(1e-3) - 1e-4, math.log(1e-1) + 1e-4)
    for mixer in mixers:
        uniform(mixer.in_proj.weight, -1 / 16, 1 / 16)  # 1 / sqrt(fan-in)
        uniform(mixer.out_proj.weight, -1 / math.sqrt(512 * 4), 1 / math.sqrt(512 * 4))
        uniform(mixer.conv1d.weight, -0.5, 0.5)
        uniform(mixer.conv1d.bias, -0.5, 0.5)
        assert (mixer.D == 1).all()
        assert (mixer.norm.weight == 1).all()
    assert torch.equal(model.backbone.norm_f.weight, torch.ones(256))


def test_the_seed_decides_the_weights() -> None:
    first, again, other = build(seed=3), build(seed=3), build(seed=4)
    torch.testing.assert_close(first.state_dict(), again.state_dict(), rtol=0, atol=0)
    assert not torch.equal(first.backbone.embedding.weight, other.backbone.embedding.weight)


def test_loss_and_entropy_equal_the_logits_formulas() -> None:
    model, ids = build().double(), tokens(3, 20)
    with torch.no_grad():
        log_p = torch.log_softmax(model(ids)[:, :-1], dim=-1)
    loss, count = model.loss(ids)
    assert loss.dtype == torch.float64
    assert count == 57
    expected = -log_p.gather(2, ids[:, 1:, None]).sum()
    torch.testing.assert_close(loss.detach(), expected)
    entropy, count = model.entropy(ids)
    assert count == 57
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum())


@pytest.mark.parametrize("config", [SMALL, UNUSUAL], ids=["usual", "unusual"])
def test_gradients_are_written_in_place_to_a_flat_buffer(config: ModelConfig) -> None:
    """Whatever the buffer held before is overwritten, even nan, in rows of unseen tokens too."""
    reference, model = build(config).double(), build(config).double()
    parameters = list(model.parameters())
    flat = torch.full((sum(p.numel() for p in parameters),), torch.nan, dtype=torch.float64)
    offset = 0
    for p in parameters:
        p.grad = flat[offset:offset + p.numel()].view(p.shape)
        offset += p.numel()
    ids = tokens(20, 20, VOCAB - 50)  # several chunks of the head
    model.compute_grad(ids)
    loss, count = reference.loss(ids)
    (loss / count).backward()
    expected = torch.cat([grad_of(p).flatten() for p in reference.parameters()])
    torch.testing.assert_close(flat, expected, rtol=1e-9, atol=1e-14)


def test_a_head_of_its_own_is_drawn_last_and_changes_nothing_else() -> None:
    tied, untied = build(), build(dataclasses.replace(SMALL, tie_embeddings=False))
    assert untied.lm_head.weight is not untied.backbone.embedding.weight
    ours = dict(untied.named_parameters())
    head = ours.pop("lm_head.weight").detach()
    for name, p in tied.named_parameters():
        assert torch.equal(ours.pop(name), p), name
    assert ours == {}
    assert 0.12 < head.max() <= 1 / 8, "uniform within 1 / sqrt(d_model)"
    assert -1 / 8 <= head.min() < -0.12
    for config in (SMALL, UNUSUAL):
        count = sum(p.numel() for p in Mamba2LM(config, VOCAB).parameters())
        assert config.parameters(VOCAB) == count


@pytest.mark.parametrize("config", [SMALL, UNUSUAL], ids=["usual", "unusual"])
def test_compute_grad_equals_backward_of_the_mean_loss(config: ModelConfig) -> None:
    reference, model, ids = build(config).double(), build(config).double(), tokens(3, 20)
    loss, count = reference.loss(ids)
    (loss / count).backward()
    got, got_count = model.compute_grad(ids)
    torch.testing.assert_close(got, loss.detach())
    assert got_count == count
    assert not got.requires_grad
    model.compute_grad(ids)  # overwrites the first one's gradients
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-14)


def test_norm_and_convolution_have_the_gradients_of_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, z, weight = normal(2, 3, 8), normal(2, 3, 8), normal(8)
    window, taps, bias = normal(2, 8, 6), normal(6, 1, 4), normal(6)

    def norm_formula(gated: torch.Tensor) -> torch.Tensor:
        parts = gated.view(2, 3, 2, 4)
        return (parts / (parts ** 2).mean(-1, keepdim=True).add(1e-5).sqrt()).flatten(2) * weight

    def convolution_formula() -> torch.Tensor:
        summed = [sum(window[:, t + k] * taps[:, 0, k] for k in range(4)) + bias for t in range(5)]
        return torch.stack([y * torch.sigmoid(y) for y in summed], dim=1)

    for got, expected, leaves in (
            (rms_norm(x, weight, None, 2), norm_formula(x), (x, weight)),
            (rms_norm(x, weight, z, 2), norm_formula(x * z * torch.sigmoid(z)), (x, weight, z)),
            (causal_conv_silu(window, taps, bias), convolution_formula(), (window, taps, bias))):
        torch.testing.assert_close(got, expected)
        direction = normal(*got.shape).detach()
        torch.testing.assert_close(torch.autograd.grad(got, leaves, direction),
                                   torch.autograd.grad(expected, leaves, direction))


def test_the_norm_of_a_gpu_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has one kernel for it, torch's own norm takes the place of ours."""
    generator = torch.Generator().manual_seed(0)
    x, weight, z = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
                    for shape in ((2, 3, 8), (8,), (2, 3, 8)))
    found = []
    for theirs in (False, True):
        monkeypatch.setattr(kernels, "has_rms_norm", lambda x, theirs=theirs: theirs)
        results = [rms_norm(x, weight, eps=0.5), rms_norm(x, weight, z),
                   rms_norm(x, weight, None, 2)]
        found.append([*results, *torch.autograd.grad(results[0].square().sum(), (x, weight))])
        assert ("_RMSNorm" in str(results[0].grad_fn)) is not theirs
    for ours, other in zip(*found, strict=True):
        torch.testing.assert_close(ours, other)


def test_bf16_products_stay_close_to_fp32() -> None:
    exact, low, ids = build(), build(compute_dtype=torch.bfloat16), tokens(2, 100)
    for model in (exact, low):
        loss, count = model.loss(ids)
        (loss / count).backward()
    for ours, theirs in zip(low.parameters(), exact.parameters(), strict=True):
        got, expected = grad_of(ours), grad_of(theirs)
        assert ours.dtype == got.dtype == torch.float32
        assert 0 < (got - expected).norm() / expected.norm() < 0.05

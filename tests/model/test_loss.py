"""The fused head against the plain formula in float64 and against torch's own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedrun.model import loss as loss_module
from fedrun.model.loss import linear_cross_entropy, predictive_entropy

CHUNK_TOKENS = loss_module.chunk_tokens(torch.empty(1, 16), torch.float64)


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks so small that a small vocabulary has several, the last one ragged."""
    monkeypatch.setitem(loss_module.BLOCK_ROWS, "cpu", 40)


def example(tokens: int, dtype: torch.dtype = torch.float64, width: int = 16,
            ) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(97, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(97, (tokens,), generator=generator)
    return (hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets, reduction="sum")


@pytest.mark.parametrize("tokens", [1, CHUNK_TOKENS, CHUNK_TOKENS + 3, 2 * CHUNK_TOKENS + 1])
def test_loss_and_gradients_equal_the_formula(tokens: int) -> None:
    hidden, weight, targets = example(tokens)
    got = linear_cross_entropy(hidden, weight, targets)
    expected = plain(hidden, weight, targets)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    scale = 3.0  # the forward pass computes the gradients: the backward pass has to scale them
    torch.testing.assert_close(torch.autograd.grad(scale * got, (hidden, weight)),
                               torch.autograd.grad(scale * expected, (hidden, weight)),
                               rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("matmul_dtype", "tolerance"), [
    (torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("tokens", [3, 120, 128, 1000])
def test_logits_stored_in_the_gradient_buffer(
        monkeypatch: pytest.MonkeyPatch, matmul_dtype: torch.dtype, tolerance: float, tokens: int
        ) -> None:
    """The first chunk's logits fit into the weight-gradient buffer, row by row."""
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 256)
    dtype = torch.float32 if matmul_dtype == torch.bfloat16 else matmul_dtype
    hidden, weight, targets = example(tokens, dtype, width=128)
    with torch.no_grad():
        weight.mul_(0.1)
    row = weight.shape[1] * weight.itemsize
    assert loss_module.chunk_tokens(weight, matmul_dtype, add=False) * matmul_dtype.itemsize == row
    got = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, matmul_dtype),
                              (hidden, weight))
    expected = torch.autograd.grad(plain(hidden, weight, targets), (hidden, weight))
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < tolerance


def test_equals_torchs_linear_cross_entropy() -> None:
    hidden, weight, targets = example(300, torch.float32)
    got = linear_cross_entropy(hidden, weight, targets)
    theirs = F.linear_cross_entropy(hidden, weight, targets, reduction="sum")
    torch.testing.assert_close(got, theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(got, (hidden, weight)),
                               torch.autograd.grad(theirs, (hidden, weight)),
                               rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_only_one_gradient_is_needed(wanted: str) -> None:
    hidden, weight, targets = example(10)
    leaf = {"hidden": hidden, "weight": weight}[wanted]
    for other in (hidden, weight):
        other.requires_grad_(other is leaf)
    got, = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), leaf)
    expected, = torch.autograd.grad(plain(hidden, weight, targets), leaf)
    torch.testing.assert_close(got, expected)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of all matrix products that the head computes, in order."""
    made: list[torch.Size] = []

    def counted(work: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            made.append(kwargs["out"].shape)
            return work(*args, **kwargs)
        return run

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, counted(getattr(torch, name)))
    return made


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("width", [16, 128])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_without_gradients_the_head_computes_the_logits_only(
        mode: Callable[[], AbstractContextManager[None]], width: int, offset: float,
        products: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves that require gradients, as an evaluation's parameters do: one product a block of the
    vocabulary against three, to the same bits. Logits that need a shift are computed again."""
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 256)
    monkeypatch.setattr(loss_module, "_scratch", loss_module._Scratch())
    hidden, weight, targets = example(300, torch.float32, width)
    with torch.no_grad():
        hidden[:, 0], weight[:, 0] = 1.0, weight[:, 0] + offset
    with mode():
        evaluated = linear_cross_entropy(hidden, weight, targets)
    blocks = {40, 97 % 40}  # rows of the vocabulary: every product is one of logits
    assert {rows for rows, _ in products} == blocks
    of_evaluation = len(products)
    trained = linear_cross_entropy(hidden, weight, targets)  # in memory that the mode left usable
    assert trained.item() == evaluated.item()
    of_training = len(products) - of_evaluation
    ours, theirs = (3, 5) if offset else (1, 3)
    assert of_training * ours == of_evaluation * theirs
    assert trained.requires_grad
    assert not evaluated.requires_grad


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("offset", [-300.0, 0.0, 300.0])
def test_logits_of_any_size(scale: float, offset: float) -> None:
    """Large, all very low or all very high logits, which overflow exp unless they are shifted."""
    hidden, weight, targets = example(70, torch.float32)
    with torch.no_grad():
        weight.mul_(scale)
        hidden[:, 0] = 1.0
        weight[:, 0] += offset
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
    loss = plain(exact[0], exact[1], targets)
    references = torch.autograd.grad(loss, exact)

    def errors(loss_of: Callable[..., Tensor]) -> list[float]:
        got = loss_of(hidden, weight, targets)
        torch.testing.assert_close(got.double(), loss, rtol=1e-5, atol=1e-3)
        gradients = torch.autograd.grad(got, (hidden, weight))
        return [float((ours - reference).norm() / reference.norm())
                for ours, reference in zip(gradients, references, strict=True)]

    for ours, of_fp32 in zip(errors(linear_cross_entropy), errors(plain), strict=True):
        assert ours < 3 * of_fp32 + 1e-6


def test_improbable_targets_have_a_finite_loss() -> None:
    """A probability that underflows must not give an infinite loss."""
    hidden, weight, targets = example(5, torch.float32)
    with torch.no_grad():
        hidden.mul_(100.0)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets),
                               plain(hidden, weight, targets), rtol=1e-5, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets),
                                   plain(hidden, weight, targets), rtol=1e-5, atol=0)


def test_bf16_products_stay_close() -> None:
    hidden, weight, targets = example(600, torch.float32)
    got = linear_cross_entropy(hidden, weight, targets, torch.bfloat16)
    exact = plain(hidden, weight, targets)
    assert got.dtype == torch.float32
    assert 0 < abs(got - exact) / exact < 2e-3
    pairs = zip(torch.autograd.grad(got, (hidden, weight)),
                torch.autograd.grad(exact, (hidden, weight)), strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == torch.float32
        assert 0 < (ours - theirs).norm() / theirs.norm() < 2e-2


@pytest.mark.parametrize("tokens", [1, CHUNK_TOKENS + 3])
def test_entropy_equals_the_formula(tokens: int) -> None:
    hidden, weight, _ = example(tokens)
    p = torch.softmax(hidden @ weight.T, dim=-1)
    torch.testing.assert_close(predictive_entropy(hidden, weight), -(p * p.log()).sum())


def test_entropy_of_a_certain_prediction_is_zero() -> None:
    hidden, weight, _ = example(5, torch.float32)
    entropy = predictive_entropy(hidden * 1000, weight)
    torch.testing.assert_close(entropy, torch.zeros(()), atol=1e-5, rtol=0)

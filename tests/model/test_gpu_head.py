"""The head of a GPU, run on the CPU, against the plain formula in float64 and the CPU's head."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedrun.model import gpu_head
from fedrun.model.gpu_head import cross_entropy, cross_entropy_gradients, exponentiate
from fedrun.model.loss import linear_cross_entropy
from tests.support.launches import Launches, fp32_products_of_bf16
from tests.support.runs import execute

CHUNK = 64
VOCAB = 97


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gpu_head, "CHUNK_TOKENS", CHUNK)
    with fp32_products_of_bf16():
        yield


def example(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 32, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, 32, generator=generator, dtype=torch.float64) / 4
    targets = torch.randint(VOCAB, (tokens,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), targets


def formula(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float
            ) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and both gradients of scale * loss, in float64."""
    leaves = [t.double().requires_grad_() for t in (hidden, weight)]
    loss = F.cross_entropy(leaves[0] @ leaves[1].T, targets, reduction="sum")
    grad_hidden, grad_weight = torch.autograd.grad(scale * loss, leaves)
    return loss.detach(), grad_hidden, grad_weight


@pytest.mark.parametrize("tokens", [1, CHUNK, CHUNK + 3, 2 * CHUNK + 1])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("dtype", "matmul_dtype", "tolerance"), [
    (torch.float64, torch.float64, 1e-12), (torch.float32, torch.float32, 1e-6),
    (torch.float32, torch.bfloat16, 1e-2)])
def test_loss_and_gradients_equal_the_formula(tokens: int, add: bool, dtype: torch.dtype,
                                              matmul_dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, targets = example(tokens, dtype)
    grad_weight = torch.ones_like(weight) if add else torch.full_like(weight, torch.nan)
    loss, grad_hidden = cross_entropy_gradients(hidden, weight, targets, matmul_dtype, 0.25,
                                                grad_weight, add)
    assert loss.dtype == grad_hidden.dtype == dtype
    expected, *gradients = formula(hidden, weight, targets, 0.25)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    for ours, theirs in zip((grad_hidden, grad_weight - int(add)), gradients, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < tolerance
    assert cross_entropy(hidden, weight, targets, matmul_dtype).item() == loss.item()


def test_an_older_torch_adds_the_products_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.10, addmm took no fp32 sum for bf16 products."""
    hidden, weight, targets = example(3 * CHUNK, torch.float32)
    found = []
    for adds in (False, True):
        monkeypatch.setattr(gpu_head, "ADDS_TO_FP32", adds)
        grad_weight = torch.empty_like(weight)
        cross_entropy_gradients(hidden, weight, targets, torch.bfloat16, 1.0, grad_weight, False)
        found.append(grad_weight)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("offset", [-300.0, 0.0, 300.0])
def test_the_same_as_on_a_cpu(offset: float) -> None:
    """Very low and very high logits too, which overflow exp unless they are shifted."""
    hidden, weight, targets = example(100, torch.float32)
    hidden[:, 0], weight[:, 0] = 1.0, weight[:, 0] + offset
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = linear_cross_entropy(leaves[0], leaves[1], targets)
    grad_weight = torch.empty_like(weight)
    ours, grad_hidden = cross_entropy_gradients(hidden, weight, targets, torch.float32, 1.0,
                                                grad_weight, False)
    torch.testing.assert_close(ours, loss.detach(), rtol=1e-4, atol=0)
    theirs = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close((grad_hidden, grad_weight), theirs, rtol=1e-3, atol=2e-4)


def test_bf16_exponentials_are_summed_in_fp32() -> None:
    """A sum rounded to bf16 is off by up to 2^-9, and the loss of each token with it."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 3000, generator=generator).to(torch.bfloat16)
    targets = torch.randint(3000, (50,), generator=generator)
    losses, factors = torch.empty(50), torch.empty(50)
    exact = logits.double()
    shift = exact.amax(1, keepdim=True)
    exponentiate(logits, targets, 2.0, losses, factors)
    totals = torch.exp(exact - shift).sum(1)
    assert (factors * totals / 2 - 1).abs().max() < 6e-4
    torch.testing.assert_close(
        losses.double(), F.cross_entropy(exact, targets, reduction="none"), rtol=0, atol=6e-4)
    torch.testing.assert_close(logits.double(), torch.exp(exact - shift), rtol=4e-2, atol=0)


def test_triton_is_not_imported_before_it_is_used(tmp_path: Path) -> None:
    """It reads its settings from the environment, where a run puts them first."""
    (tmp_path / "triton.py").write_text("raise AssertionError('imported too early')")
    code, output = execute([sys.executable, "-c", "import triton"],
                           env={"PYTHONPATH": str(tmp_path)})
    assert code, "else this shows nothing"
    assert "imported too early" in output
    code, output = execute([sys.executable, "-c", "import fedrun.run, fedrun.federation.worker"],
                           env={"PYTHONPATH": str(tmp_path)})
    assert code == 0, output


def test_launches_do_not_grow_within_a_chunk() -> None:
    counts = []
    for tokens in (CHUNK // 4, CHUNK, CHUNK + 1):
        hidden, weight, targets = example(tokens, torch.float32)
        with Launches() as launches:
            cross_entropy_gradients(hidden, weight, targets, torch.bfloat16, 1.0,
                                    torch.empty_like(weight), False)
        assert "aten::_local_scalar_dense" not in launches.counted
        counts.append(launches.total)
    assert counts[0] == counts[1] < counts[2]

"""Our scan of Mamba-1 against the recurrence, and our mixer against the library's."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from fedrun.model import mamba1
from fedrun.model.config import TransformersShape
from fedrun.model.mamba1 import selective_scan, use_own_scan
from fedrun.model.transformers_lm import build

SHAPE = TransformersShape({"model_type": "mamba", "num_hidden_layers": 2, "hidden_size": 16,
                           "state_size": 4, "use_bias": True})


def recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Channel by channel and position by position."""
    y = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for i in range(x.shape[2]):
            h = torch.zeros(A.shape[1], dtype=x.dtype)
            rows = []
            for t in range(x.shape[1]):
                h = torch.exp(dt[b, t, i] * A[i]) * h + dt[b, t, i] * B[b, t] * x[b, t, i]
                rows.append(C[b, t] @ h)
            y[b, :, i] = torch.stack(rows)
    return y


@pytest.mark.parametrize("length", [1, 9])
def test_scan_and_gradients_are_those_of_the_recurrence(length: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    given = [random(2, length, 3), random(2, length, 3).exp(), -random(3, 4).exp(),
             random(2, length, 4), random(2, length, 4)]
    found, expected = ([t.clone().requires_grad_() for t in given] for _ in range(2))
    y, by_hand = selective_scan(*found), recurrence(*expected)
    torch.testing.assert_close(y, by_hand, rtol=0, atol=1e-13)
    weights = random(*y.shape)
    (y * weights).sum().backward()
    (by_hand * weights).sum().backward()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


def test_the_mixer_is_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose code rounds parts to fp32, whatever the type."""
    ours, theirs = build(SHAPE, 50, 0).double(), build(SHAPE, 50, 0).double()
    use_own_scan(ours)
    mixed, mix = list[Any](), mamba1.mix

    def counted(mixer: Any, u: Tensor) -> Tensor:
        mixed.append(mixer)
        return mix(mixer, u)

    monkeypatch.setattr(mamba1, "mix", counted)
    ids = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(0))
    logits, expected = (lm.eval()(input_ids=ids, use_cache=False).logits for lm in (ours, theirs))
    assert mixed == [block.mixer for block in ours.backbone.layers]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    for made in (logits, expected):
        made.square().mean().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-8, msg=name)


def test_with_a_cache_the_library_computes() -> None:
    lm = build(SHAPE, 50, 0)
    use_own_scan(lm)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        whole: Any = lm(input_ids=ids, use_cache=False).logits[:, -1]
        read = lm(input_ids=ids, use_cache=True).logits[:, -1]
    torch.testing.assert_close(read, whole, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_time_of_a_gradient_grows_with_the_length_alone() -> None:
    """The library's grows with its square: eight times the length, 30 times the time or more."""
    shape = TransformersShape(dict(SHAPE.settings) | {"hidden_size": 64, "state_size": 16})
    lm = build(shape, 50, 0)
    use_own_scan(lm)
    seconds = []
    for length in (64, 512, 64, 512):
        began = time.process_time()
        lm(input_ids=torch.zeros(2, length, dtype=torch.long), use_cache=False
           ).logits.sum().backward()
        seconds.append(time.process_time() - began)
    assert min(seconds[1::2]) < 20 * min(seconds[::2])

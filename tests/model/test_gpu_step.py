"""A local step as a GPU takes it, run without one: on the CPU for its values, on the meta device
for what it would launch and wait for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedrun.federation.client import Client
from fedrun.flags import resolve
from fedrun.model import gpu_head, kernels, mamba2, mixer
from fedrun.model.config import ModelConfig
from fedrun.model.mamba2 import Mamba2LM
from fedrun.training.batch_memory import BatchMemory
from fedrun.training.optimizer import LocalOptimizer
from fedrun.training.params import FlatParams
from tests.support.launches import Launches, fp32_products_of_bf16

SMALL: dict[str, Any] = {"d_model": 64, "d_state": 32, "headdim": 16}
VOCAB = 199


class Kernel(torch.autograd.Function):
    """Stands for mamba-ssm's kernels, which launch what they like."""

    @staticmethod
    def forward(ctx: Any, width: int, *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*inputs)
        first = inputs[0]
        assert first is not None
        return first.new_empty(*first.shape[:2], width)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(None if t is None else torch.empty_like(t) for t in ctx.saved_tensors))


class Norm(torch.autograd.Function):
    """Stands for torch's RMS norm on a GPU: one launch, and two for the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad.clone(), ctx.saved_tensors[0].clone()


def split_conv1d_scan(zxbcdt: Tensor, *inputs: Tensor | None, rmsnorm_weight: Tensor, headdim: int,
                      **_: Any) -> Tensor:
    output: Tensor = Kernel.apply(rmsnorm_weight.numel(), zxbcdt, *inputs, rmsnorm_weight)
    return output


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the branches for GPUs, whatever the device."""
    monkeypatch.setattr(Mamba2LM, "_grad_in_chunks", Mamba2LM._grad_on_gpu)
    monkeypatch.setattr(mamba2, "linear_cross_entropy_gradients",
                        gpu_head.cross_entropy_gradients)


def step_on_meta(layers: int, sequences: int, compute_dtype: torch.dtype) -> Launches:
    config = resolve("fed_avg", {"batch_size": sequences, "grad_clip": 1.0})
    with torch.device("meta"):
        model = Mamba2LM(ModelConfig(n_layer=layers), 50257, compute_dtype)
    flat = FlatParams(model)
    client = Client(0, np.arange(64), np.zeros((64, 256), dtype=np.uint16), flat, config,
                    LocalOptimizer(flat, config, 10))
    client.train(model, 1, 0)  # which creates AdamW's state
    launches = Launches()
    with launches:
        client.train(model, 1, 1)
    return launches


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layers", "most"), [(1, 80), (2, 105), (4, 160)])
def test_launches_of_a_step(monkeypatch: pytest.MonkeyPatch, as_on_a_gpu: None, layers: int,
                            most: int, compute_dtype: torch.dtype) -> None:
    """Outside mamba-ssm's kernels; a larger batch launches nothing more, and nothing waits (the
    meta device could not: it has no values)."""
    monkeypatch.setattr(kernels, "path_for", lambda x: "split_conv1d_scan")
    monkeypatch.setattr(kernels, "uses_triton", lambda x: False)
    monkeypatch.setattr(kernels, "ssd_kernels", lambda: SimpleNamespace(
        mamba_split_conv1d_scan_combined=split_conv1d_scan))
    monkeypatch.setattr(mixer, "rms_norm", lambda x, weight, *_: Norm.apply(x, weight))
    small, large = (step_on_meta(layers, sequences, compute_dtype) for sequences in (4, 16))
    assert small.counted == large.counted
    assert small.total <= most, small.counted.most_common()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokens_at_a_time", [40, 200])
def test_the_gradient_equals_that_of_a_cpu(monkeypatch: pytest.MonkeyPatch, tied: bool,
                                           tokens_at_a_time: int) -> None:
    """Whole and in pieces; whatever the gradients held before is overwritten."""
    config = ModelConfig(n_layer=2, tie_embeddings=tied, proj_bias=not tied, **SMALL)
    monkeypatch.setitem(mamba2.GPU_ACTIVATIONS, "own", tokens_at_a_time * 2 * 64)
    monkeypatch.setattr(mamba2, "linear_cross_entropy_gradients",
                        gpu_head.cross_entropy_gradients)
    monkeypatch.setattr(gpu_head, "CHUNK_TOKENS", 64)
    model = Mamba2LM(config, VOCAB).double()
    model.init_weights(0)
    flat = FlatParams(model)
    ids = torch.randint(VOCAB - 50, (5, 20), generator=torch.Generator().manual_seed(0))
    loss, count = model.loss(ids)
    (loss / count).backward()
    expected = flat.grad.clone()
    flat.grad.fill_(torch.nan)
    ours = model._grad_on_gpu(ids, 1 / count)
    torch.testing.assert_close(ours, loss.detach())
    torch.testing.assert_close(flat.grad, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_outlives_a_step_stays_where_it_is(monkeypatch: pytest.MonkeyPatch, as_on_a_gpu: None,
                                                kind: str) -> None:
    """A CUDA graph would read and write the addresses of the step that it was captured from; it
    forbids waits and pinned memory."""
    config = resolve("fed_avg", {"grad_clip": 1.0, "batch_size": 4, "warmup": 5,
                                 "local_optimizer": kind})
    model = Mamba2LM(ModelConfig(n_layer=2, **SMALL), VOCAB, torch.bfloat16)
    model.init_weights(0)
    flat = FlatParams(model)
    optimizer, rate = LocalOptimizer(flat, config, 10), torch.zeros(())
    generator = torch.Generator().manual_seed(0)
    batch = torch.empty(4, 20, dtype=torch.long)

    def addresses() -> dict[str, int]:
        lasting = {"vector": flat.vector, "grad": flat.grad, "batch": batch, "rate": rate,
                   **optimizer.state, **dict(model.named_parameters())}
        lasting |= {f"{name}.grad": p.grad for name, p in model.named_parameters()
                    if p.grad is not None}
        return {name: t.data_ptr() for name, t in lasting.items()}

    def no_pinned_memory(*_: Any) -> Tensor:
        raise AssertionError("pinned memory in a captured step")

    monkeypatch.setattr(Tensor, "pin_memory", no_pinned_memory)
    seen, operators = [], []
    with fp32_products_of_bf16():
        for number in range(3):
            batch.copy_(torch.randint(VOCAB, (4, 20), generator=generator))
            rate.fill_(0.1 * number)
            before = flat.vector.clone()
            with Launches() as launches:
                model.compute_grad(batch)
                optimizer.update(rate)
            assert torch.equal(before, flat.vector) == (number == 0), "the rate is read each time"
            assert "aten::_local_scalar_dense" not in launches.counted
            seen.append(addresses())
            operators.append(launches.counted)
    assert seen[0] == seen[1] == seen[2]
    assert operators[1] == operators[2], "a replay repeats all of them"


def test_a_rate_in_memory_gives_the_same_step() -> None:
    config = resolve("fed_avg", {"lr": 2.0**-10})
    found = []
    for rate in (2.0**-10, torch.tensor(2.0**-10)):
        model = Mamba2LM(ModelConfig(**SMALL), VOCAB)
        model.init_weights(0)
        flat = FlatParams(model)
        flat.grad.copy_(torch.linspace(-1, 1, flat.size))
        LocalOptimizer(flat, config, 1).update(rate)
        found.append(flat.vector)
    assert torch.equal(*found)


def test_batches_of_a_shape_share_memory_on_a_device() -> None:
    memory = BatchMemory(torch.device("meta"))
    first, second, other = (memory.load(torch.zeros(shape, dtype=torch.long))
                            for shape in ((4, 8), (4, 8), (3, 8)))
    assert first is second
    assert first.is_meta
    assert other.shape == (3, 8)
    here = torch.zeros(4, 8)
    assert BatchMemory(torch.device("cpu")).load(here) is here

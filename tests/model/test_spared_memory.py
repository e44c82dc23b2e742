"""What makes a gradient take less memory: layers computed again in the backward pass, and batches
that go through them in parts."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fedrun.common.errors import InputError
from fedrun.flags import resolve
from fedrun.model.build import new_model
from fedrun.model.config import ModelConfig, TransformersShape
from fedrun.model.mamba2 import Block, Mamba2LM
from fedrun.model.transformers_lm import TransformersLM
from fedrun.records.provenance import differing_settings
from fedrun.training.params import FlatParams
from tests.support.allocations import peak_bytes
from tests.support.runs import Run, without_clocks

SHAPE = ModelConfig(n_layer=3, d_model=64, d_state=32, headdim=16)
DEEP = ModelConfig(n_layer=10, d_model=64, d_state=32, headdim=16)
VOCAB = 199
IDS = torch.randint(VOCAB, (5, 40), generator=torch.Generator().manual_seed(0))


def model_of(shape: ModelConfig = SHAPE, dtype: str = "fp32", **flags: Any) -> Mamba2LM:
    config = resolve("fed_avg", {"dtype": dtype, **flags})
    model = new_model(dataclasses.replace(config, model=shape), VOCAB, torch.device("cpu"))
    assert isinstance(model, Mamba2LM)
    return model


def blocks_of(model: Mamba2LM) -> list[Block]:
    return [block for block in model.backbone.layers if isinstance(block, Block)]


def gradient(model: Mamba2LM, ids: Tensor = IDS) -> tuple[Tensor, Tensor]:
    """The loss of a batch and the whole gradient of its mean."""
    flat = FlatParams(model)
    flat.grad.fill_(torch.nan)  # which has to be overwritten
    loss, count = model.compute_grad(ids)
    assert count == ids[:, 1:].numel()
    return loss, flat.grad


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_recomputed_layers_give_the_same_bits(dtype: str) -> None:
    """In both ways to a gradient, that of a CPU and that of a GPU, and by autograd of the loss."""
    plain, again = model_of(dtype=dtype), model_of(dtype=dtype, checkpoint_activations=True)
    assert again.recompute
    calls: list[int] = []
    for number, block in enumerate(blocks_of(again)):
        block.norm.register_forward_pre_hook(
            lambda *_, number=number: calls.append(number))
    for ours, theirs in zip(gradient(again), gradient(plain), strict=True):
        assert torch.equal(ours, theirs)
    assert calls[:6] == [0, 1, 2, 2, 1, 0]
    for model in (plain, again):
        model._grad_in_chunks = model._grad_on_gpu  # type: ignore[method-assign]
    for ours, theirs in zip(gradient(again), gradient(plain), strict=True):
        assert torch.equal(ours, theirs)
    for model in (plain, again):
        for p in model.parameters():
            p.grad = None
        model.loss(IDS)[0].backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(  # type: ignore[arg-type]
        again.parameters(), plain.parameters(), strict=True))


def test_nothing_is_recomputed_without_a_gradient() -> None:
    model, calls = model_of(checkpoint_activations=True), 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    blocks_of(model)[0].norm.register_forward_hook(count)
    with torch.no_grad():
        model.loss(IDS)
    assert calls == 1
    assert not model.loss(IDS)[0].isnan()
    assert calls == 2


def test_recomputed_layers_take_the_memory_of_one() -> None:
    ids = IDS[:1].repeat(1, 6)
    peaks = []
    for again in (False, True):
        model = model_of(DEEP, checkpoint_activations=again)
        gradient(model, ids)  # memory that is kept between calls
        peaks.append(peak_bytes(partial(model.compute_grad, ids)))
    assert peaks[1] < 0.35 * peaks[0], peaks


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_micro_batch_gives_the_gradient_of_the_whole_batch(size: int, gpu: bool) -> None:
    whole, parts = model_of(), model_of(micro_batch=size)
    seen: list[int] = []
    blocks_of(parts)[0].norm.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    if gpu:
        for model in (whole, parts):
            model._grad_in_chunks = model._grad_on_gpu  # type: ignore[method-assign]
    (loss, grad), (expected, reference) = gradient(parts), gradient(whole)
    assert seen == {1: [1] * 5, 2: [2, 2, 1], 4: [4, 1]}[size]
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert (grad - reference).abs().max() <= 1e-5 * reference.abs().max()
    with torch.no_grad():
        for ours, theirs in ((parts.loss, whole.loss), (parts.entropy, whole.entropy)):
            seen.clear()
            torch.testing.assert_close(ours(IDS), theirs(IDS), rtol=1e-6, atol=0)
            assert max(seen) == size
        torch.testing.assert_close(parts(IDS), whole(IDS), rtol=1e-5, atol=1e-6)


def test_a_micro_batch_that_holds_the_batch_changes_no_bit() -> None:
    for ours, theirs in zip(gradient(model_of(micro_batch=5)), gradient(model_of()), strict=True):
        assert torch.equal(ours, theirs)


def test_a_micro_batch_of_a_model_of_transformers() -> None:
    """Whose layers take it as well."""
    shape = TransformersShape({"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2,
                               "n_positions": 40})
    found = []
    for size in (2, None):
        config = dataclasses.replace(resolve("central", {}), dtype="fp32", model=shape,
                                     micro_batch=size)
        model = new_model(config, VOCAB, torch.device("cpu"))
        assert isinstance(model, TransformersLM)
        assert len(model._parts(IDS)) == (1 if size is None else 3)
        flat = FlatParams(model)
        model.compute_grad(IDS)
        found.append(flat.grad)
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[1].abs().max()


def test_a_micro_batch_takes_the_memory_of_its_sequences() -> None:
    """As a GPU would take the batch: whole."""
    peaks = []
    for size in (None, 1):
        model = model_of(DEEP, micro_batch=size)
        model._grad_in_chunks = model._grad_on_gpu  # type: ignore[method-assign]
        gradient(model)
        peaks.append(peak_bytes(partial(model.compute_grad, IDS)))
    assert peaks[1] < 0.4 * peaks[0], peaks


@pytest.mark.slow
@pytest.mark.parametrize("method", [
    "fed_fisher", *(pytest.param(method, marks=pytest.mark.soak) for method in (
        "fed_avg", "fed_entropy", "fed_sgd"))])
def test_a_micro_batch_gives_the_same_bits_in_any_world(run: Run, method: str) -> None:
    """And is part of what decides them: a run is not resumed with another."""
    flags = (method, "--num_clients", 3, "--rounds", 2, "--batch_size", 4, "--micro_batch", 1)
    one, four = (run(*flags, processes=n, name=str(n)) for n in (1, 4))
    assert one.code == four.code == 0, one.output + four.output
    assert one.bits == four.bits
    assert without_clocks(one) == without_clocks(four)
    assert one.config["micro_batch"] == 1
    whole = run(*flags[:-2], name="whole")
    for name, tensor in whole.model.items():
        torch.testing.assert_close(one.model[name], tensor, rtol=0, atol=1e-4)
    assert one.bits != whole.bits
    other = run(*flags[:-2], "--rounds", 3, name="1")
    assert other.code == 2
    assert "micro_batch 1 there, None here" in other.output


@pytest.mark.slow
def test_a_run_with_recomputed_layers_has_the_bits_of_one_without(run_here: Run) -> None:
    """And resumes it: it is no other run."""
    flags = ("fed_avg", "--num_clients", 2, "--rounds", 2, "--local_updates", 2)
    plain = run_here(*flags, name="plain")
    again = run_here(*flags, "--checkpoint_activations", "true", name="again")
    assert plain.code == again.code == 0, again.output
    assert again.bits == plain.bits
    assert again.config["checkpoint_activations"] is True
    assert not differing_settings(resolve("fed_avg", {"config": "tiny"}), resolve(
        "fed_avg", {"config": "tiny", "checkpoint_activations": True}).to_dict())


def test_models_of_transformers_refuse_what_is_for_mamba2() -> None:
    with pytest.raises(InputError, match="--checkpoint_activations true: must be false for a mod"):
        dataclasses.replace(resolve("fed_avg", {"checkpoint_activations": True}),
                            model=TransformersShape({"model_type": "gpt2"}))

"""Models of transformers as training calls them, against the library's own loss and autograd."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from fedrun.common.errors import InputError
from fedrun.data.tokens import TokenData
from fedrun.model import transformers_lm
from fedrun.model.base import Generates, Model
from fedrun.model.build import require_positions
from fedrun.model.config import TransformersShape
from fedrun.model.generate import generate
from fedrun.model.transformers_lm import TransformersLM, build, require_trainable
from fedrun.training.evaluate import sample_text

ROWS, LENGTH = 60, 12
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 24}
MAMBA = {"model_type": "mamba", "num_hidden_layers": 2, "hidden_size": 16, "state_size": 4}
LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 24}
# Their logits are limited, or scaled, after the head.
GEMMA2 = {"model_type": "gemma2", "num_hidden_layers": 1, "hidden_size": 16, "head_dim": 8,
          "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
          "final_logit_softcapping": 30.0, "max_position_embeddings": 24}
COHERE = LLAMA | {"model_type": "cohere", "logit_scale": 0.5}
BIASED = {"model_type": "phi", "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32,
          "num_attention_heads": 2, "max_position_embeddings": 24}
ROUNDED = "mamba", "gemma2", "cohere"  # whose code computes parts in fp32, whatever the type
UNTIED = GPT2 | {"tie_word_embeddings": False}
KINDS = pytest.mark.parametrize("settings", [GPT2, UNTIED, LLAMA, MAMBA, GEMMA2, COHERE, BIASED],
                                ids=["gpt2", "untied", "llama", "mamba", "gemma2", "cohere", "phi"])


def made(settings: dict[str, Any], compute_dtype: torch.dtype = torch.float32, seed: int = 0
         ) -> TransformersLM:
    """A model whose logits are of the size of a trained one's."""
    lm = build(TransformersShape(settings), ROWS, seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(3)
    return TransformersLM(lm, compute_dtype)


def batch(sequences: int = 3) -> Tensor:
    return torch.randint(0, ROWS, (sequences, LENGTH),
                         generator=torch.Generator().manual_seed(1))


def double(model: TransformersLM) -> TransformersLM:
    return model.to(torch.device("cpu"), torch.float64)


@KINDS
def test_loss_and_entropy_are_the_librarys(settings: dict[str, Any]) -> None:
    model, ids = double(made(settings)), batch()
    with torch.no_grad():
        output = model.lm(input_ids=ids, labels=ids, use_cache=False)
        logs = log_softmax(output.logits[:, :-1].double(), -1)
        loss, count = model.loss(ids)
        entropy, counted = model.entropy(ids)
    assert count == counted == 3 * (LENGTH - 1)
    exact = settings["model_type"] not in ROUNDED
    torch.testing.assert_close(loss / count, output.loss.double(), rtol=1e-5, atol=0)
    expected = -logs.gather(-1, ids[:, 1:, None]).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12 if exact else 1e-6, atol=0)
    torch.testing.assert_close(entropy, -(logs.exp() * logs).sum(), rtol=1e-12 if exact else 1e-6,
                               atol=0)
    assert torch.equal(model(ids), output.logits)


@KINDS
@pytest.mark.parametrize("tokens", [LENGTH, 10**6])
def test_the_gradient_is_autograds(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any],
                                   tokens: int) -> None:
    """Of the whole batch and of a sequence at a time, whatever the gradients held before."""
    monkeypatch.setitem(transformers_lm.TOKENS, "cpu", tokens)
    model, reference, ids = double(made(settings)), double(made(settings)), batch()
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    loss, count = model.compute_grad(ids)
    logits = reference.lm(input_ids=ids).logits[:, :-1].double()
    expected = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    expected.backward()
    limit = 1e-5 if settings["model_type"] in ROUNDED else 1e-11
    torch.testing.assert_close(loss / count, expected, rtol=limit, atol=0)
    assert not loss.requires_grad
    for (name, p), (other, q) in zip(model.named_parameters(), reference.named_parameters(),
                                     strict=True):
        assert name == other
        assert p.grad is not None
        wanted = torch.zeros_like(q) if q.grad is None else q.grad
        torch.testing.assert_close(p.grad, wanted, rtol=0, atol=limit)


@pytest.mark.parametrize(("settings", "fused"), [
    (GPT2, True), (UNTIED, True), (LLAMA, True), (MAMBA, True), (GEMMA2, False), (COHERE, False),
    (BIASED, False)])
def test_the_fused_head_is_taken_where_nothing_follows_it(settings: dict[str, Any], fused: bool
                                                          ) -> None:
    assert (made(settings).head is not None) == fused


@pytest.mark.parametrize(("settings", "tied"), [(GPT2, "transformer.wte.weight"), (UNTIED, None)])
def test_a_tied_weight_counts_once(settings: dict[str, Any], tied: str | None) -> None:
    model = made(settings)
    names = [name for name, _ in model.named_parameters()]
    assert (model.names.tied, model.names.tracked, model.names.mixers) == (tied, {}, frozenset())
    assert ("lm_head.weight" in names) == (tied is None)
    count = 2 * (12 * 16 * 16 + 13 * 16) + 2 * 16 + (ROWS * (1 if tied else 2) + 24) * 16
    assert sum(p.numel() for p in model.parameters()) == count
    assert transformers_lm.parameters_of(TransformersShape(settings), ROWS) == count


def test_weights_come_from_the_seed_alone() -> None:
    shape = TransformersShape(MAMBA)  # draws from two libraries' initialisations
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = dict(build(shape, ROWS, 3).named_parameters())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    again, other = (dict(build(shape, ROWS, seed).named_parameters()) for seed in (3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["backbone.embeddings.weight"], other["backbone.embeddings.weight"])


@pytest.mark.parametrize("settings", [GPT2, LLAMA, MAMBA, GEMMA2])
def test_products_in_bf16_on_fp32_parameters(settings: dict[str, Any]) -> None:
    exact, rounded, ids = made(settings), made(settings, torch.bfloat16), batch()
    for model in (exact, rounded):
        loss, count = model.compute_grad(ids)
        assert loss.dtype == torch.float32
    a, b = (torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            for model in (exact, rounded))
    assert b.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(a, b, 0) > 0.99
    assert not torch.equal(a, b)
    losses = [model.loss(ids)[0].item() / count for model in (exact, rounded)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


# ---- generation ----------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [GPT2, LLAMA, MAMBA], ids=["gpt2", "llama", "mamba"])
def test_text_goes_on_as_if_all_of_it_were_read_again(settings: dict[str, Any]) -> None:
    """With the library's cache, and past the longest sequence from the end of the text alone."""
    model, ids = double(made(settings)), batch(2)
    assert isinstance(model, Generates)
    limit = model.max_positions or 100
    found = generate(model, ids, 20)
    text = ids
    for _ in range(20):
        with torch.no_grad():
            text = torch.cat([text, model(text[:, -limit:])[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, text[:, LENGTH:])


def test_the_cache_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(GPT2)
    read = []
    model.lm.register_forward_pre_hook(
        lambda _, __, given: read.append(given["input_ids"].shape[1]), with_kwargs=True)
    generate(model, batch(1), 15)
    assert read == [LENGTH] + 12 * [1] + 2 * [24]


def test_a_model_that_cannot_write_has_no_sample_text() -> None:
    class Silent:
        """A model without `prefill` and `step`."""

    silent, data = cast(Model, Silent()), cast(TokenData, None)
    assert sample_text(silent, data, torch.device("cpu")) == ""


# ---- what cannot be trained ----------------------------------------------------------------------

@pytest.mark.parametrize(("settings", "message"), [
    ({"model_type": "gptt2"}, "model_type gptt2: transformers has no such architecture"),
    ({"model_type": "vit"}, "model_type vit: must be a causal language model"),
    ({"model_type": "bert", "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2,
      "intermediate_size": 16}, "must be a causal language model; its predictions depend"),
    (GPT2 | {"n_head": 3}, "gpt2 cannot be built of these fields: "),
    (GPT2 | {"n_layer": "many"}, "gpt2 refuses these fields: ")])
def test_what_is_no_causal_model(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=r"^model\.transformers") as raised:
        require_trainable(TransformersShape(settings), ROWS, LENGTH)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


class Counting(nn.Module):
    """A layer with a buffer that counts how often it is called."""

    def __init__(self, inner: nn.Module, constant: bool) -> None:
        super().__init__()
        self.inner, self.constant = inner, constant
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, *arguments: Any, **named: Any) -> Any:
        if not self.constant:
            self.get_buffer("calls").add_(1)
        return self.inner(*arguments, **named)


@pytest.mark.parametrize("constant", [True, False])
def test_a_buffer_that_changes_is_refused(monkeypatch: pytest.MonkeyPatch, constant: bool) -> None:
    """A run keeps parameters alone."""
    instance = transformers_lm._instance

    def with_buffer(shape: TransformersShape, rows: int) -> Any:
        lm = instance(shape, rows)
        lm.transformer.h[1].mlp = Counting(lm.transformer.h[1].mlp, constant)
        return lm

    monkeypatch.setattr(transformers_lm, "_instance", with_buffer)
    if constant:
        require_trainable(TransformersShape(GPT2), ROWS, LENGTH)
        return
    with pytest.raises(InputError, match=r"transformer\.h\.1\.mlp\.calls is no parameter"):
        require_trainable(TransformersShape(GPT2), ROWS, LENGTH)


def test_a_parameter_that_is_not_trained_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    instance = transformers_lm._instance

    def frozen(shape: TransformersShape, rows: int) -> Any:
        lm = instance(shape, rows)
        lm.transformer.wpe.weight.requires_grad_(False)
        return lm

    monkeypatch.setattr(transformers_lm, "_instance", frozen)
    with pytest.raises(InputError, match=r"transformer\.wpe\.weight is a parameter that"):
        require_trainable(TransformersShape(GPT2), ROWS, LENGTH)


def test_no_sequence_is_longer_than_the_models_positions() -> None:
    require_positions(TransformersShape(GPT2), 24)
    with pytest.raises(InputError, match="--sequence_length 25: must be at most 24, the positions"):
        require_positions(TransformersShape(GPT2), 25)
    require_positions(TransformersShape(MAMBA), 10**6)


@pytest.mark.parametrize(("settings", "why"), [
    ({"model_type": "rwkv", "hidden_size": 32, "num_hidden_layers": 7, "context_length": 64},
     "the library changes .* where it only predicts"),
    ({"model_type": "mpt", "d_model": 32, "n_heads": 2, "n_layers": 1, "max_seq_len": 64},
     "cannot compute a loss, or text after 128 tokens")], ids=["rwkv", "mpt"])
def test_what_would_end_a_run_later_is_refused(settings: dict[str, Any], why: str) -> None:
    """Weights that a forward pass rescales; text that is longer than the model can read."""
    with pytest.raises(InputError, match=why):
        require_trainable(TransformersShape(settings), ROWS, LENGTH)

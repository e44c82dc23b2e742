"""Causal language models of transformers, as training calls them.

The library computes the layers; the loss and its gradient come from `loss.py` where the model ends
in a linear head, which is found out by computing a few logits. Products in bf16 are torch's
autocast on fp32 parameters. No model has a cache in training.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrun.common.errors import InputError, one_line
from fedrun.model.config import TransformersShape
from fedrun.model.loss import (
    linear_cross_entropy,
    linear_cross_entropy_gradients,
    predictive_entropy,
)
from fedrun.model.mamba1 import use_own_scan
from fedrun.model.names import ParameterNames
from fedrun.model.precision import bf16_products
from fedrun.model.transformers_config import (
    ATTENTION,
    library_config,
    max_positions,
    model_class,
    quietly,
)

TOKENS = {"cpu": 2**10, "cuda": 2**15}  # that the layers take at a time: fits the cache of a CPU
LOGITS = 2**27  # that are kept at a time where the model does not end in a linear head
CACHES = "cache", "past_key_values"  # names of what a forward pass returns for the next token
LONGEST_TRIAL = 64  # tokens: what is tried depends on no length, and large models take long
LONGEST_TEXT = 128  # tokens of a sample text with its prompt
LAYERS = "num_hidden_layers"  # the library's name, whatever an architecture's own is
PROBE = 8  # tokens of the sequences on which a model is tried
LARGE_LOGIT = 100.0  # which a limit on logits, as some models have, would change
ROUNDING = 1e-5  # of the largest logit: what is different by more is not equal


@dataclass
class Written:
    """What a model has read and written so far."""

    ids: Tensor
    """(b, l)"""
    cache: tuple[str, Any] | None
    """What the library keeps of it, with the name of the argument that takes it."""


class TransformersLM:
    """A causal language model of transformers; `lm` is the library's own."""

    def __init__(self, lm: Any, compute_dtype: torch.dtype = torch.float32,
                 fused_head: bool | None = None) -> None:
        """lm: on the CPU, in fp32; or on the meta device, with the answer of `ends_in_its_head`,
        which nothing can be found out of there, as fused_head."""
        self.lm, self.compute_dtype = lm.eval(), compute_dtype
        lm.config.pad_token_id = None  # every token is text
        for module in lm.modules():
            if isinstance(module, nn.Embedding):
                module.padding_idx = None  # its row would not be trained
        use_own_scan(lm)
        self.micro_batch: int | None = None
        """The most sequences that the layers take at a time; None: as many as suit the device."""
        self.max_positions = max_positions(lm.config)
        self.head: nn.Linear | None = _linear_head(lm) if fused_head is None else \
            lm.get_output_embeddings() if fused_head else None
        """The model's last layer, if nothing but it stands between hidden states and logits."""

    def to(self, device: torch.device, dtype: torch.dtype) -> TransformersLM:
        """Move it, in place."""
        self.lm.to(device=device, dtype=dtype)
        return self

    @property
    def names(self) -> ParameterNames:
        """No parameter is tracked, and none is a mixer's."""
        inner, outer = self.lm.get_input_embeddings(), self.lm.get_output_embeddings()
        weight = getattr(inner, "weight", None)
        tied = [name for name, p in self.named_parameters()
                if p is weight and p is getattr(outer, "weight", None)]
        return ParameterNames(matrices=frozenset(matrices_of(self.lm)),
                              tied=tied[0] if tied else None)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters by the library's names; of a tied weight's names the first."""
        found: Iterator[tuple[str, nn.Parameter]] = self.lm.named_parameters()
        return found

    def parameters(self) -> Iterator[nn.Parameter]:
        """The same without names."""
        return (parameter for _, parameter in self.named_parameters())

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits: (b, l) integers -> (b, l, vocab), in the parameters' type or wider."""
        with self._autocast(input_ids):
            logits: Tensor = self.lm(input_ids=input_ids, use_cache=False).logits
        return logits if logits.dtype == torch.float64 else logits.float()

    def loss(self, input_ids: Tensor) -> tuple[Tensor, int]:
        """Summed next-token cross-entropy in nats, and the number of tokens predicted: (b, l)."""
        parts = [self._loss(part) for part in self._parts(input_ids)]
        return torch.stack(parts).sum(), input_ids[:, 1:].numel()

    def _loss(self, input_ids: Tensor) -> Tensor:
        targets = input_ids[:, 1:].flatten()
        if self.head is None:
            return F.cross_entropy(self(input_ids)[:, :-1].flatten(0, 1), targets, reduction="sum")
        weight = self.head.weight
        return linear_cross_entropy(self._hidden(input_ids), weight, targets,
                                    self._matmul_dtype(weight))

    def compute_grad(self, input_ids: Tensor) -> tuple[Tensor, int]:
        """Return the same as `loss`, and write the gradient of the mean loss to every .grad,
        overwriting existing ones in place."""
        for p in self.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            elif self.head is None or p is not self.head.weight:
                p.grad.zero_()
        count = input_ids[:, 1:].numel()
        losses = []
        for number, part in enumerate(self._parts(input_ids)):
            if self.head is None:
                loss = self._loss(part)
                (loss / count).backward()
            else:
                weight = self.head.weight
                assert weight.grad is not None
                hidden = self._hidden(part)
                loss, grad = linear_cross_entropy_gradients(
                    hidden.detach(), weight.detach(), part[:, 1:].flatten(),
                    self._matmul_dtype(weight), 1 / count, weight.grad, add=number > 0)
                hidden.backward(grad)
            losses.append(loss.detach())
        return torch.stack(losses).sum(), count

    @torch.no_grad()
    def entropy(self, input_ids: Tensor) -> tuple[Tensor, int]:
        """Summed entropy in nats of the predictions that `loss` scores, and their number."""
        parts = [self._entropy(part) for part in self._parts(input_ids)]
        return torch.stack(parts).sum(), input_ids[:, 1:].numel()

    def _entropy(self, input_ids: Tensor) -> Tensor:
        if self.head is None:
            logs = F.log_softmax(self(input_ids)[:, :-1], -1)
            return -(logs.exp() * logs).sum()
        weight = self.head.weight
        return predictive_entropy(self._hidden(input_ids), weight, self._matmul_dtype(weight))

    def _hidden(self, input_ids: Tensor) -> Tensor:
        """What the head reads of each token but a sequence's last: (b (l - 1), d), in the
        parameters' type."""
        assert self.head is not None
        with self._autocast(input_ids):
            hidden: Tensor = self.lm.base_model(input_ids=input_ids, use_cache=False)[0]
        return hidden[:, :-1].flatten(0, 1).to(self.head.weight.dtype)

    def _parts(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """The batch in as many sequences at a time as memory is meant for."""
        parts: tuple[Tensor, ...] = input_ids.split(
            self.at_a_time(input_ids.shape[1], input_ids.is_cuda))
        return parts

    def at_a_time(self, length: int, on_gpu: bool) -> int:
        """How many sequences of a batch are computed at a time."""
        most = TOKENS["cuda" if on_gpu else "cpu"]
        if self.head is None:
            most = min(most, LOGITS // self.lm.get_input_embeddings().weight.shape[0])
        fitting = max(1, most // length)
        return min(fitting, self.micro_batch or fitting)

    def _matmul_dtype(self, weight: Tensor) -> torch.dtype:
        return weight.dtype if weight.dtype == torch.float64 else self.compute_dtype

    def _autocast(self, input_ids: Tensor) -> AbstractContextManager[object]:
        return bf16_products(input_ids, self.compute_dtype == torch.bfloat16)

    # ---- generation: in the parameters' type -----------------------------------------------------

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> tuple[Tensor, Written]:
        """Read prompts (b, l): logits of the last tokens (b, vocab), and what has been read. Of
        what is longer than the model was made for, the end is read."""
        if self.max_positions is not None:
            input_ids = input_ids[:, -self.max_positions:]
        output = self.lm(input_ids=input_ids, use_cache=True)
        logits: Tensor = output.logits[:, -1]
        return logits, Written(input_ids, _cache_of(output))

    @torch.no_grad()
    def step(self, tokens: Tensor, state: Written) -> Tensor:
        """Read one more token a sequence, (b,): logits (b, vocab). Updates `state` in place."""
        state.ids = torch.cat([state.ids, tokens[:, None]], dim=1)
        if state.cache is None or state.ids.shape[1] > (self.max_positions or 2**62):
            logits, again = self.prefill(state.ids)
            state.ids, state.cache = again.ids, again.cache
            return logits
        name, cache = state.cache
        output = self.lm(input_ids=tokens[:, None], use_cache=True, **{name: cache})
        state.cache = _cache_of(output)
        latest: Tensor = output.logits[:, -1]
        return latest


def _cache_of(output: Any) -> tuple[str, Any] | None:
    for name in CACHES:
        if name in output and output[name] is not None:
            return name, output[name]
    return None


# ---- building ------------------------------------------------------------------------------------

def build(shape: TransformersShape, rows: int, seed: int) -> Any:
    """The library's model from scratch, in fp32 on the CPU: a seed gives the same weights
    everywhere. Raises InputError if the library cannot build it."""
    with torch.random.fork_rng(devices=[]):  # the library draws from the process's generator
        torch.default_generator.manual_seed(seed)
        return _instance(shape, rows)


def outline(shape: TransformersShape, rows: int) -> Any:
    """The library's model without memory for its weights, on the meta device."""
    with torch.device("meta"):
        return _instance(shape, rows)


def _instance(shape: TransformersShape, rows: int) -> Any:
    config = library_config(shape, rows)
    cls = model_class(type(config), shape.model_type)
    try:
        with quietly():
            lm = cls._from_config(config, attn_implementation=ATTENTION).float()
    except Exception as error:  # the library raises many kinds for fields that do not fit
        raise InputError(f"model.transformers: {shape.model_type} cannot be built of these fields: "
                         f"{one_line(error)}") from error
    embedding = lm.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding) or len(embedding.weight) != rows:
        raise InputError(f"model.transformers.model_type {shape.model_type}: must be a language "
                         "model with one embedding of its vocabulary")
    return lm


def embedding_name(shape: TransformersShape) -> str:
    """The name of the embedding among the parameters."""
    lm = outline(shape, 8)
    weight = lm.get_input_embeddings().weight
    return next(str(name) for name, p in lm.named_parameters() if p is weight)


def matrices_of(lm: Any) -> dict[str, nn.Parameter]:
    """The 2-dimensional weights of modules that are neither embedding nor head, by name."""
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings().weight
    found = {f"{name}.weight": getattr(module, "weight", None)
             for name, module in lm.named_modules()
             if module is not head and not isinstance(module, nn.Embedding)}
    return {name: weight for name, weight in found.items() if isinstance(weight, nn.Parameter)
            and weight.ndim == 2 and weight is not embedding}


def parameters_of(shape: TransformersShape, rows: int) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in outline(shape, rows).parameters())


def one_layer(shape: TransformersShape) -> tuple[TransformersShape, int]:
    """The same shape with one layer, and how many it has; itself and 1 where the library cannot
    build it with one."""
    config = library_config(shape)
    layers = getattr(config, "num_hidden_layers", 1)
    own = type(config).attribute_map.get(LAYERS, LAYERS)
    given = {name: value[:1] if isinstance(value, list) and len(value) == layers else value
             for name, value in shape.settings.items() if name not in (own, LAYERS)}
    one = TransformersShape({**given, own: 1})
    try:
        outline(one, PROBE)
    except InputError:
        return shape, 1
    return one, layers


@functools.lru_cache(maxsize=16)
def ends_in_its_head(shape: TransformersShape) -> bool:
    """Whether the logits of such a model are its head times its hidden states and nothing else;
    found out on one layer of it, with few tokens."""
    return TransformersLM(build(one_layer(shape)[0], PROBE, seed=0)).head is not None


def require_trainable(shape: TransformersShape, rows: int, sequence_length: int) -> None:
    """Raise InputError unless a model of this shape can be trained on such sequences as a model is
    here: all parameters, and nothing else that changes. Tries it on a batch of short ones, and lets
    it write as sample texts are written."""
    kind = f"model.transformers.model_type {shape.model_type}"
    lm = build(shape, rows, seed=0)
    first = [(name, p.detach().clone()) for name, p in lm.named_parameters()]
    model = TransformersLM(lm)  # which computes with it
    for name, p in model.named_parameters():
        if not p.requires_grad:
            raise InputError(f"{kind}: {name} is a parameter that the library does not train")
    before = {name: b.clone() for name, b in model.lm.named_buffers()}
    whole = max(sequence_length, LONGEST_TEXT)
    sequence_length = min(sequence_length, LONGEST_TRIAL)
    ids = torch.arange(2 * sequence_length).view(2, sequence_length) % rows
    ids[1] = ids[0]
    ids[1, sequence_length // 2:] = (ids[0, sequence_length // 2:] + 1) % rows
    try:
        with torch.no_grad():
            logits = model(ids)[:, :sequence_length // 2]
        changed = next((name for (name, p), (_, then) in zip(
            model.named_parameters(), first, strict=True) if not torch.equal(p, then)), "")
        del first
        model.compute_grad(ids)
        _, state = model.prefill((torch.arange(whole) % rows)[None])
        model.step(ids[:1, 0], state)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{kind}: cannot compute a loss, or text after {whole} tokens: "
                         f"{one_line(error)}") from error
    if changed:
        raise InputError(f"{kind}: the library changes {changed} where it only predicts, so that a "
                         "saved model would be another one")
    if not _equal(logits[0], logits[1]):
        raise InputError(f"{kind}: must be a causal language model; its predictions depend on "
                         "tokens that come later")
    for name, after in model.lm.named_buffers():
        if name not in before or not torch.equal(before[name], after):
            raise InputError(f"{kind}: {name} is no parameter and changes in training, which "
                             "keeps parameters alone")


@torch.no_grad()
def _linear_head(lm: Any) -> nn.Linear | None:
    """The head, if the logits are its weight times the base model's hidden states and nothing else:
    found out with hidden states that are scaled to give large logits."""
    head: nn.Module | None = lm.get_output_embeddings()
    if (type(head) is not nn.Linear or getattr(head, "bias", None) is not None
            or lm.base_model is lm):
        return None
    ids = (torch.arange(PROBE) % len(head.weight))[None]
    seen: list[Tensor] = []

    def scaled(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        largest = F.linear(arguments[0], head.weight).abs().max()
        seen.extend([arguments[0], arguments[0] * (LARGE_LOGIT / largest)])
        return (seen[1],)

    try:
        hidden = lm.base_model(input_ids=ids, use_cache=False)[0]
        with head.register_forward_pre_hook(scaled):
            logits = lm(input_ids=ids, use_cache=False).logits
    except Exception:  # of an architecture that is called in another way
        return None
    ends_in_it = len(seen) == 2 and hidden.shape == seen[0].shape and logits.shape[:2] == ids.shape
    if ends_in_it and _equal(hidden, seen[0]) and _equal(F.linear(seen[1], head.weight), logits):
        return head
    return None


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal but for rounding."""
    return bool((a - b).abs().max() <= ROUNDING * b.abs().max())

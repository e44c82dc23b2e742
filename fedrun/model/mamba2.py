"""Mamba-2 as a language model (Dao & Gu 2024, https://arxiv.org/abs/2405.21060).

Parameter names, shapes and initialisation are those of `mamba_ssm`'s MambaLMHeadModel with
ssm_cfg={"layer": "Mamba2"}. The head is tied to the embedding unless ModelConfig says otherwise,
the vocabulary is not padded, and the residual stream keeps the parameters' type. Shapes: b batch,
l sequence length, d d_model, i = expand * d inner width, h heads, p headdim, g groups, n d_state.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fedrun.model import kernels
from fedrun.model.config import ModelConfig
from fedrun.model.loss import (
    chunk_tokens,
    linear_cross_entropy,
    linear_cross_entropy_gradients,
    predictive_entropy,
)
from fedrun.model.mixer import LayerState, Mamba2Mixer, RMSNorm, matmul_dtype_for
from fedrun.model.names import ParameterNames, mamba2_names

# tokens * layers * d_model that a GPU takes at a time, by the path of the kernels: the less a path
# fuses, the more it keeps for the backward pass. An estimate, not run on a GPU: 14 to 17 GB.
GPU_ACTIVATIONS: dict[kernels.KernelPath, int] = {
    "split_conv1d_scan": 2**29, "conv1d_and_chunk_scan": 2**28, "own": 2**27}

ModelState = list[LayerState]
"""One entry a layer."""


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mamba2Mixer(config, compute_dtype)

    def mixed(self, residual: Tensor) -> Tensor:
        """What the block adds to the residual stream: (b, l, d) -> (b, l, d)."""
        return self.mixer.mix(self.norm(residual))

    def recomputed(self, residual: Tensor) -> Tensor:
        """The same, keeping nothing for the backward pass but the residual stream."""
        mixed: Tensor = _Recomputed.apply(  # type: ignore[no-untyped-call]
            self, residual, *self.parameters())
        return mixed


class _Recomputed(torch.autograd.Function):
    """`Block.mixed`, which the backward pass computes again. The parameters are arguments so that
    autograd hears of their gradients. `torch.utils.checkpoint` would import torch's compiler, which
    takes longer than the rest of a process's start."""

    @staticmethod
    def forward(ctx: Any, block: Block, residual: Tensor, *_: Tensor) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(residual)
        return block.mixed(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        residual = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            mixed = ctx.block.mixed(residual)
        return None, *torch.autograd.grad(mixed, [residual, *ctx.block.parameters()], grad)


class Backbone(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: ModelConfig, vocab_size: int, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.empty(vocab_size, config.d_model),
                                                      freeze=False)
        self.layers = nn.ModuleList(Block(config, compute_dtype) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)


class Mamba2LM(nn.Module):
    """A Mamba-2 language model. Weights are uninitialised until `init_weights` or a state dict."""

    def __init__(self, config: ModelConfig, vocab_size: int,
                 compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.vocab_size, self.compute_dtype = config, vocab_size, compute_dtype
        self.recompute = False
        """Whether a gradient is computed with one layer's activations at a time: the backward pass
        computes each layer again from its input."""
        self.micro_batch: int | None = None
        """The most sequences that the layers take at a time; None: as many as suit the device."""
        self.backbone = Backbone(config, vocab_size, compute_dtype)
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, device="meta")
        self.lm_head.weight = self.backbone.embedding.weight if config.tie_embeddings else \
            nn.Parameter(torch.empty(vocab_size, config.d_model))

    @property
    def names(self) -> ParameterNames:
        """The parameters that snapshots and FedFisher ask for."""
        return mamba2_names(name for name, _ in self.named_parameters())

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialise like mamba_ssm. A seed gives the same weights on every device."""
        generator = torch.Generator().manual_seed(seed)

        def normal(p: Tensor, std: float) -> None:
            p.copy_(torch.randn(p.shape, generator=generator).mul_(std))

        def uniform(p: Tensor, low: float, high: float) -> None:
            p.copy_(torch.rand(p.shape, generator=generator).mul_(high - low).add_(low))

        normal(self.backbone.embedding.weight, 0.02)
        for block in self.backbone.layers:
            assert isinstance(block, Block)
            mixer = block.mixer
            # dt is log-uniform in [1e-3, 1e-1]; dt_bias is its inverse under softplus.
            log_dt = torch.rand(mixer.heads, generator=generator)
            dt = torch.exp(log_dt * (math.log(1e-1) - math.log(1e-3)) + math.log(1e-3))
            mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            uniform(mixer.A_log, 1.0, 16.0)
            mixer.A_log.log_()
            mixer.D.fill_(1.0)
            bound = 1 / math.sqrt(self.config.d_model)
            uniform(mixer.in_proj.weight, -bound, bound)
            bound = 1 / math.sqrt(self.config.d_conv)
            uniform(mixer.conv1d.weight, -bound, bound)
            if mixer.conv1d.bias is not None:
                uniform(mixer.conv1d.bias, -bound, bound)
            # The residual stream sums n_layer outputs (Radford et al. 2019, section 2.3).
            bound = 1 / math.sqrt(mixer.d_inner * self.config.n_layer)
            uniform(mixer.out_proj.weight, -bound, bound)
            if self.config.proj_bias:
                mixer.in_proj.bias.zero_()
                mixer.out_proj.bias.zero_()
            block.norm.weight.fill_(1.0)
            mixer.norm.weight.fill_(1.0)
        self.backbone.norm_f.weight.fill_(1.0)
        if not self.config.tie_embeddings:
            bound = 1 / math.sqrt(self.config.d_model)
            uniform(self.lm_head.weight, -bound, bound)

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Hidden states after the final norm: (b, l) integers -> (b, l, d)."""
        parts = [self.hidden_of(F.embedding(ids, self.backbone.embedding.weight))
                 for ids in input_ids.split(self._at_most(len(input_ids)))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _at_most(self, sequences: int) -> int:
        """So many sequences, or those of a micro-batch."""
        return min(sequences, self.micro_batch or sequences)

    def hidden_of(self, residual: Tensor) -> Tensor:
        """Hidden states after the final norm, from embedded tokens: (b, l, d) -> (b, l, d)."""
        for block in self.backbone.layers:
            assert isinstance(block, Block)
            residual = residual + (
                block.recomputed(residual) if self.recompute else block.mixed(residual))
        normed: Tensor = self.backbone.norm_f(residual)
        return normed

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits: (b, l) integers -> (b, l, vocab)."""
        return self.head(self.hidden(input_ids))

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states: (..., d) -> (..., vocab), in hidden's type."""
        matmul_dtype = matmul_dtype_for(self.compute_dtype, hidden)
        logits = F.linear(hidden.to(matmul_dtype), self.lm_head.weight.to(matmul_dtype))
        return logits.to(hidden.dtype)

    def loss(self, input_ids: Tensor) -> tuple[Tensor, int]:
        """Summed next-token cross-entropy in nats, and the number of tokens predicted.

        input_ids: (b, l). Every token except a sequence's first is predicted from those before it.
        """
        hidden = self.hidden(input_ids)[:, :-1].flatten(0, 1)
        targets = input_ids[:, 1:].flatten()
        loss = linear_cross_entropy(hidden, self.lm_head.weight, targets,
                                    matmul_dtype_for(self.compute_dtype, hidden))
        return loss, targets.numel()

    def compute_grad(self, input_ids: Tensor) -> tuple[Tensor, int]:
        """Return the same as `loss`, and write the gradient of the mean loss to every .grad.

        Overwrites existing .grad tensors in place. The result is that of `zero_grad()` and
        `(loss / count).backward()`, with fewer passes over tensors of the embedding's size: the
        head's gradient is not set to zero before, and both gradients of a tied weight go to .grad
        directly.
        """
        assert len(input_ids), "without a sequence, nothing would overwrite the head's gradient"
        for p in self.parameters():
            if p.grad is None:
                p.grad = torch.empty_like(p)
        count = input_ids[:, 1:].numel()
        grad = self._grad_on_gpu if input_ids.is_cuda else self._grad_in_chunks
        return grad(input_ids, 1 / count), count

    def _grad_in_chunks(self, input_ids: Tensor, scale: float) -> Tensor:
        """Write the gradient of scale * loss; returns the loss."""
        for p in self.parameters():
            if p is not self.lm_head.weight:
                assert p.grad is not None
                p.grad.zero_()
        weight, grad_weight, embedding, grad_embedding = self._outer()
        matmul_dtype = matmul_dtype_for(self.compute_dtype, weight)
        loss = weight.new_zeros(())
        length, end, add = input_ids.shape[1], 0, False
        while end < len(input_ids):  # a chunk of the head at a time
            start, end = end, end + self.at_a_time_on_cpu(length, add)
            # The layers take fewer tokens at a time, so that their activations stay in the cache.
            ids = input_ids[start:end].split(self.at_a_time_on_cpu(length, add=True))
            embedded = [F.embedding(part, embedding).requires_grad_() for part in ids]
            hidden = [self.hidden_of(part)[:, :-1] for part in embedded]
            part_loss, grad = linear_cross_entropy_gradients(
                torch.cat([part.detach() for part in hidden]).flatten(0, 1), weight,
                input_ids[start:end, 1:].flatten(), matmul_dtype, scale, grad_weight, add)
            grads = grad.unflatten(0, (-1, length - 1)).split([len(part) for part in ids])
            for tokens, leaf, top, grad in zip(ids, embedded, hidden, grads, strict=True):
                top.backward(grad)
                assert leaf.grad is not None
                grad_embedding.index_add_(0, tokens.flatten(), leaf.grad.flatten(0, 1))
                leaf.grad = None
            loss += part_loss
            add = True
        return loss

    def _grad_on_gpu(self, input_ids: Tensor, scale: float) -> Tensor:
        """What `_grad_in_chunks` does. Small pieces cost a GPU as much as large ones, so the layers
        take the whole batch if it fits, and one launch copies their gradients. A CUDA graph could
        hold it: it waits for nothing, and what outlives it stays where it is."""
        weight, grad_weight, embedding, grad_embedding = self._outer()
        matmul_dtype = matmul_dtype_for(self.compute_dtype, weight)
        inner = [p for p in self.parameters()
                 if p is not self.lm_head.weight and p is not self.backbone.embedding.weight]
        loss, add = weight.new_zeros(()), False
        if grad_embedding is not grad_weight:
            grad_embedding.zero_()
        for ids in input_ids.split(self.at_a_time_on_gpu(*input_ids.shape)):
            embedded = F.embedding(ids, embedding).requires_grad_()
            hidden = self.hidden_of(embedded)[:, :-1]
            part_loss, grad = linear_cross_entropy_gradients(
                hidden.detach().flatten(0, 1), weight, ids[:, 1:].flatten(), matmul_dtype, scale,
                grad_weight, add)
            grad_embedded, *grads = torch.autograd.grad(
                hidden, [embedded, *inner], grad.view(hidden.shape))
            keep = torch._foreach_add_ if add else torch._foreach_copy_
            keep([p.grad for p in inner if p.grad is not None], grads)
            grad_embedding.index_add_(0, ids.flatten(), grad_embedded.flatten(0, 1))
            loss += part_loss
            add = True
            del grads, grad, grad_embedded  # or those of the next part are made beside them
        return loss

    def at_a_time_on_gpu(self, sequences: int, length: int) -> int:
        """How many sequences of a batch the layers take at a time on a GPU."""
        most = GPU_ACTIVATIONS[kernels.path_for(self.backbone.embedding.weight)]
        return self._at_most(min(sequences, max(
            1, most // (length * self.config.n_layer * self.config.d_model))))

    def at_a_time_on_cpu(self, length: int, add: bool) -> int:
        """How many sequences a CPU takes to the loss head at a time. add: but for the first."""
        weight = self.lm_head.weight
        chunk = chunk_tokens(weight, matmul_dtype_for(self.compute_dtype, weight), add)
        return self._at_most(max(1, chunk // length))

    def _outer(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The head's weight and its gradient, the embedding's and its gradient; the same two where
        they are tied."""
        head, embedding = self.lm_head.weight, self.backbone.embedding.weight
        assert head.grad is not None
        assert embedding.grad is not None
        return head.detach(), head.grad, embedding.detach(), embedding.grad

    @torch.no_grad()
    def entropy(self, input_ids: Tensor) -> tuple[Tensor, int]:
        """Summed entropy in nats of the predictions that `loss` scores, and their number."""
        hidden = self.hidden(input_ids)[:, :-1].flatten(0, 1)
        entropy = predictive_entropy(hidden, self.lm_head.weight,
                                     matmul_dtype_for(self.compute_dtype, hidden))
        return entropy, len(hidden)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> tuple[Tensor, ModelState]:
        """Read prompts (b, l) in one pass: logits of the last tokens (b, vocab), and the state."""
        residual = F.embedding(input_ids, self.backbone.embedding.weight)
        state: ModelState = []
        for block in self.backbone.layers:
            assert isinstance(block, Block)
            mixed, layer_state = block.mixer(block.norm(residual))
            residual = residual + mixed
            state.append(layer_state)
        return self._next_logits(residual[:, -1]), state

    @torch.no_grad()
    def step(self, tokens: Tensor, state: ModelState) -> Tensor:
        """Read one token a sequence by the recurrence: (b,) -> logits (b, vocab). Updates `state`
        in place; time and memory do not grow with what was read before."""
        residual = F.embedding(tokens, self.backbone.embedding.weight)  # (b, d)
        for layer, block in enumerate(self.backbone.layers):
            assert isinstance(block, Block)
            mixed, state[layer] = block.mixer.step(block.norm(residual), state[layer])
            residual = residual + mixed
        return self._next_logits(residual)

    def _next_logits(self, residual: Tensor) -> Tensor:
        # Not cast to matmul_dtype: for one token a sequence the product takes as long as reading
        # the weight, and a cast would have to read it too.
        return F.linear(self.backbone.norm_f(residual), self.lm_head.weight)

"""Mamba-2 as a language model (Dao & Gu 2024, https://arxiv.org/abs/2405.21060).

Parameter names, shapes and initialisation are those of `mamba_ssm`'s MambaLMHeadModel with
ssm_cfg={"layer": "Mamba2"}. The head is tied to the embedding unless ModelConfig says otherwise,
the vocabulary is not padded, and the residual stream keeps the parameters' type. Shapes: b batch,
l sequence length, d d_model, i = expand * d inner width, h heads, p headdim, g groups, n d_state.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrun.model import kernels
from fedrun.model.config import ModelConfig
from fedrun.model.conv import causal_conv_silu
from fedrun.model.loss import (
    chunk_tokens,
    linear_cross_entropy,
    linear_cross_entropy_gradients,
    predictive_entropy,
)
from fedrun.model.norm import rms_norm
from fedrun.model.ssd import ssd_scan

# tokens * layers * d_model that a GPU takes at a time, by the path of the kernels: the less a path
# fuses, the more it keeps for the backward pass. An estimate, not run on a GPU: 14 to 17 GB.
GPU_ACTIVATIONS: dict[kernels.KernelPath, int] = {
    "split_conv1d_scan": 2**29, "conv1d_and_chunk_scan": 2**28, "own": 2**27}
CHUNK_SIZE = 64  # of the scan; the fastest of 32, 64 and 128 (tests/benchmarks/step.py)


class RMSNorm(nn.Module):
    """RMS norm of x, or of x * silu(z) if there is a gate z, over each group of channels."""

    def __init__(self, width: int, eps: float, groups: int = 1) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return rms_norm(x, self.weight, z, self.groups, self.eps)


class Mamba2Mixer(nn.Module):
    """The sequence mixer: (b, l, d) -> (b, l, d); for generation it takes and returns a state."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.d_inner = config.expand * config.d_model
        self.heads = self.d_inner // config.headdim
        self.d_bc = config.ngroups * config.d_state
        self.d_conv_in = self.d_inner + 2 * self.d_bc
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.in_proj = nn.Linear(config.d_model, self.d_inner + self.d_conv_in + self.heads,
                                 bias=config.proj_bias)
        self.conv1d = nn.Conv1d(self.d_conv_in, self.d_conv_in, config.d_conv,
                                groups=self.d_conv_in, bias=config.conv_bias)
        self.norm = RMSNorm(self.d_inner, config.norm_eps, config.ngroups)
        self.out_proj = nn.Linear(self.d_inner, config.d_model, bias=config.proj_bias)

    def project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate z (b, l, i) and convolution input (b, l, i + 2 g n), both in the type of the matrix
        product, and step sizes dt (b, l, h) in u's type."""
        zxbcdt = linear(u, self.in_proj, matmul_dtype_for(self.compute_dtype, u))
        z, xbc, dt = zxbcdt.split([self.d_inner, self.d_conv_in, self.heads], dim=-1)
        dt = F.softplus(dt.to(u.dtype) + self.dt_bias)
        if self.config.limits_dt:
            dt = dt.clamp(self.config.dt_lower, self.config.dt_upper)
        return z, xbc, dt

    def split(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split the convolution's output into x (..., h, p), B and C (..., g, n)."""
        x, B, C = xbc.split([self.d_inner, self.d_bc, self.d_bc], dim=-1)
        groups = (self.config.ngroups, self.config.d_state)
        return (x.unflatten(-1, (self.heads, self.config.headdim)),
                B.unflatten(-1, groups), C.unflatten(-1, groups))

    def finish(self, y: Tensor, z: Tensor) -> Tensor:
        """Gate, norm and output projection: (..., h, p), (..., i) -> (..., d)."""
        normed = self.norm(y.flatten(-2), z)
        matmul_dtype = matmul_dtype_for(self.compute_dtype, normed)
        return linear(normed, self.out_proj, matmul_dtype).to(normed.dtype)

    def mix(self, u: Tensor) -> Tensor:
        """Mix a whole sequence with the fastest code for u's device: (b, l, d) -> (b, l, d)."""
        path = kernels.path_for(u)
        if path == "own":
            return self.forward(u)[0]
        if not kernels.split_conv1d_takes(self.config.d_conv, self.d_conv_in):
            path = "conv1d_and_chunk_scan"
        return mix_with_kernels(self, u, path, matmul_dtype_for(self.compute_dtype, u))

    def forward(self, u: Tensor, state: LayerState | None = None) -> tuple[Tensor, LayerState]:
        """Mix a sequence u (b, l, d) that follows `state` (None: at the start of a text).

        Returns the output (b, l, d) and the state after it.
        """
        taps = self.config.d_conv - 1
        z, xbc, dt = self.project(u)
        past = xbc.new_zeros(len(u), taps, self.d_conv_in) if state is None else state[0]
        window = torch.cat([past, xbc], dim=1)  # (b, taps + l, i + 2 g n)
        convolved = causal_conv_silu(window, self.conv1d.weight, self.conv1d.bias)
        x, B, C = self.split(convolved)
        y, ssm_state = ssd_scan(x, dt, -torch.exp(self.A_log), B, C, self.D, chunk_size=CHUNK_SIZE,
                                initial_state=None if state is None else state[1],
                                matmul_dtype=matmul_dtype_for(self.compute_dtype, u))
        return self.finish(y, z), (window[:, window.shape[1] - taps:], ssm_state)


LayerState = tuple[Tensor, Tensor]
"""The last d_conv - 1 inputs of the convolution (b, d_conv - 1, i + 2 g n) and H (b, h, p, n)."""


def mix_with_kernels(mixer: Mamba2Mixer, u: Tensor, path: kernels.KernelPath,
                     matmul_dtype: torch.dtype) -> Tensor:
    """Mix a whole sequence with the official kernels: (b, l, d) -> (b, l, d)."""
    combined = kernels.ssd_kernels()
    config = mixer.config
    A = -torch.exp(mixer.A_log)
    limits = {"dt_limit": (config.dt_lower, math.inf if config.dt_upper is None
                           else config.dt_upper)} if config.limits_dt else {}
    zxbcdt = linear(u, mixer.in_proj, matmul_dtype)
    if path == "split_conv1d_scan":
        y = combined.mamba_split_conv1d_scan_combined(
            zxbcdt, mixer.conv1d.weight.flatten(1), mixer.conv1d.bias, mixer.dt_bias, A, mixer.D,
            chunk_size=kernels.CHUNK_SIZE, activation="silu", rmsnorm_weight=mixer.norm.weight,
            rmsnorm_eps=config.norm_eps, headdim=config.headdim, ngroups=config.ngroups,
            norm_before_gate=False, **limits)
        return linear(y, mixer.out_proj, matmul_dtype).to(u.dtype)
    z, xbc, dt = zxbcdt.split([mixer.d_inner, mixer.d_conv_in, mixer.heads], dim=-1)
    past = F.pad(xbc.transpose(1, 2), (config.d_conv - 1, 0))
    convolved = F.conv1d(past, mixer.conv1d.weight.to(xbc.dtype),
                         None if mixer.conv1d.bias is None else mixer.conv1d.bias.to(xbc.dtype),
                         groups=mixer.d_conv_in).transpose(1, 2)
    x, B, C = mixer.split(F.silu(convolved))
    y = combined.mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=kernels.CHUNK_SIZE, D=mixer.D,
                                           dt_bias=mixer.dt_bias, dt_softplus=True, **limits)
    return mixer.finish(y.to(u.dtype), z.to(u.dtype))


def linear(x: Tensor, layer: nn.Linear, matmul_dtype: torch.dtype) -> Tensor:
    """Apply a linear layer in matmul_dtype, which is also the type of the result."""
    bias = None if layer.bias is None else layer.bias.to(matmul_dtype)
    return F.linear(x.to(matmul_dtype), layer.weight.to(matmul_dtype), bias)


def matmul_dtype_for(compute_dtype: torch.dtype, x: Tensor) -> torch.dtype:
    """The type of matrix products: compute_dtype, but fp64 if the model is in fp64."""
    return x.dtype if x.dtype == torch.float64 else compute_dtype


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mamba2Mixer(config, compute_dtype)


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
        self.backbone = Backbone(config, vocab_size, compute_dtype)
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False, device="meta")
        self.lm_head.weight = self.backbone.embedding.weight if config.tie_embeddings else \
            nn.Parameter(torch.empty(vocab_size, config.d_model))

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
        return self.hidden_of(F.embedding(input_ids, self.backbone.embedding.weight))

    def hidden_of(self, residual: Tensor) -> Tensor:
        """Hidden states after the final norm, from embedded tokens: (b, l, d) -> (b, l, d)."""
        for block in self.backbone.layers:
            assert isinstance(block, Block)
            residual = residual + block.mixer.mix(block.norm(residual))
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
            chunk = chunk_tokens(weight, matmul_dtype, add)
            start, end = end, end + max(1, chunk // length)
            # The layers take fewer tokens at a time, so that their activations stay in the cache.
            ids = input_ids[start:end].split(max(1, chunk_tokens(weight, matmul_dtype) // length))
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
        sequence = input_ids.shape[1] * self.config.n_layer * self.config.d_model
        most = GPU_ACTIVATIONS[kernels.path_for(weight)]
        for ids in input_ids.split(max(1, most // sequence)):
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
        return loss

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

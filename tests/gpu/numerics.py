"""Whether a GPU computes what is right: the head, the sums and the kernels against fp64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedrun.aggregation.base import Aggregator
from fedrun.aggregation.blocks import residual_of
from fedrun.aggregation.bounds import Bounds
from fedrun.aggregation.exact import MOMENTS, ExactAggregator
from fedrun.aggregation.int4 import Int4Aggregator
from fedrun.aggregation.int8 import BLOCK, Int8Aggregator
from fedrun.aggregation.update import ServerUpdate
from fedrun.flags import resolve
from fedrun.model.config import ModelConfig
from fedrun.model.kernels import on_gpu
from fedrun.model.loss import linear_cross_entropy, predictive_entropy
from fedrun.model.mamba2 import Mamba2LM
from fedrun.model.mixer import Mamba2Mixer
from fedrun.strategies.base import ServerRound, Strategy
from fedrun.strategies.fed_avg import FedAvg
from fedrun.strategies.fed_entropy import FedEntropy
from fedrun.strategies.fed_fisher import FedFisher
from fedrun.strategies.fed_opt import FedAdam
from tests.gpu.checks import DETERMINISTIC, Found, Job, check

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def magnitude(error: float) -> float:
    """Its absolute value; infinite for NaN, which `max` may pass over."""
    return math.inf if math.isnan(error) else abs(error)


def distance(ours: Tensor, exact: Tensor) -> float:
    """Relative, in the Euclidean norm, where the exact one is."""
    ours, exact = ours.detach().to(exact.device).double(), exact.detach().double()
    return magnitude(float((ours - exact).norm() / exact.norm().clamp(min=1e-30)))


def judged(errors: dict[str, float], bars: dict[str, float]) -> Found:
    """Whether each error is below the bar whose name its own begins with."""
    ok = all(error < next(bar for start, bar in bars.items() if name.startswith(start))
             for name, error in errors.items())
    return Found(ok, {name: float(f"{error:.2e}") if math.isfinite(error) else str(error)
                      for name, error in errors.items()},  # JSON has no infinity
                 {name: f"< {bar:g}" for name, bar in bars.items()})


@check(90)
def head(job: Job) -> Found:
    """The fused head's loss, entropy and gradients against plain fp64 on the GPU: the largest
    error of each over all shapes. Two chunks, and ragged ones."""
    vocabulary, widths, counts = 50257, [512, 768, 2048], [1, 1020, 4095, 5000]
    if job.pretended:
        vocabulary, widths, counts = 300, [64], [1, 200, 4200]
    errors: dict[str, float] = {}
    for width in widths:
        weight = torch.randn(vocabulary, width, device=CUDA) / width**0.5
        for count in counts:
            hidden = torch.randn(count, width, device=CUDA)
            targets = torch.randint(vocabulary, (count,), device=CUDA)
            h, w = (t.double().requires_grad_() for t in (hidden, weight))
            logits = h @ w.T
            exact = F.cross_entropy(logits, targets, reduction="sum")
            grads = torch.autograd.grad(exact, (h, w))
            exact = exact.detach()
            logs = logits.detach().log_softmax(1)
            entropy = -(logs.exp() * logs).sum()
            del logits, logs
            for name, dtype in DTYPES.items():
                ours_h, ours_w = (t.clone().requires_grad_() for t in (hidden, weight))
                loss = linear_cross_entropy(ours_h, ours_w, targets, dtype)
                loss.backward()
                with torch.no_grad():
                    alone = linear_cross_entropy(hidden, weight, targets, dtype)
                measured = predictive_entropy(hidden, weight, dtype)
                few = " of one token" if count == 1 else ""  # which nothing averages
                found = {"loss" + few: float(loss.detach() - exact) / count,
                         "loss alone" + few: float(alone - exact) / count,
                         "entropy": float(measured - entropy) / count}
                assert ours_h.grad is not None
                assert ours_w.grad is not None
                found |= {"hidden": distance(ours_h.grad, grads[0]),
                          "weight": distance(ours_w.grad, grads[1])}
                for part, error in found.items():
                    key = f"{name} {part}"
                    errors[key] = max(errors.get(key, 0.0), magnitude(error))
    return judged(errors, {"fp32": 1e-5, "bf16 hidden": 2e-3, "bf16 weight": 2e-3,
                           "bf16 entropy": 2e-3, "bf16 loss of one": 1e-2,
                           "bf16 loss alone of one": 1e-2, "bf16": 5e-4})


# ---- sums ----------------------------------------------------------------------------------------

BOUND, CLIENTS = 2.0**-10, 5
BOUNDED = ("momentum", "rms")
METHODS: dict[str, tuple[Strategy, tuple[str, ...]]] = {  # and the moments that are averaged
    "fed_avg": (FedAvg(), ()), "averaged moments": (FedAvg(), MOMENTS),
    "averaged roots": (FedAvg(), BOUNDED), "fed_fisher": (FedFisher(), ()),
    "fed_entropy": (FedEntropy(), ()), "fed_adam": (FedAdam(), ()), "int8": (FedAvg(), ()),
    "int8, averaged roots": (FedAvg(), BOUNDED), "int4": (FedAvg(), ()),
    "int4, averaged roots": (FedAvg(), BOUNDED)}


def client_vectors(size: int) -> Iterator[dict[str, Tensor]]:
    """Those of CLIENTS clients: the first is at the bound, the third has a NaN, the fourth is
    beyond the bound."""
    for client in range(CLIENTS):
        made = torch.Generator().manual_seed(client)
        delta, *rest = (torch.rand(size, generator=made) for _ in range(4))
        delta = (2 * delta - 1) * BOUND
        if client == 0:
            delta[::7] = BOUND
        if client == 2:
            delta[size // 2] = torch.nan
        if client == 3:
            delta[-1] = 1.5 * BOUND
        yield {"delta": delta, "fisher": rest[0], "exp_avg": rest[1] - 0.5, "exp_avg_sq": rest[2],
               "momentum": rest[1] - 0.5, "rms": rest[2],
               "peaks": torch.stack([block.max() for block in rest[2].split(BLOCK)]),
               **{residual_of(name): torch.zeros(size) for name in ("delta", *BOUNDED)}}


def summed(name: str, size: int, device: torch.device) -> dict[str, Any]:
    """The buffer, who is left out, and the model after the server's update."""
    strategy, averaged = METHODS[name]
    like = torch.zeros((), device=device)
    moments = {n: torch.zeros(size, device=device) for n in averaged}
    wanted = [*strategy.inputs, *averaged]
    terms: Aggregator
    if name.startswith("int8"):
        terms = Int8Aggregator(strategy, size, like, CLIENTS, CLIENTS, moments=averaged)
    elif name.startswith("int4"):
        terms = Int4Aggregator(strategy, size, like, CLIENTS, CLIENTS, CLIENTS, moments=averaged)
    else:
        terms = ExactAggregator(strategy, size, like, True, averaged)
    if isinstance(terms, Int8Aggregator | Int4Aggregator):
        terms.averages = moments
        wanted += ["peaks", *map(residual_of, ("delta", *averaged))]
    if averaged and "scales" in terms.carried:
        terms.carried["scales"].fill_(1.0)
    terms.begin(Bounds(BOUND))
    left_out = []
    for vectors in client_vectors(size):
        there = {n: vectors[n].to(device) for n in wanted}
        left_out.append(terms.add(there, 1 / CLIENTS))
    terms.reduce()
    model = torch.linspace(-1, 1, size).to(device)
    state = {n: torch.full((size,), v, device=device) for n, v in strategy.state.items()}
    buffer = terms.buffer.cpu()
    ServerUpdate(strategy, terms).apply(model, state, ServerRound(1, 1e-3), moments)
    return {"buffer": buffer, "model": model.cpu(),
            "left out": [i for i, why in enumerate(left_out) if why]}


@check(120)
def sums(job: Job) -> Found:
    """The same client vectors on the CPU and on the GPU: a round's buffer has equal bits."""
    size = (1 << 17) + 77 if job.pretended else (1 << 24) + 77
    value: dict[str, Any] = {}
    ok = True
    for name in METHODS:
        ours, theirs = (summed(name, size, device) for device in (CUDA, CPU))
        # Of 1, the largest parameter: where a step cancels a parameter, ulps of the rest are many.
        ulps = magnitude(float((ours["model"] - theirs["model"]).abs().max()) * 2**23)
        value[name] = {"equal": torch.equal(ours["buffer"], theirs["buffer"]),
                       "left out": ours["left out"], "model differs by (ulp of 1)": ulps}
        exact = name in ("fed_avg", "averaged moments", "averaged roots")
        ok &= (value[name]["equal"] and ours["left out"] == theirs["left out"] == [2, 3]
               and ulps <= (0 if exact else 1))
    return Found(ok, value, "equal buffers; [2, 3] left out; equal models of FedAvg, within an ulp "
                 "of 1 else")


# ---- kernels -------------------------------------------------------------------------------------

def mixers(presets: Sequence[str]) -> Iterator[tuple[Mamba2Mixer, int]]:
    """Mixers of several shapes, and lengths of sequences: below, at and above a chunk. Few, since
    each shape of a mixer compiles all kernels."""
    for preset in presets:
        config = resolve("fed_avg", {"config": preset}).model
        assert isinstance(config, ModelConfig)
        for groups in (1, 2) if preset == "tiny" else (1,):
            model = Mamba2LM(dataclasses.replace(config, ngroups=groups), 8)
            model.init_weights(0)
            for length in (200, 256, 300) if groups == 1 else (200,):
                mixer = model.backbone.layers[0].mixer
                assert isinstance(mixer, Mamba2Mixer)
                yield mixer, length


def compared(presets: Sequence[str]) -> dict[str, float]:
    """The largest error of a mixer's output and gradients against our own code in fp64 on the CPU,
    by type; and whether a second pass has other bits."""
    errors = {f"{dtype} {part}": 0.0 for dtype in DTYPES for part in ("forward", "gradients")}
    errors["other bits"] = 0.0
    for mixer, length in mixers(presets):
        u = torch.randn(2, length, mixer.config.d_model)
        grad = torch.randn_like(u)
        exact = passes(mixer, u, grad, CPU, torch.float64)
        for name, dtype in DTYPES.items():
            mixer.compute_dtype = dtype
            ours, again = (passes(mixer, u, grad, CUDA, torch.float32) for _ in range(2))
            for part, chosen in (("forward", slice(0, 1)), ("gradients", slice(1, None))):
                worst = max(distance(a, b) for a, b in zip(ours[chosen], exact[chosen],
                                                           strict=True))
                errors[f"{name} {part}"] = max(errors[f"{name} {part}"], worst)
            errors["other bits"] += sum(not torch.equal(a, b)
                                        for a, b in zip(ours, again, strict=True))
    return errors


def passes(mixer: Mamba2Mixer, u: Tensor, grad: Tensor, device: torch.device, dtype: torch.dtype
           ) -> list[Tensor]:
    """Output and gradients: of the input and, by name, of the parameters."""
    mixer.to(device=device, dtype=dtype)
    mixer.zero_grad()
    leaf = u.to(device, dtype).requires_grad_()
    y = mixer.mix(leaf)
    y.backward(grad.to(device, y.dtype))
    assert leaf.grad is not None
    grads = [p.grad for _, p in sorted(mixer.named_parameters())]
    # Copies, since those of the parameters move with them.
    result = [y.detach(), leaf.grad, *(g.clone() for g in grads if g is not None)]
    mixer.to(device=CPU, dtype=torch.float32)
    return result


NO_TRITON = "mamba-ssm's kernels need Triton"


@check(200, not_pretended=NO_TRITON, env={"TRITON_F32_DEFAULT": "ieee", **DETERMINISTIC})
def kernels(job: Job) -> Found:
    """mamba-ssm's kernels in fp32 that is fp32, and in bf16; twice the same bits."""
    assert on_gpu() != "own", "mamba-ssm is not installed"
    errors = compared(["tiny", "pure_ssm_1_layer"])
    return judged(errors, {"fp32 forward": 1e-4, "fp32 gradients": 1e-3,
                           "bf16 forward": 2e-2, "bf16 gradients": 5e-2, "other bits": 0.5})


@check(200, not_pretended=NO_TRITON, env=DETERMINISTIC)
def kernels_by_default(job: Job) -> Found:
    """The same as Triton multiplies fp32 by default, which is TF32."""
    assert on_gpu() != "own", "mamba-ssm is not installed"
    errors = compared(["tiny"])
    return judged(errors, {"fp32 forward": 2e-3, "fp32 gradients": 1e-2,
                           "bf16 forward": 2e-2, "bf16 gradients": 5e-2, "other bits": 0.5})


@check(60)
def own_scan(job: Job) -> Found:
    """The path without mamba-ssm, in torch's own operators, on the GPU."""
    import fedrun.model.kernels as paths
    patched: Any = paths
    patched.on_gpu = lambda: "own"
    errors = compared(["tiny"])
    del errors["other bits"]  # nothing asked for it
    return judged(errors, {"fp32 forward": 1e-4, "fp32 gradients": 1e-3,
                           "bf16 forward": 2e-2, "bf16 gradients": 5e-2})

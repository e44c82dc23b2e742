"""What a local step launches on a GPU, and where the host waits in it: counted on a pretended one.

    python -m tests.pretended_cuda python -m tests.pretended_cuda.local_step            # a table
    python -m tests.pretended_cuda python -m tests.pretended_cuda.local_step --json

mamba-ssm's kernels are not here, and not counted: tensors of the same shapes stand for what they
compute. Operators are counted, copies among them; a GPU may launch several kernels for one. The
counts do not depend on the width of a model or its vocabulary, so both are small.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedrun.federation.client import Client
from fedrun.flags import resolve
from fedrun.model import kernels
from fedrun.model.config import ModelConfig
from fedrun.model.kernels import KernelPath
from fedrun.model.mamba2 import Mamba2LM
from fedrun.strategies.base import FisherSettings
from fedrun.training.fisher import FisherEstimate
from fedrun.training.optimizer import LocalOptimizer
from fedrun.training.params import FlatParams
from tests.pretended_cuda.cuda_module import uncounted

DEVICE = torch.device("cuda", 0)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYERS, SEQUENCES, LENGTH = (1, 2, 4), (4, 16), 256
SHAPE, VOCABULARY = ModelConfig(d_model=16, d_state=8, headdim=8), 64
PATHS: tuple[KernelPath, ...] = get_args(KernelPath)
FISHER: dict[str, FisherSettings | None] = {
    "no": None, "batch": FisherSettings("batch"), "sequence": FisherSettings("sequence"),
    "corrected": FisherSettings("corrected")}


class _StandIn(torch.autograd.Function):
    """In place of a kernel of mamba-ssm: a tensor of its first input's type and of the given shape,
    and gradients for all inputs. Nothing of it counts."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*inputs)
        first = inputs[0]
        assert first is not None
        with uncounted():
            return first.new_full(shape, 0.1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with uncounted():
            return (None, *(None if t is None else torch.full_like(t, 1e-3)
                            for t in ctx.saved_tensors))


def chunk_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor,
               dt_bias: Tensor, **_: Any) -> Tensor:
    """`mamba_chunk_scan_combined`: (b, l, h, p)."""
    y: Tensor = _StandIn.apply(x.shape, x, dt, A, B, C, D, dt_bias)
    return y


def split_conv1d_scan(zxbcdt: Tensor, conv_weight: Tensor, conv_bias: Tensor | None,
                      dt_bias: Tensor, A: Tensor, D: Tensor, *, rmsnorm_weight: Tensor, **_: Any
                      ) -> Tensor:
    """`mamba_split_conv1d_scan_combined`: (b, l, i)."""
    shape = (*zxbcdt.shape[:2], len(rmsnorm_weight))
    y: Tensor = _StandIn.apply(shape, zxbcdt, conv_weight, conv_bias, dt_bias, A, D,
                               rmsnorm_weight)
    return y


def use_kernels(path: KernelPath) -> None:
    """Make the model take this path on a GPU."""
    patched: Any = kernels
    patched.on_gpu = lambda: path
    patched.ssd_kernels = lambda: SimpleNamespace(
        mamba_chunk_scan_combined=chunk_scan, mamba_split_conv1d_scan_combined=split_conv1d_scan)


def trainer(layers: int, sequences: int, dtype: str, fisher: str = "no", prox_mu: float = 0.0,
            grad_clip: str = "none", length: int = LENGTH) -> Callable[[], object]:
    """A function that makes one local step of a small model on DEVICE."""
    config = resolve("fed_avg", {"batch_size": str(sequences), "grad_clip": grad_clip})
    model = Mamba2LM(dataclasses.replace(SHAPE, n_layer=layers), VOCABULARY, DTYPES[dtype])
    model.init_weights(0)
    model.to(DEVICE)
    flat = FlatParams(model)
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=(3 * sequences, length))
    client = Client(0, np.arange(len(tokens)), tokens.astype(np.uint16), flat, config,
                    LocalOptimizer(flat, config, 100))
    settings = FISHER[fisher]
    estimate = FisherEstimate(flat, settings) if settings else None
    return functools.partial(client.train, model, 1, 0, anchor=flat.vector.clone(),
                             prox_mu=prox_mu, fisher=estimate)


def counts(step: Callable[[], object]) -> tuple[dict[str, int], dict[str, int]]:
    """Launches and waits of a step by name, after one that makes what all later ones use."""
    ops = torch.ops.pretended_cuda
    step()
    ops.launches(), ops.waits()
    step()
    return dict(ops.launches()), dict(ops.waits())


def table(paths: Sequence[KernelPath]) -> list[dict[str, Any]]:
    """The counts of a step without Fisher information, for every shape."""
    rows: list[dict[str, Any]] = []
    for path in paths:
        use_kernels(path)
        for dtype in DTYPES:
            for sequences in SEQUENCES:
                for layers in LAYERS:
                    launched, waited = counts(trainer(layers, sequences, dtype))
                    rows.append({"kernels": path, "dtype": dtype, "sequences": sequences,
                                 "layers": layers, "launches": sum(launched.values()),
                                 "waits": sum(waited.values()), "launched": launched})
    return rows


def waits() -> dict[str, dict[str, int]]:
    """What the host waits for in a step, by what the step does besides training."""
    found = {}
    for path in PATHS:
        use_kernels(path)
        for fisher in FISHER:
            extra: dict[str, Any] = {"prox_mu": 0.1, "grad_clip": "1.0"} if fisher == "no" else {}
            for dtype in DTYPES:
                step = trainer(1, 4, dtype, fisher, length=32, **extra)
                found[f"{path}, {dtype}, Fisher: {fisher}"] = counts(step)[1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true",
                        help="launches on the fastest path, and waits, as one JSON object")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.json:
        json.dump({"launches": table(PATHS[:1]), "waits": waits()}, sys.stdout)
        return
    rows = table(PATHS)
    print("| kernels | products | sequences | " + " | ".join(f"{n} layers" for n in LAYERS)
          + " |\n|---|---|---|" + "---|" * len(LAYERS))
    for start in range(0, len(rows), len(LAYERS)):
        first = rows[start]
        numbers = " | ".join(str(row["launches"]) for row in rows[start:start + len(LAYERS)])
        print(f"| {first['kernels']} | {first['dtype']} | {first['sequences']} x {LENGTH} "
              f"| {numbers} |")


if __name__ == "__main__":
    main()

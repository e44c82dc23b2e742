"""Memory of a gradient with --checkpoint_activations and --micro_batch, and of AdamW's state with
--moments_dtype.

    python -m tests.benchmarks.memory              # seconds; markdown

Memory is counted by torch's allocator: the most that a gradient takes at one time above the
parameters and their gradients. `GPU`: the way in which a GPU computes a gradient, a whole batch at
a time, run on the CPU with this repository's own layers, which keep more than mamba-ssm's kernels.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from fedrun.flags import resolve
from fedrun.model.config import ModelConfig
from fedrun.model.mamba2 import Mamba2LM
from fedrun.training.optimizer import LocalOptimizer
from fedrun.training.params import FlatParams
from tests.benchmarks.common import machine
from tests.support.allocations import peak_bytes

HEADER = """\
| as on a | recomputed | micro-batch | memory (MiB) | of the first |
|---|---|---|---|---|"""
SETTINGS: tuple[tuple[bool, int | None], ...] = ((False, None), (False, 1), (True, None), (True, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = Mamba2LM(ModelConfig(n_layer=args.layers, d_model=args.width, headdim=32, d_state=64),
                     args.vocab)
    model.init_weights(0)
    flat = FlatParams(model)
    ids = torch.randint(args.vocab, (args.batch, args.length),
                        generator=torch.Generator().manual_seed(0))
    print(machine())
    print(f"\n{args.layers} layers of width {args.width}, {flat.size / 1e6:.1f} million "
          f"parameters, {args.batch} sequences of {args.length}:\n\n{HEADER}")
    for place, gradient in (("CPU", model._grad_in_chunks), ("GPU", model._grad_on_gpu)):
        model._grad_in_chunks = gradient  # type: ignore[method-assign]
        rows(place, model, ids)
    print("\n| --moments_dtype | bytes a parameter of AdamW's state |\n|---|---|")
    for kind in ("fp32", "bf16"):
        optimizer = LocalOptimizer(flat, resolve("central", {"moments_dtype": kind}), 100)
        optimizer.update(1e-6)
        size = sum(t.nbytes for name, t in optimizer.state.items() if name != "step")
        print(f"| {kind} | {size / flat.size:.0f} |")


def rows(place: str, model: Mamba2LM, ids: torch.Tensor) -> None:
    model.compute_grad(ids)  # memory that is kept between calls
    first = 0
    for model.recompute, model.micro_batch in SETTINGS:
        peak = peak_bytes(partial(model.compute_grad, ids))
        first = first or peak
        print(f"| {place} | {'yes' if model.recompute else ''} | {model.micro_batch or ''} "
              f"| {peak / 2**20:.1f} | {peak / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()

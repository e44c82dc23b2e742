"""A local step with --dp example beside the same step without: one process, one thread.

    python -m tests.benchmarks.private_step              # a minute or two; markdown
    python -m tests.benchmarks.private_step --layers 1 --vocab 50257 --steps 3

Both take turns step by step, so that a change in the machine's speed affects both: medians of CPU
seconds of one thread. The private step has no fixed number of sequences, so its samples are given:
batch_size of them, the mean. The gradients of single sequences are timed alone too, and so is the
noise; the rest is clipping, integers and their digest.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

import fedrun.federation.private_gradient as module
from fedrun.federation.client import Client
from fedrun.federation.private_gradient import PrivateGradient
from fedrun.flags import resolve
from fedrun.model.config import ModelConfig
from fedrun.model.mamba2 import Mamba2LM
from fedrun.privacy.example_level import ExampleLevel
from fedrun.secure.noise import BLOCK, stream
from fedrun.training.optimizer import LocalOptimizer
from fedrun.training.params import FlatParams
from tests.benchmarks.common import machine

HEADER = """\
| layers, width, vocabulary | parameters | batch | length | step (s) | private (s) | ratio \
| single gradients (s) | noise (s) | rest (s) |
|---|---|---|---|---|---|---|---|---|---|"""


def row(layers: int, width: int, vocab: int, batch: int, length: int, steps: int) -> str:
    model = Mamba2LM(ModelConfig(n_layer=layers, d_model=width, d_state=64, headdim=32), vocab)
    model.init_weights(0)
    flat = FlatParams(model)
    config = resolve("fed_avg", {"batch_size": str(batch), "sequence_length": str(length)})
    sequences = np.random.default_rng(0).integers(0, vocab, (64, length)).astype(np.uint16)
    optimizer = LocalOptimizer(flat, config, 1000)
    client = Client(0, np.arange(64), sequences, flat, config, optimizer)
    level = ExampleLevel(1.0, 1.0, flat.size, batch, 1, (batch / 64,))
    gradients = PrivateGradient(level, flat)
    gradients.begin(bytes(32))
    chosen = np.arange(batch)
    module.poisson_sample = lambda *_: chosen

    def plain() -> None:
        model.compute_grad(client.next_batch())
        optimizer.update(1e-4)

    def private() -> None:
        gradients.write(model, client)
        optimizer.update(1e-4)

    def single() -> None:
        for number in chosen:
            model.compute_grad(torch.from_numpy(sequences[number:number + 1].astype(np.int64)))

    def noise() -> None:
        for block in range(-(-flat.size // BLOCK)):
            level.sampler.sample(stream(bytes(32), block), min(BLOCK, flat.size - block * BLOCK))

    one, protected, alone, drawn = taking_turns(steps, plain, private, single, noise)
    return (f"| {layers}, {width}, {vocab:,} | {flat.size / 1e6:.2f} M | {batch} | {length} "
            f"| {one:.3f} | {protected:.3f} | {protected / one:.2f} | {alone:.3f} | {drawn:.3f} "
            f"| {protected - alone - drawn:.3f} |")


def taking_turns(rounds: int, *works: Callable[[], object]) -> list[float]:
    """Median CPU seconds of each work, after a turn to warm up."""
    spent: list[list[float]] = [[] for _ in works]
    for _ in range(rounds + 1):
        for times, work in zip(spent, works, strict=True):
            began = time.thread_time()
            work()
            times.append(time.thread_time() - began)
    return [statistics.median(times[1:]) for times in spent]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocab", type=int, nargs="+", default=[1000, 50257])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), HEADER, sep="\n")
    for layers in given.layers:
        for vocab in given.vocab:
            print(row(layers, given.width, vocab, given.batch, given.length, given.steps),
                  flush=True)


if __name__ == "__main__":
    main()

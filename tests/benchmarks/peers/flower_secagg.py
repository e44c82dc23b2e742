"""Flower's side of secure_sum.py: the arithmetic of its SecAgg+, with the commands of ranks.py.

    python -m tests.benchmarks.peers.flower_secagg updates.npy REPETITIONS

A client does what `secaggplus_mod` does in its second stage: multiply by the weight, quantise, add
the private mask and one for each neighbour. The server does what `SecAggPlusWorkflow` does: add,
take off the private masks, restore. All with Flower's own functions and default ranges; no
messages, keys or shares. A command is the clipping range, or 0 for Flower's default.
"""

from __future__ import annotations

import argparse
import inspect
import os
import statistics
import time
from typing import Any

import numpy as np
from flwr.common.secure_aggregation import ndarrays_arithmetic as arithmetic
from flwr.common.secure_aggregation.quantization import dequantize, quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.server.workflow import SecAggPlusWorkflow

from tests.benchmarks.ranks import Commands, end_with_parent

DEFAULTS = {name: one.default for name, one in
            inspect.signature(SecAggPlusWorkflow.__init__).parameters.items()}
TARGET, MODULUS = DEFAULTS["quantization_range"], DEFAULTS["modulus_range"]


class Round:
    """One sum over all clients, each with the largest weight, under fresh seeds."""

    def __init__(self, updates: np.ndarray, clip: float) -> None:
        count = len(updates)
        self.updates, self.clip = updates, clip
        self.private = [os.urandom(32) for _ in range(count)]
        self.shared = {frozenset((a, b)): os.urandom(44)  # as long as Flower's
                       for a in range(count) for b in range(a)}

    def masks(self, client: int, shapes: list[tuple[int, ...]]) -> Any:
        """The masks of a client, each with whether it is added."""
        yield pseudo_rand_gen(self.private[client], MODULUS, shapes), True
        for other in range(len(self.updates)):
            if other != client:
                seed = self.shared[frozenset((client, other))]
                yield pseudo_rand_gen(seed, MODULUS, shapes), client > other

    def quantized(self, client: int) -> list[np.ndarray]:
        factor = TARGET  # of the largest weight
        scaled = arithmetic.parameters_multiply([self.updates[client]], factor / TARGET)
        return list(arithmetic.factor_combine(factor, quantize(scaled, self.clip, TARGET)))

    def masked(self, client: int, quantized: list[np.ndarray]) -> list[np.ndarray]:
        for mask, adds in self.masks(client, [one.shape for one in quantized]):
            change = arithmetic.parameters_addition if adds else arithmetic.parameters_subtraction
            quantized = change(quantized, mask)
        return list(arithmetic.parameters_mod(quantized, MODULUS))

    def unmasked(self, sent: list[list[np.ndarray]]) -> list[np.ndarray]:
        total = sent[0]
        for one in sent[1:]:
            total = arithmetic.parameters_addition(total, one)
        total = arithmetic.parameters_mod(total, MODULUS)
        for seed in self.private:
            mask = pseudo_rand_gen(seed, MODULUS, arithmetic.get_parameters_shape(total))
            total = arithmetic.parameters_subtraction(total, mask)
        return list(arithmetic.parameters_mod(total, MODULUS))

    def mean(self, total: list[np.ndarray]) -> np.ndarray:
        factor, quantized = arithmetic.factor_extract(total)
        vector: np.ndarray
        vector, = dequantize(quantized, self.clip, TARGET)
        vector += -(len(self.updates) - 1) * self.clip
        vector *= TARGET / factor
        return vector


def measure(updates: np.ndarray, clip: float, repetitions: int) -> dict[str, float]:
    """CPU seconds of a client and of the server; how far the sum is from that without masks, and
    the mean from that in float64."""
    clients, sums = [], []
    for _ in range(repetitions + 1):
        one = Round(updates, clip)
        plain, sent = [], []
        for client in range(len(updates)):
            began = time.process_time()
            plain.append(one.quantized(client))
            sent.append(one.masked(client, plain[-1]))
            clients.append(time.process_time() - began)
        began = time.process_time()
        total = one.unmasked(sent)
        mean = one.mean(total)
        sums.append(time.process_time() - began)
        true = [sum(parts) for parts in zip(*plain, strict=True)]
        masks = max(float(np.abs(a - b).max()) for a, b in zip(total, true, strict=True))
    return {"client": statistics.median(clients[len(updates):]), "sum": statistics.median(sums[1:]),
            "masks": masks, "difference": float(np.abs(mean - updates.mean(0, np.float64)).max())}


def main() -> None:
    commands = Commands()
    end_with_parent()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("updates", help="a file: (clients, elements) float32")
    parser.add_argument("repetitions", type=int)
    arguments = parser.parse_args()
    updates = np.load(arguments.updates)
    while (clip := commands.next()) is not None:
        commands.answer(measure(updates, clip or DEFAULTS["clipping_range"],
                                arguments.repetitions))


if __name__ == "__main__":
    main()

"""One side of the comparison in step.py: `python -m tests.benchmarks.sides ours ...`.

ours: a step as `fedrun` trains, with fused AdamW on one flat vector, and a batch of an evaluation.
stock: transformers.Mamba2ForCausalLM as installed, with torch.optim.AdamW, and its forward pass;
bf16 is under torch.autocast.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as fedrun's own entry point does

import torch

from fedrun.flags import resolve
from fedrun.model import mamba2, ssd
from fedrun.model.config import ModelConfig
from fedrun.model.convert import to_transformers_config
from fedrun.model.mamba2 import Mamba2LM
from fedrun.training.optimizer import LocalOptimizer
from fedrun.training.params import FlatParams
from tests.benchmarks.common import answer, median_seconds, peak_mib, resident_mib, seconds
from tests.benchmarks.floor import adamw_seconds, product_seconds, products

VOCAB = 50257  # GPT-2's
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ADAMW: dict[str, Any] = {"lr": 5e-4, "weight_decay": 0.01}


class Ours:
    """A training step of `fedrun`: gradients in one flat vector, AdamW on another."""

    def __init__(self, config: ModelConfig, arguments: argparse.Namespace) -> None:
        self.config, self.dtype = config, DTYPES[arguments.dtype]
        self.model = Mamba2LM(config, VOCAB, self.dtype)
        self.model.init_weights(0)
        self.flat = FlatParams(self.model)
        self.adamw = LocalOptimizer(self.flat, resolve("fed_avg", {}), total_steps=1)
        self.batch = torch.randint(VOCAB, (arguments.batch, arguments.length))

    def train(self) -> None:
        self.model.compute_grad(self.batch)
        self.adamw.step(0)

    @torch.no_grad()
    def evaluate(self) -> None:
        """One batch of an evaluation."""
        self.model.loss(self.batch)

    def floor(self) -> float:
        shapes = products(self.config, VOCAB, *self.batch.shape)
        return (sum(product_seconds(shape, self.dtype) for shape in shapes)
                + adamw_seconds(self.flat.size))

    def parts(self) -> dict[str, float]:
        """Mean seconds that a step spends in the head, the scan, AdamW and everything else."""
        spent = dict.fromkeys(("head", "scan", "adamw"), 0.0)

        def timed(part: str, work: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                start = time.perf_counter()
                result = work(*args, **kwargs)
                spent[part] += time.perf_counter() - start
                return result
            return run

        steps, scan = 5, ssd._Scan
        with contextlib.ExitStack() as undo:
            for owner, name, part in ((scan, "forward", "scan"), (scan, "backward", "scan")):
                original = getattr(owner, name)
                setattr(owner, name, staticmethod(timed(part, original)))
                undo.callback(setattr, owner, name, staticmethod(original))
            patched: Any = mamba2
            head = patched.linear_cross_entropy_gradients
            patched.linear_cross_entropy_gradients = timed("head", head)
            undo.callback(setattr, mamba2, "linear_cross_entropy_gradients", head)
            adamw = timed("adamw", bind(self.adamw.step, 0))
            total = 0.0
            for _ in range(steps):
                total += seconds(lambda: self.model.compute_grad(self.batch))
                total += seconds(adamw)
        found = {part: value / steps for part, value in spent.items()}
        return found | {"rest": total / steps - sum(found.values())}

    def token(self) -> dict[str, float]:
        """Seconds to generate one token, by length of the prompt."""
        found = {}
        for length in (16, 256, 2048):
            logits, state = self.model.prefill(torch.zeros(1, length, dtype=torch.long))
            work = bind(self.model.step, logits.argmax(-1), state)
            found[str(length)] = median_seconds(work, 31)
        return found


class Stock:
    """A training step with transformers."""

    def __init__(self, config: ModelConfig, arguments: argparse.Namespace) -> None:
        from transformers import Mamba2Config, Mamba2ForCausalLM

        theirs = to_transformers_config(config, VOCAB)
        theirs.chunk_size = Mamba2Config().chunk_size
        self.model = Mamba2ForCausalLM(theirs)
        self.adamw = torch.optim.AdamW(self.model.parameters(), **ADAMW)
        self.batch = torch.randint(VOCAB, (arguments.batch, arguments.length))
        self.bf16 = arguments.dtype == "bf16"

    def train(self) -> None:
        self.adamw.zero_grad()
        self.loss().backward()
        self.adamw.step()

    @torch.no_grad()
    def evaluate(self) -> None:
        """The forward pass with the loss of one batch."""
        self.loss()

    def loss(self) -> torch.Tensor:
        """Mean loss of the batch: a 0-dim tensor."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss: torch.Tensor = self.model(self.batch, labels=self.batch).loss
        return loss


def bind(work: Callable[..., object], *args: object) -> Callable[[], object]:
    return lambda: work(*args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("ours", "stock"))
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    build = Ours if arguments.side == "ours" else Stock
    # A small model first, so that code loaded by the first step does not count as its memory.
    build(ModelConfig(d_model=16, d_state=16, headdim=16), argparse.Namespace(
        **vars(arguments) | {"batch": 1, "length": 16})).train()
    before = resident_mib()
    one = build(ModelConfig(n_layer=arguments.layers), arguments)
    commands = {name: getattr(one, name) for name in ("floor", "parts", "token")
                if hasattr(one, name)}
    answer(commands | {"step": lambda: seconds(one.train),
                       "evaluation": lambda: seconds(one.evaluate),
                       "memory": lambda: peak_mib() - before})


if __name__ == "__main__":
    main()

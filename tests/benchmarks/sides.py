"""One side of the comparison, in a process of its own: `python -m tests.benchmarks.sides ours ...`.

ours: as `fedrun` trains, AdamW fused on one flat vector. stock: transformers.Mamba2ForCausalLM as a
user gets it, with torch.optim.AdamW; in bf16 under torch.autocast.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as fedrun's own entry point does

import torch

from fedrun.config import ModelConfig
from fedrun.model import mamba2, ssd
from fedrun.model.generate import prefill, step
from fedrun.model.mamba2 import Mamba2LM
from fedrun.params import FlatParams
from tests.benchmarks.common import (
    Commands,
    answer,
    median_seconds,
    peak_mib,
    resident_mib,
    seconds,
)
from tests.benchmarks.floor import adamw_seconds, product_seconds

VOCAB = 50257  # GPT-2's
LR = 5e-4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[], object]


def batch_of(arguments: argparse.Namespace) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCAB, (arguments.batch, arguments.length), generator=generator)


def ours(arguments: argparse.Namespace) -> Commands:
    before = resident_mib()
    model = Mamba2LM(ModelConfig(n_layer=arguments.layers), VOCAB, DTYPES[arguments.dtype])
    model.init_weights(0)
    flat = FlatParams(model)
    adamw = torch.optim.AdamW([flat.parameter()], lr=LR, weight_decay=0.01, fused=True)
    batch = batch_of(arguments)

    def train() -> None:
        flat.grad.zero_()
        model.accumulate_grad(batch)
        adamw.step()

    def floor() -> float:
        return product_seconds(train) + adamw_seconds(flat.size)

    def evaluate() -> None:
        with torch.no_grad():
            model.loss(batch)

    return {"step": lambda: seconds(train), "memory": lambda: peak_mib() - before,
            "floor": floor, "parts": lambda: parts(train, adamw),
            "evaluate": lambda: median_seconds(evaluate), "token": lambda: token_seconds(model)}


def stock(arguments: argparse.Namespace) -> Commands:
    from transformers import Mamba2ForCausalLM

    from fedrun.model.convert import to_transformers_config

    before = resident_mib()
    config = to_transformers_config(ModelConfig(n_layer=arguments.layers), VOCAB)
    config.chunk_size = type(config)().chunk_size
    model = Mamba2ForCausalLM(config)
    adamw = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    batch = batch_of(arguments)
    low = (torch.autocast("cpu", torch.bfloat16) if arguments.dtype == "bf16"
           else contextlib.nullcontext())

    def train() -> None:
        adamw.zero_grad()
        with low:
            result = model(batch, labels=batch).loss
        result.backward()
        adamw.step()

    return {"step": lambda: seconds(train), "memory": lambda: peak_mib() - before}


def parts(train: Step, adamw: torch.optim.Optimizer) -> dict[str, float]:
    """Mean seconds of a step in the head, the scan, AdamW and all the rest."""
    spent = dict.fromkeys(("head", "scan", "adamw"), 0.0)

    def timed(part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = work(*args, **kwargs)
            spent[part] += time.perf_counter() - start
            return result
        return run

    steps = 5
    with contextlib.ExitStack() as replaced:
        for owner, name, part in ((mamba2, "linear_cross_entropy_gradients", "head"),
                                  (ssd._Scan, "forward", "scan"), (ssd._Scan, "backward", "scan"),
                                  (adamw, "step", "adamw")):
            original = getattr(owner, name)
            wrapped = timed(part, original)
            setattr(owner, name, staticmethod(wrapped) if owner is ssd._Scan else wrapped)
            replaced.callback(setattr, owner, name,
                              staticmethod(original) if owner is ssd._Scan else original)
        total = sum(seconds(train) for _ in range(steps))
    found = {part: value / steps for part, value in spent.items()}
    return found | {"rest": total / steps - sum(found.values())}


def token_seconds(model: Mamba2LM) -> dict[str, float]:
    """Seconds for one more token after prompts of some lengths."""
    found = {}
    for length in (16, 256, 2048):
        logits, state = prefill(model, torch.zeros(1, length, dtype=torch.long))
        again = functools.partial(step, model, logits.argmax(-1), state)
        found[str(length)] = median_seconds(again, 31)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("ours", "stock"))
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    answer({"ours": ours, "stock": stock}[arguments.side](arguments))


if __name__ == "__main__":
    main()

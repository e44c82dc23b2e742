"""How fast a step is, what it launches, what memory it takes; what a client's turn costs."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fedrun.federation.client import Client
from fedrun.federation.client_store import InMemory, make_store
from fedrun.flags import resolve
from fedrun.model.config import ModelConfig
from fedrun.model.mamba2 import Mamba2LM
from fedrun.records.folders import Folders
from fedrun.strategies.base import FisherSettings
from fedrun.training.fisher import FisherEstimate
from fedrun.training.optimizer import LocalOptimizer
from fedrun.training.params import FlatParams
from tests.benchmarks.floor import products
from tests.gpu.checks import DETERMINISTIC, Found, Job, check
from tests.gpu.hardware import median, milliseconds

CUDA = torch.device("cuda")
VOCABULARY = 50257
TINY = ModelConfig(n_layer=1, d_model=64, d_state=16, headdim=16)
PEAK = 989.0  # TFLOP/s of an H100's dense bf16 products


class Trainer:
    """A client that trains a model on the GPU, on random tokens."""

    def __init__(self, shape: ModelConfig, sequences: int, length: int, vocabulary: int,
                 **changed: str) -> None:
        self.config = resolve("fed_avg", {"batch_size": str(sequences),
                                          "num_clients": "4", **changed})
        self.model = Mamba2LM(shape, vocabulary, torch.bfloat16)
        self.model.init_weights(0)
        self.model.to(CUDA)
        self.flat = FlatParams(self.model)
        tokens = np.random.default_rng(0).integers(vocabulary, size=(2 * sequences, length))
        self.client = Client(0, np.arange(len(tokens)), tokens.astype(np.uint16), self.flat,
                             self.config, LocalOptimizer(self.flat, self.config, 1000))
        self.anchor = self.flat.vector.clone()

    def step(self, fisher: FisherEstimate | None = None, prox_mu: float = 0.0) -> None:
        self.client.train(self.model, 1, 0, anchor=self.anchor, prox_mu=prox_mu, fisher=fisher)


@check(60, env=DETERMINISTIC)  # so that no blocks are timed
def waits_in_a_step(job: Job) -> Found:
    """torch refuses to wait in a local step: plain, with Fisher information, prox and clip."""
    trainer = Trainer(TINY, 4, 64, 400, grad_clip="1.0")
    steps: dict[str, Callable[[], None]] = {
        "plain": trainer.step, "prox and clip": lambda: trainer.step(prox_mu=0.1)}
    for estimate in ("batch", "sequence", "corrected"):
        fisher = FisherEstimate(trainer.flat, FisherSettings(estimate))
        steps[f"Fisher: {estimate}"] = functools.partial(trainer.step, fisher)
    waited = []
    for name, step in steps.items():
        for _ in range(2):
            step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(2):
                step()
        except RuntimeError as error:
            waited.append(f"{name}: {str(error)[:200]}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Found(not waited, waited or f"none of {len(steps)} steps waits", "no wait")


@check(90, not_pretended="no graphs", env=DETERMINISTIC)
def capturable(job: Job) -> Found:
    """A CUDA graph holds a local step: two replays, at two learning rates, have the bits of two
    steps that were launched. No token occurs twice: sums over tokens have no order here, since
    torch's deterministic ones may wait."""
    trainer = Trainer(TINY, 4, 64, 400, grad_clip="1.0")
    flat, optimizer = trainer.flat, trainer.client.optimizer
    batch = trainer.client.next_batch()
    batch.copy_(torch.randperm(400)[:batch.numel()].view(batch.shape))
    rate = torch.full((), 1e-3, device=CUDA)

    def step() -> torch.Tensor:
        loss, _ = trainer.model.compute_grad(batch)
        optimizer.update(rate)
        return loss

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    states = {"parameters": flat.vector, "gradient": flat.grad, **optimizer.state}
    before = {name: tensor.clone() for name, tensor in states.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return loss.clone()

    def twice(work: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
        """What two steps leave, from the same start."""
        for name, tensor in states.items():
            tensor.copy_(before[name])
        left = {}
        for value in (1e-3, 5e-4):
            rate.fill_(value)
            left[f"loss at {value:g}"] = work()
        return left | {name: tensor.clone() for name, tensor in states.items()}

    replayed, eager, again = twice(replay), twice(step), twice(step)
    value = {"other bits": [n for n, t in eager.items() if not torch.equal(t, replayed[n])],
             "other bits without a graph": [n for n, t in eager.items()
                                            if not torch.equal(t, again[n])],
             "moved": not torch.equal(replayed["parameters"], before["parameters"])}
    return Found(bool(value["moved"] and not value["other bits"]), value, "no other bits; moved")


def launched(work: Callable[[], object]) -> tuple[int, float]:
    """The kernels that a call launches, and their share of its time."""
    from torch.profiler import ProfilerActivity, profile
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        began = time.perf_counter()  # the profiler itself has started
        work()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    kernels = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    return len(kernels), sum(event.device_time for event in kernels) / 1e6 / seconds


# Milliseconds of a step as they were estimated for an H100.
STEPS: dict[str, tuple[ModelConfig, int, int, float | None]] = {
    **{f"27 to 33 M, {layers} layers, {n} x 256":
       (ModelConfig(n_layer=layers), n, 256, {(1, 4): 2.0, (4, 4): 6.0}.get((layers, n)))
       for layers in (1, 2, 4) for n in (4, 16)},
    "130 M, 4 x 1024": (ModelConfig(n_layer=24, d_model=768), 4, 1024, 32.0),
    "130 M, 16 x 1024": (ModelConfig(n_layer=24, d_model=768), 16, 1024, 128.0),
    "1.3 B, 4 x 1024": (ModelConfig(n_layer=48, d_model=2048), 4, 1024, 140.0)}


@check(400)
def steps(job: Job) -> Found:
    """Time, share of the peak, launches and memory of a step of several models."""
    chosen = dict(STEPS)
    vocabulary, repetitions = VOCABULARY, 20
    if job.pretended:
        chosen, vocabulary, repetitions = {"tiny, 4 x 64": (TINY, 4, 64, None)}, 400, 2
    value: dict[str, Any] = {}
    ok = True
    for name, (shape, sequences, length, expected) in chosen.items():
        need = 30 * shape.parameters(vocabulary)
        if torch.cuda.mem_get_info()[0] < need:
            value[name] = f"needs {need / 2**30:.0f} GiB"
            continue
        torch.cuda.reset_peak_memory_stats()
        trainer = Trainer(shape, sequences, length, vocabulary)
        ms = median(milliseconds(trainer.step, repetitions))
        flop = sum(2 * 3 * n * rows * inner * columns for n, rows, inner, columns
                   in products(shape, vocabulary, sequences, length))
        value[name] = {
            "ms": round(ms, 2), "tokens/s": round(1e3 * sequences * length / ms),
            "TFLOP/s": round(flop / ms / 1e9, 1), "share of an H100's peak":
            round(flop / ms / 1e9 / PEAK, 3),
            "GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
        if not job.pretended:
            kernels, busy = launched(trainer.step)
            value[name] |= {"launches": kernels, "busy": round(busy, 2)}
        ok &= expected is None or ms < 2 * expected
        del trainer
        torch.cuda.empty_cache()
    return Found(ok, value, {name: f"< {2 * ms:g} ms" for name, (*_, ms) in chosen.items() if ms})


@check(90, env=DETERMINISTIC)  # so that no blocks are timed
def client_states(job: Job) -> Found:
    """Four clients on a worker: memory on the GPU and pinned, and the time of a turn, with states
    in the host's memory and with them on the GPU. A turn has enough steps for a state, 220 MB, to
    move both ways beside them."""
    local_steps = 1 if job.pretended else 20
    shape, vocabulary = (TINY, 400) if job.pretended else (ModelConfig(), VOCABULARY)
    trainer = Trainer(shape, 4, 256, vocabulary)
    trainer.step()
    client, size = trainer.client, trainer.flat.size
    made = client.release_state()
    states = {k: {name: t.clone() for name, t in made.items()} for k in range(4)}
    del made

    def turns(take: Callable[[int], Any], put: Callable[[int, Any], None],
              announce: Callable[[int], None]) -> tuple[float, int]:
        """Milliseconds of a turn and the peak of the GPU's memory, after a first round."""
        for rounds in (1, 5):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            for turn in range(4 * rounds):
                client.load_state(take(turn % 4))
                announce((turn + 1) % 4)
                for _ in range(local_steps):
                    trainer.step()
                put(turn % 4, client.release_state())
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - began) / 20, torch.cuda.max_memory_allocated()

    on_device, all_four = turns(states.__getitem__, states.__setitem__, lambda _: None)
    before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    config: Any = trainer.config
    store = make_store(config, Folders.of(config), states, CUDA)
    assert isinstance(store, InMemory)
    by_torch = torch.cuda.host_memory_stats()["allocated_bytes.current"] - before
    states.clear()
    torch.cuda.empty_cache()
    stored, some = turns(store.checkout, store.checkin, store.prefetch)
    moving = [tensor for memory in store._memory.values() for tensor in memory.values()
              if tensor.is_floating_point()]
    pinned = sum(tensor.nbytes for tensor in moving)
    locked = all(tensor.is_pinned() for tensor in moving)
    store.close(30)
    held = 4 - (all_four - some) / (8 * size)
    value = {"ms a turn, stored": round(stored, 2), "ms a turn, on the GPU": round(on_device, 2),
             "pinned bytes a parameter and client": round(pinned / size / 4, 2),
             "all of it pinned": locked,
             # Memory that the driver locks in place is not in torch's count.
             "pinned by": "torch, rounded up" if by_torch >= pinned else "the driver, in place",
             "states on the GPU at a time": round(held, 2)}
    fast = locked and stored < 1.05 * on_device
    return Found(held < 2.5 and (job.pretended or fast), value,
                 f"a turn of {local_steps} steps within 5 %; 8 bytes, all pinned; two states")

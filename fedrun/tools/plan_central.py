"""What a central run takes: the one process of central.py, counted as in plan_memory.py."""

from __future__ import annotations

from collections import Counter
from typing import Any

import psutil
import torch

from fedrun.config import CentralConfig
from fedrun.model.build import outlined_model
from fedrun.records.provenance import central_length
from fedrun.tools.plan_counting import Counting
from fedrun.tools.plan_memory import (
    CHECKPOINT,
    COMPARED,
    GRADIENTS,
    LIBRARIES,
    MOMENTS,
    OUTER,
    PARAMETERS,
    SCRATCH,
    TEMPORARY,
    Trained,
    Trains,
    bytes_of,
    client_of,
    evaluation,
    gradient,
    way_of,
)
from fedrun.tools.plan_ranks import Rank, of_writing
from fedrun.training.outer import OuterOptimizer
from fedrun.training.params import FlatParams


def process(config: CentralConfig, vocab_size: int, gpu: bool) -> Trains:
    """The process while it makes a step, and while it evaluates."""
    counted = {config.batch_size: gradient(config, vocab_size, config.batch_size, gpu)}
    evaluated, outer, compared = evaluation(config, vocab_size, gpu), None, []
    outlined = outlined_model(config, vocab_size)
    with Counting() as count, way_of(gpu):
        with count.item(PARAMETERS):
            flat = FlatParams(outlined)
        count.name(GRADIENTS, flat.grad)
        if config.outer_every is not None:
            with count.item(OUTER):
                outer = OuterOptimizer(flat, config)
        if config.rounds != 1:  # of the last evaluated step, and of the last one
            with count.item(COMPARED):
                compared = [flat.grad.clone() for _ in range(2)]
        with count.item(SCRATCH):
            client = client_of(config, flat, gpu)
        with count.item(MOMENTS):
            client.optimizer.begin_at(1)
        model: Any = Trained(count, counted)
        with count.item(TEMPORARY):
            client.train(model, 1, 0)
            muon_flop = count.flop  # a counted gradient is not computed again
            if outer is not None:
                outer.after(outer.every)
            if compared:
                torch.nn.functional.cosine_similarity(flat.grad, compared[0], dim=0)
                flat.grad.clone()  # beside the one that it replaces
        count.besides(evaluated.items)
    kept = {"model": flat.vector} | dict(zip(("last_gradient", "previous_gradient"), compared,
                                            strict=False))
    return Trains(flat, +count.peak, dict(client.state()),
                  kept | (outer.state() if outer is not None else {}), model.flop, muon_flop)


def ranks(config: CentralConfig, found: Trains, gpu: bool) -> list[Rank]:
    """The only one."""
    host = Counter({LIBRARIES: psutil.Process().memory_info().rss}) + of_writing(config, found)
    if config.checkpoint_freq is not None:
        host[CHECKPOINT] = bytes_of(found.kept) + found.state_bytes
    device = found.items if gpu else Counter[str]()
    return [Rank("the process", device, host if gpu else host + found.items)]


def length(config: CentralConfig, shards: list[int] | None) -> tuple[int, bool]:
    """The steps of the run, and whether they are known: else one, as an example. shards: sequences
    of each client, if the text is tokenised."""
    if shards is None:
        return config.rounds or 1, config.rounds is not None
    return central_length(config, sum(shards)).steps, True

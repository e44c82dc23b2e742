"""What a run writes, and what its workers send."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fedrun.aggregation.bounds import Bounds
from fedrun.config import FederatedConfig, RunConfig
from fedrun.federation.client_store import OnDisk, kind_of_store
from fedrun.federation.schedule import Schedule
from fedrun.records.checkpoint import CHECKPOINTS_KEPT, DTYPES, file_size
from fedrun.tools.plan_memory import Trains, Worker
from fedrun.tools.plan_protected import word_bytes
from fedrun.tools.plan_ranks import Layout


@dataclass(frozen=True)
class Files:
    """Bytes of the files that grow with the model."""

    left: dict[str, int]
    """In the run's folder at the end, by what they hold."""
    meanwhile: dict[str, int]
    """Besides, while it runs."""
    checkpoint: int
    """Of one checkpoint; the server's part, where sites have their own."""
    at_site: dict[str, int]
    """In the folder of the site with the most clients, at the end."""


def files(config: RunConfig, found: Trains, layout: Layout, rounds: int) -> Files:
    """Of a run of so many rounds, with the states of all clients once each has trained."""
    model = _model_size(dict(found.flat.views(found.flat.vector)))
    clients, state = 1, file_size(found.state)
    if isinstance(config, FederatedConfig):
        clients, state = config.num_clients, state * config.keeps_states
    if layout.sites:
        clients = max(site.clients for site in layout.sites.sites)
    checkpoint = file_size(found.kept) + clients * state * (layout.sites is None)
    evaluated = evaluations(config, rounds)
    params, deltas = (_snapshot_size(found, prefix) for prefix in ("", "delta_"))
    left = {"the model": model}
    if config.keep == "best":
        left["the best model"] = model
    if params:
        left["snapshots"] = params + evaluated * (params + deltas)
        if isinstance(config, FederatedConfig) and config.save_client_deltas:
            left["snapshots of clients"] = evaluated * config.cohort_size * (params + deltas)
    meanwhile, at_site = {}, dict[str, int]()
    if (every := config.checkpoint_freq) is not None:
        saved = len({*range(every, rounds + 1, every), rounds})
        kept = min(saved, CHECKPOINTS_KEPT)
        left[f"{kept} checkpoint{'s' * (kept > 1)}"] = kept * checkpoint
        if saved > kept:
            meanwhile["a checkpoint that is written"] = checkpoint
        if layout.sites:
            at_site[f"clients' states of {kept} checkpoint{'s' * (kept > 1)}"] = (
                kept * clients * state)
    if (isinstance(config, FederatedConfig) and state
            and kind_of_store(config, layout.hosted(clients), layout.gpu) is OnDisk):
        meanwhile["states of clients (--client_store disk)"] = clients * state
    return Files(left, meanwhile, checkpoint, at_site)


def evaluations(config: RunConfig, rounds: int) -> int:
    """How often a run of so many rounds is evaluated."""
    return len({1, *range(config.val_freq, rounds + 1, config.val_freq), rounds})


def _model_size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a file that the library safetensors writes."""
    header: dict[str, object] = {}
    end = 0
    for name, tensor in sorted(tensors.items()):
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + math.ceil(length / 8) * 8 + end


def _snapshot_size(found: Trains, prefix: str) -> int:
    """Bytes of a file with the tracked parameters; 0 without any."""
    tracked = found.flat.names.tracked
    if not tracked:
        return 0
    empty = io.BytesIO()
    arrays: dict[str, Any] = {prefix + name: np.empty(0, np.float32) for name in tracked.values()}
    np.savez(empty, **arrays)
    return len(empty.getvalue()) + found.tracked_bytes


# ---- what is sent --------------------------------------------------------------------------------

@dataclass(frozen=True)
class Sent:
    """Bytes of the sums of a run's rounds."""

    most: int
    """A term's, in the round that sends the most: what a client adds to the sum."""
    mean: float
    """The same over all rounds."""
    recorded: int
    """What the history says at the end: every client's term up, and the sum down."""
    senders: int
    """Workers that send vectors; 0: they share memory, or there is one."""
    words: int
    """Sent by the first worker, or that of a site, beside vectors in a round that is evaluated."""


def sent(config: FederatedConfig, found: Worker, layout: Layout, rounds: int, schedule: Schedule
         ) -> Sent:
    """Of this many rounds."""
    bounds = Bounds(1.0)
    of_round = dict[tuple[str, ...], tuple[int, int]]()
    rows = 0 if found.rows is None else found.rows.buffer.nbytes
    terms, both_ways = [], 0
    for number in range(1, rounds + 1):
        moments = schedule.moments(number)
        if moments not in of_round:
            found.aggregator.begin(bounds, moments)
            of_round[moments] = found.aggregator.bytes_sent, found.aggregator.bytes_received
        besides = rows if schedule.averages_rows(number) else 0
        terms.append(of_round[moments][0] + besides)
        both_ways += sum(of_round[moments]) + 2 * besides
    senders = layout.workers if layout.gpu else min(layout.machines, layout.workers)
    if layout.sites:
        senders = len(layout.sites.sites)
    return Sent(max(terms), sum(terms) / rounds, config.cohort_size * both_ways,
                senders if senders > 1 else 0,
                word_bytes(config, layout, schedule.sites, evaluated=True))

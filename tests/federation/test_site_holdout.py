"""The loss on what the sites hold out: its words, who computes which batch, and its mask."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from fedrun.distributed.data_plane import DataPlane, Mask
from fedrun.federation.schedule import Schedule
from fedrun.federation.secure_sum import COUNT, HOLDOUT, TAIL, VECTOR, SecureSum
from fedrun.federation.site_holdout import LARGEST_LOSS, SiteLosses, sum_of_sites
from fedrun.model.base import Model
from fedrun.secure import Replayed
from fedrun.secure.identity import Identity
from fedrun.secure.masks import Session
from fedrun.training.evaluate import BATCH_SEQUENCES, Piece
from tests.support.site_runs import config_with, make_sites


def pieces(count: int) -> list[Piece]:
    draw = random.Random(count)
    return [(n, draw.uniform(100, 6000), draw.randrange(100, 600)) for n in range(count)]


def test_words_hold_the_sums_over_the_batches() -> None:
    made = pieces(40)
    found = SiteLosses.of(made)
    tokens = sum(count for *_, count in made)
    mean = math.fsum(loss for _, loss, _ in made) / tokens
    assert found.record() == {
        "site_val_loss": pytest.approx(mean, rel=1e-9), "site_val_tokens": tokens,
        "site_val_ppl": pytest.approx(math.exp(mean), rel=1e-8)}
    assert SiteLosses(*found.words()) == found
    parts = [SiteLosses.of(made[start::7]).words() for start in range(7)]
    assert [sum(words) for words in zip(*parts, strict=True)] == found.words()
    assert SiteLosses.of([]).words() == [0, 0, 0]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 1e300])
def test_a_loss_that_does_not_fit_makes_the_sum_infinite_and_not_wrong(loss: float) -> None:
    found = SiteLosses.of([(0, 50.0, 10), (1, loss, 1 << 31)])
    assert (found.clamped, found.tokens) == (1, 10 + (1 << 31))
    assert found.losses == (50 << 20) + (LARGEST_LOSS << 51) < 1 << 62
    record = found.record()
    assert record["site_val_loss"] == record["site_val_ppl"] == math.inf


class Ones:
    """A model whose loss of a batch is the sum of its tokens."""

    def loss(self, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        assert len(rows) <= BATCH_SEQUENCES
        return rows.sum().float(), rows.numel()


class OneOf(DataPlane):
    """A worker of several, who reports what it would send."""

    def __init__(self, worker: int, workers: int) -> None:
        super().__init__()
        self.worker, self.workers = worker, workers

    def sum_words(self, words: Sequence[int], mask: Mask | None = None) -> list[int]:
        assert mask is None
        return list(words)


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_workers_share_the_batches_of_each_site(workers: int, tmp_path: Path) -> None:
    """In a simulation; batches of two sites are never joined."""
    sites = make_sites(tmp_path, 1, 1, 1)
    config = config_with(tmp_path)
    draw = np.random.default_rng(0)
    texts = [draw.integers(0, 400, (count, 4)).astype(np.uint16) for count in (40, 3, 17)]
    called, total = [0], [0, 0, 0]
    for worker in range(workers):
        secure = SecureSum(config, sites, Schedule(config, [20, 20, 20]), 50,
                           OneOf(worker, workers), 0)

        def count_batch() -> None:
            called[0] += 1

        words = sum_of_sites(secure, texts, cast("Model", Ones()), torch.device("cpu"), count_batch)
        total = [a + b for a, b in zip(total, words, strict=True)]
    whole = sum(int(text.astype(np.int64).sum()) for text in texts)
    assert total == [whole << 20, 60 * 4, 0]
    assert called[0] == 3 + 1 + 2


def test_its_mask_is_no_other_of_the_round_and_cancels(tmp_path: Path) -> None:
    names = ("north", "south", "east")
    identities = {name: Identity.create(tmp_path / name) for name in names}
    pinned = {name: identity.public for name, identity in identities.items()}
    sessions = {name: Session(name, identities[name], pinned) for name in names}
    nonces = {name: session.nonce for name, session in sessions.items()}
    plan = os.urandom(32)
    offers = {name: session.offer("run", nonces, plan) for name, session in sessions.items()}
    for session in sessions.values():
        session.agree(offers)
    streams, total = set(), np.zeros(3, np.int64)
    for number in (1, 2):
        for sum_name in (COUNT, VECTOR, TAIL, HOLDOUT):
            vector = np.zeros(3, np.int64)
            sessions["north"].mask(number, sum_name, 64).add_to(vector)
            streams.add(vector.tobytes())
    assert len(streams) == 8
    with pytest.raises(Replayed):
        sessions["north"].mask(2, HOLDOUT, 64)
    for number, name in enumerate(names):
        words = np.array(SiteLosses.of(pieces(10 + number)).words())
        plain = words.copy()
        sessions[name].mask(3, HOLDOUT, 64).add_to(words)
        assert not (words == plain).any()
        total += words
    everyone = [one for count in (10, 11, 12) for one in pieces(count)]
    assert total.tolist() == SiteLosses.of(everyone).words()

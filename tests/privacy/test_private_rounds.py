"""--dp client: rounds by hand, who can move them and how far, and what they leave behind."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fedrun.federation.noise as noise_module
from fedrun.aggregation.bounds import Bounds
from fedrun.aggregation.clipping import clip_
from fedrun.aggregation.exact import ExactAggregator
from fedrun.federation.client import Client
from fedrun.privacy.client_level import ClientLevel, update_bound
from fedrun.secure.noise import NoiseKey
from fedrun.strategies import FedAvg
from tests.support.private import CLIP, PUBLIC, releases, round_by_hand, run_private
from tests.support.runs import Outcome

Keys = list[bytes]
COHORT = 2


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The updates of all clients, in order, as they are before they are clipped."""
    found: list[np.ndarray] = []

    def recorded(update: Tensor, longest: float) -> bool:
        found.append(update.numpy().copy())
        return clip_(update, longest)

    monkeypatch.setattr(noise_module, "clip_", recorded)
    return found


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Keys:
    """The keys of all rounds."""
    found, made = [], NoiseKey.round_key

    def recorded(self: NoiseKey, binding: dict[str, str | int]) -> bytes:
        found.append(made(self, binding))
        return found[-1]

    monkeypatch.setattr(NoiseKey, "round_key", recorded)
    return found


def flat(model: dict[str, Tensor]) -> np.ndarray:
    return np.concatenate([model[name].numpy().ravel() for name in sorted(model)])


def test_rounds_by_hand_equal_those_of_fedrun_to_the_bit(
        tmp_path: Path, cache_dir: Path, updates: list[np.ndarray], keys: Keys) -> None:
    run = run_private(tmp_path, cache_dir, checkpoint_freq=1)
    assert run.code == 0
    lengths = [float(np.linalg.norm(u.astype(np.float64))) for u in updates]
    assert len(lengths) == 4
    assert min(lengths) > CLIP * 1.01, "all are clipped"
    first = load_file(run.run_dir / "checkpoints/step_000001/global.safetensors")["model"].numpy()
    made = round_by_hand(first, updates[2:], keys[1:], COHORT)
    assert np.array_equal(made, flat(run.model))


def test_clipping_is_exact_and_never_longer_than_it_says() -> None:
    random = torch.Generator().manual_seed(0)
    for size in (1, 1000, 200_000):  # several slices
        for spread in (1e-20, 1e-3, 1.0, 1e18):
            update = torch.randn(size, generator=random) * spread
            before = update.double()
            assert clip_(update, 0.5)
            length = float(before.norm())
            assert float(update.double().norm()) <= 0.5 * (1 + 2**-23)
            expected = before * min(1.0, 0.5 / length)
            torch.testing.assert_close(update.double(), expected, rtol=2**-22, atol=0)
    short = torch.full((70_000,), 1e-3)
    assert clip_(short, 0.5)
    assert bool((short == 1e-3).all()), "it is as short as that"
    for wrong in (math.nan, math.inf, -math.inf):
        update = torch.ones(70_000)
        update[69_999] = wrong
        assert not clip_(update, 0.5)
        assert not update.any()
    huge = torch.full((70_000,), 3e38)
    assert not clip_(huge, 1e-6), "its factor would be no normal number"
    assert not huge.any()


def summed(level: ClientLevel, updates: list[Tensor]) -> np.ndarray:
    """The integers of the sum of these clients' terms."""
    aggregator = ExactAggregator(FedAvg(), level.size, torch.zeros(1), exact=True)
    aggregator.begin(Bounds(update_bound(level.clip, level.noise, level.cohort)))
    assert aggregator.scale == level.scale
    for update in updates:
        own = update.clone()
        clip_(own, level.clip)
        assert not aggregator.add({"delta": own}, 1 / level.cohort)
    return aggregator.buffer.numpy().astype(np.int64)


@pytest.mark.parametrize("noise", [0.3, 20.0, 3e4])
def test_a_client_moves_the_sum_by_no_more_than_the_sensitivity(noise: float) -> None:
    """Zeroed, and replaced by others: of random updates, of one element, and its opposite."""
    level = ClientLevel(0.7, noise, 3, 30_000)
    random = torch.Generator().manual_seed(1)
    spread = torch.randn(30_000, generator=random)
    one = torch.zeros(30_000)
    one[7] = 1e3
    others = [torch.randn(30_000, generator=random) for _ in range(2)]
    moved = []
    for update in (spread, spread * 1e-4, one, torch.full((30_000,), math.nan)):
        with_it, zeroed, opposite, another = (
            summed(level, [*others, term]) for term in (update, torch.zeros(30_000), -update, one))
        assert with_it[-1] == zeroed[-1] == another[-1], "who is missing counts"
        assert np.linalg.norm(with_it - zeroed) <= level.sensitivity
        assert np.linalg.norm(with_it - opposite) <= 2 * level.sensitivity
        assert np.linalg.norm(with_it - another) <= 2 * level.sensitivity
        moved.append(float(np.linalg.norm(with_it - zeroed)) / level.sensitivity)
    assert moved[3] == 0, "an update that is not finite is no update"
    assert noise > 100 or moved[0] > 0.99, "the claim is no larger than it has to be"


def poisoned(monkeypatch: pytest.MonkeyPatch, client: int, value: float) -> None:
    """Let a client's parameters be this after its training."""
    train = Client.train

    def trained(self: Client, *args: Any, **kwargs: Any) -> Any:
        found = train(self, *args, **kwargs)
        if self.index == client:
            self.flat.vector.fill_(value)
        return found

    monkeypatch.setattr(Client, "train", trained)


@pytest.mark.slow
def test_a_client_that_is_not_finite_is_zero_and_nobody_hears_of_it(
        tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    def lengthy(client: int) -> None:
        def shortened(update: Tensor, longest: float) -> bool:
            order.append(next(turns))
            return clip_(update.zero_() if order[-1] == client else update, longest)

        order: list[int] = []
        turns = iter(plan)
        monkeypatch.setattr(noise_module, "clip_", shortened)

    plan = [k for record in run_private(tmp_path, cache_dir, name="plain", val_freq=1).history
            for k in record["cohort"]]
    client = plan[0]
    lengthy(client)
    zero = run_private(tmp_path, cache_dir, name="zero", val_freq=1)
    monkeypatch.setattr(noise_module, "clip_", clip_)
    before = len(releases(tmp_path))
    caplog.clear()
    poisoned(monkeypatch, client, math.nan)
    broken = run_private(tmp_path, cache_dir, name="broken", val_freq=1)
    assert broken.code == 0
    assert broken.bits == zero.bits
    assert len(releases(tmp_path)) == before, "the same sum: the same noise, at no cost"
    assert "finite" not in caplog.text
    assert "left out" not in caplog.text
    assert shown(broken) == shown(zero)


def shown(run: Outcome) -> list[str]:
    """All names that a run's history and events use."""
    return sorted({*itertools.chain(*run.history, *run.events)})


def test_nothing_of_a_client_is_written(tmp_path: Path, cache_dir: Path,
                                        caplog: pytest.LogCaptureFixture) -> None:
    run = run_private(tmp_path, cache_dir, method="fed_adam", val_freq=1)
    assert run.code == 0
    assert set(shown(run)) <= PUBLIC
    assert "snr_total" not in shown(run), "of an optimizer's steps there is none"
    assert "train ppl" not in caplog.text
    files = [path.relative_to(run.run_dir).as_posix() for path in run.run_dir.rglob("*")]
    assert not [name for name in files if "client" in name and not name.startswith("checkpoints/")]
    state = json.loads((run.run_dir / "checkpoints/step_000002/server.json").read_text())
    assert state["left_out"] == state["left_out_why"] == []
    assert state["clocks"]["_loss_sum"] == state["clocks"]["_loss_tokens"] == 0
    page = (run.run_dir / "privacy.md").read_text()
    spent = run.history[-1]["epsilon"]
    for words in (f"epsilon {spent:.3g} at delta 0.001", "| clients, in a round | 4, 2 |",
                  "| clip | 0.5,", "| noise multiplier | 1.5 times", "| 1 at most, of 2,",
                  "weights, denominator | 1/2 each", "validation split", "Not covered"):
        assert words in page
    assert [e["epsilon"] for e in run.events if e["event"] == "round"] == [
        r["epsilon"] for r in run.history] == sorted(r["epsilon"] for r in run.history)
    assert f"privacy: epsilon {spent:.4g} spent at delta 0.001; signal to noise" in caplog.text

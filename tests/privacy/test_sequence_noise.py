"""Keys of local steps with --dp example: the same for the same steps, others for anything else; and
what of them is charged."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedrun.federation.client import Client
from fedrun.federation.messages import RoundPlan
from fedrun.federation.noise_keeper import Keeper, TooMuchSpent, level_of, settings_of
from fedrun.federation.sequence_noise import SequenceNoise
from fedrun.federation.site_keys import digest_of
from fedrun.privacy.accountant import example_epsilon
from fedrun.privacy.example_level import ExampleLevel
from fedrun.training.optimizer import LocalOptimizer
from fedrun.training.params import FlatParams
from tests.support.private import (
    EXAMPLE,
    PROVENANCE,
    private_config,
    private_schedule,
    releases,
)

SIZE = 3000
TERMS = [1, 2, 3, 4]


def plan(number: int = 2, **flags: object) -> RoundPlan:
    return private_schedule(**flags).plan(number, 0.0)


def keeper(folder: Path, text: str = "text", provenance: dict[str, Any] | None = None,
           rounds: int = 9, **flags: object) -> Keeper:
    flags = EXAMPLE | flags
    config = private_config(**{"num_clients": 12, "cohort": 4, "rounds": rounds,
                               "dp_dir": folder / "keys"} | flags)
    schedule = private_schedule(**{"rounds": rounds} | flags)
    return Keeper(config, level_of(config, schedule, SIZE),
                  settings_of(config, schedule.noise, rounds), PROVENANCE | (provenance or {}),
                  text)


@pytest.mark.parametrize("changed", [
    {"text": "another"}, {"seed": 1}, {"lr": 1e-3}, {"local_updates": 2}, {"threads": 2},
    {"dp_clip": 0.4}, {"dp_noise": 1.4}, {"batch_size": 3}, {"dtype": "bf16"},
    {"provenance": {"versions": {"torch": "2"}}}, {"provenance": {"kernels": "own"}},
    {"provenance": {"init_from": "x"}}, {"prox_mu": 0.1, "local_updates": 2}], ids=str)
def test_whatever_is_changed_has_other_samples_and_noise(changed: dict[str, Any], tmp_path: Path
                                                         ) -> None:
    first = keeper(tmp_path)
    assert first.secret() == keeper(tmp_path).secret()
    first.release(plan(**EXAMPLE), "model", TERMS)
    other = keeper(tmp_path, **changed)
    assert other.secret() != first.secret()
    flags = {k: v for k, v in changed.items() if k not in ("text", "provenance")}
    assert other.release(plan(**(EXAMPLE | flags)), "model", TERMS)[1], "charged again"


@pytest.mark.parametrize("changed", [
    {"rounds": 12}, {"max_epsilon": 100}, {"val_freq": 7}, {"dataset": "elsewhere"},
    {"client_store": "disk"}, {"timeout": 9}], ids=str)
def test_what_decides_no_step_changes_nothing(changed: dict[str, Any], tmp_path: Path) -> None:
    first = keeper(tmp_path)
    first.release(plan(**EXAMPLE), "model", TERMS)
    other = keeper(tmp_path, **changed)
    assert other.secret() == first.secret()
    assert not other.release(plan(**EXAMPLE), "model", TERMS)[1]


def test_where_bits_are_not_repeatable_every_start_draws_afresh(tmp_path: Path) -> None:
    gpu: dict[str, Any] = {"provenance": {"gpu": "H200"}}
    assert keeper(tmp_path, **gpu).secret() != keeper(tmp_path, **gpu).secret()
    kept = [keeper(tmp_path, **gpu, deterministic=True).secret() for _ in range(2)]
    assert kept[0] == kept[1]


def test_the_log_has_rates_and_steps_and_what_they_cost(tmp_path: Path) -> None:
    first = keeper(tmp_path, local_updates=3, dp_delta=1e-5)
    cohort = plan(**EXAMPLE).cohort
    first.release(plan(**EXAMPLE), "model", TERMS)
    (release,) = releases(tmp_path)
    assert release[4:9] == ["sequence", cohort, 1.5, [2 / (8 * (k + 1)) for k in cohort], 3]
    again = keeper(tmp_path, local_updates=3, dp_delta=1e-5)
    assert again.standing.releases == [(2, (cohort, 1.5, release[7], 3))]
    assert again.standing.on_text == pytest.approx(
        example_epsilon(1.5, max(release[7]), 3, 1e-5), rel=1e-4)
    other = keeper(tmp_path, lr=0.5)
    assert other.standing.releases == []
    assert other.standing.on_text > 0, "on the same text"


def test_digests_are_of_bytes_whatever_the_type() -> None:
    vector = torch.arange(5.0)
    assert digest_of(vector) == hashlib.sha256(vector.numpy().tobytes()).hexdigest()
    # 0, 1, 2, 3, 4 in bf16 are the upper halves of the same in fp32.
    halves = vector.numpy().view("<u2")[1::2].tobytes()
    assert digest_of(vector.bfloat16()) == hashlib.sha256(halves).hexdigest()
    assert digest_of(torch.tensor(7.0)) == hashlib.sha256(np.float32(7).tobytes()).hexdigest()


def test_a_changed_round_is_refused_that_would_pass_max_epsilon(tmp_path: Path) -> None:
    rate = max(2 / (8 * (k + 1)) for k in plan(**EXAMPLE).cohort)
    limit = example_epsilon(1.5, rate, 2, 1e-3) * 1.01
    kept = keeper(tmp_path, max_epsilon=limit)
    for word in (1, 2):
        assert kept.release(plan(**EXAMPLE), "model", [word, 0, 0, 0])[1]
    with pytest.raises(TooMuchSpent, match="--max_epsilon"):
        kept.release(plan(**EXAMPLE), "model", [3, 0, 0, 0])
    assert not kept.release(plan(**EXAMPLE), "model", [1, 0, 0, 0])[1]


class Alone:
    """The data plane of one process."""

    of_site = False

    def sum_words(self, words: list[int]) -> list[int]:
        return words


class Linear(nn.Module):
    """As little of a model as has parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, SIZE))


def test_a_clients_key_is_of_all_that_its_steps_depend_on(tmp_path: Path) -> None:
    config = private_config(**EXAMPLE)
    flat = FlatParams(Linear())
    level = ExampleLevel(0.5, 1.5, SIZE, 2, 1, (0.1,) * 4)
    optimizer = LocalOptimizer(flat, config, 9)
    clients = [Client(k, np.arange(9), np.zeros((9, 32), np.uint16), flat, config, optimizer)
               for k in range(2)]
    plane: Any = Alone()
    noise = SequenceNoise(level, plane, keeper(tmp_path), flat)

    def key(client: int = 0, number: int = 1, of: SequenceNoise = noise) -> bytes:
        of.begin(clients[client], number)
        return of.gradients.key

    first = key()
    assert key() == first
    assert key(of=SequenceNoise(level, plane, keeper(tmp_path), flat)) == first
    found = [first, key(client=1), key(number=2),
             key(of=SequenceNoise(level, plane, keeper(tmp_path, seed=1), flat))]
    flat.vector[5] += 1
    found.append(key())
    optimizer.update(0.0)
    found.append(key())
    optimizer.state["exp_avg_sq"][7] = 1e-9
    found.append(key())
    clients[0].steps_done = 1
    found.append(key())
    assert len(set(found)) == len(found)
    noise.note_steps(clients[0])
    terms = list(noise._terms)
    noise.gradients.key = bytes(32)
    noise.note_steps(clients[0])
    assert noise._terms != [2 * term % 2**64 for term in terms], "the last key is in it"

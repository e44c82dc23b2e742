"""The mechanism of a local step on single sequences: sensitivity, noise, and what it costs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import fedrun.privacy.example_level as module
from fedrun.common.errors import InputError
from fedrun.privacy.accountant import example_epsilon, example_noise_for
from fedrun.privacy.example_level import ExampleLevel, multiplier
from tests.support.private import EXAMPLE, private_config, private_schedule

DELTA = 1e-3
RATES = (0.25, 0.1, 0.1, 0.05)


def level(noise: float = 1.5, clip: float = 0.5, size: int = 4000, steps: int = 3) -> ExampleLevel:
    return ExampleLevel(clip, noise, size, 4, steps, RATES)


@pytest.mark.parametrize(("noise", "clip"), [(1.5, 0.5), (0.3, 1e-6), (700.0, 3.0), (1e4, 1e6)])
def test_a_sequence_moves_the_sum_by_no_more_than_the_sensitivity(noise: float, clip: float
                                                                  ) -> None:
    """Its own integers, whatever others are in the sum; rounded away from zero at worst."""
    one = level(noise, clip, size=400_000)
    random = np.random.default_rng(0)
    worst = np.full(one.size, 0.5 + 1e-9)  # of a step, in every element
    furthest = 0.0
    for tail in (1.5, 3.0, 30.0, 0.0):
        gradient = random.standard_t(tail, one.size) if tail else worst
        length = float(np.linalg.norm(gradient))
        gradient *= min(1.0 if tail == 0 else math.inf, clip * one.scale / length)
        furthest = max(furthest, float(np.linalg.norm(np.rint(gradient))))
        assert furthest <= one.sensitivity
    assert furthest > 0.9 * one.sensitivity or noise > 1000
    assert clip * one.scale * max(1, noise) <= 2**26


def test_the_variance_is_that_of_the_multiplier_and_whole() -> None:
    one = level()
    assert one.scale == 2.0**26  # a clip of 0.5 with noise of 1.5: at most 1
    sigma = 1.5 * (0.5 * 2**26 * (1 + 2**-20) + math.sqrt(4000) / 2)
    assert one.variance.denominator == 1
    assert 4 <= one.variance - sigma**2 <= 5 + 1e-9 * sigma**2
    assert one.element == pytest.approx(1.5 * 0.5 / 4, rel=1e-5), "of the mean over four"
    with pytest.raises(InputError, match=r"--dp_noise 1e-08, .*: must be larger: .* from 10"):
        _ = level(1e-8).variance
    with pytest.raises(InputError, match=r"--dp_noise 1e\+07, .*: must be smaller"):
        _ = level(1e7).variance


def test_epsilon_is_of_the_client_that_has_paid_most() -> None:
    spent = level().spent(DELTA)
    assert spent.epsilon == 0
    for cohort in ([0, 1], [2, 3], [1, 2]):
        spent.add(cohort, 1.5, *level().sampled(cohort))
    each = [(0.25, 3), (0.1, 6), (0.1, 6), (0.05, 3)]
    assert spent.epsilon == pytest.approx(max(
        example_epsilon(1.5, rate, steps, DELTA) for rate, steps in each), rel=1e-4)
    for _ in range(4):
        spent = spent.after(1.5, [3])
    assert {cost[2] for cost in spent.by_client.values()} == {3, 6, 15}
    assert list(spent._worst()) == [(1.5, 0.25, 3), (1.5, 0.1, 6), (1.5, 0.05, 15)]


def test_where_steps_differ_all_count_as_the_dearest() -> None:
    spent = level().spent(DELTA)
    spent.add([1], 3.0, (0.2,), 5)
    spent.add([1], 1.5, (0.1,), 2)
    assert spent.epsilon == pytest.approx(example_epsilon(1.5, 0.2, 7, DELTA), rel=1e-4)
    with pytest.raises(ValueError, match="zip"):
        spent.add([1, 2], 1.5, (0.1,), 2)


def test_noise_that_the_sampler_cannot_vouch_for_costs_infinitely_much() -> None:
    weak = level(0.02, size=10**6).spent(DELTA)
    weak.add([0], 0.02, (0.25,), 3)
    assert math.isinf(weak.epsilon)
    assert weak.over(1e9)


def test_what_is_over_a_limit_is_found_with_few_computations(monkeypatch: pytest.MonkeyPatch
                                                            ) -> None:
    asked, compute = list[int](), module._epsilon

    def counted(noise: float, rate: float, steps: int, delta: float) -> float:
        asked.append(steps)
        return compute(noise, rate, steps, delta)

    monkeypatch.setattr(module, "_epsilon", counted)
    limit = example_epsilon(1.3, 0.25, 100, DELTA)
    spent = module.ExampleLevel(0.5, 1.3, 4000, 4, 3, RATES).spent(DELTA)
    assert spent.after(1.3, *[[0]] * 1000).over(limit), "the plan of the whole run"
    passed = next(number for number in itertools.count(1)
                  if spent.after(1.3, *[[0]] * number).over(limit))
    assert passed == 34, "102 steps are the first to cost more than 100"
    assert len(asked) < 20


def test_noise_follows_from_epsilon_the_smallest_shard_and_the_most_steps() -> None:
    config = private_config(**(EXAMPLE | {"dp_noise": None, "dp_epsilon": 2, "num_clients": 12,
                                          "cohort": 4, "rounds": 9, "local_updates": 5}))
    sizes = [8 * (k + 1) for k in range(12)]
    noise = multiplier(config, 9, sizes)
    assert noise == pytest.approx(example_noise_for(2, DELTA, 2 / 8, 15), rel=1e-3)
    assert example_epsilon(noise, 2 / 8, 15, DELTA) <= 2
    assert noise * 1e6 == round(noise * 1e6)
    assert multiplier(config, 10, sizes) > noise, "someone trains in four of ten rounds"
    assert private_schedule(**EXAMPLE).noise == 1.5


def test_delta_has_to_be_below_one_in_the_largest_shard() -> None:
    config = private_config(**EXAMPLE)
    with pytest.raises(InputError, match=r"--dp_delta 0\.001: must be below 1/1000 with --dp"):
        multiplier(config, 3, [10, 1000])
    assert multiplier(config, 3, [10, 999]) == 1.5


def test_without_dp_accounting_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules,
                        "dp_accounting.pld.privacy_loss_distribution", None)
    with pytest.raises(InputError, match=r"pip install 'fedrun\[privacy\]'"):
        private_schedule(**EXAMPLE)

"""Rounds that grow as the learning rate falls: which steps they have, and runs of them."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedrun.aggregation.bounds import adamw_step_bound, muon_step_bound
from fedrun.config import FederatedConfig
from fedrun.federation.schedule import Schedule
from fedrun.flags import resolve
from fedrun.model.build import longest_side
from fedrun.plots.run_folder import Record, from_settings, read_run
from tests.support.runs import FAULTY, Run, fault, without_clocks

LR = 0.016


def schedule_of(**flags: Any) -> Schedule:
    config = resolve("fed_avg", {"config": "tiny", "lr": LR, "lr_schedule": "cosine",
                                 "local_updates_schedule": "quadratic", **flags})
    assert isinstance(config, FederatedConfig)
    return Schedule(config, [10**5] * config.num_clients)


def rate(step: int, steps: int, warmup: int) -> float:
    """By hand: a line to one, then half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


@pytest.mark.parametrize(("rounds", "updates", "warmup"), [
    (34, 60, 100), (102, 20, 100), (7, 2, 0), (1, 5, 0), (500, 2, 3), (10, 8, 79)])
def test_which_steps_a_round_has(rounds: int, updates: int, warmup: int) -> None:
    """Each has about its part of the sum, no round is empty, and there are as many steps in all."""
    schedule, steps = schedule_of(rounds=rounds, local_updates=updates, warmup=warmup), 0
    counted = [1.1 if t < warmup else rate(t, rounds * updates, warmup)**2 + 0.1
               for t in range(rounds * updates)]
    part = math.fsum(counted) / rounds
    lengths = []
    for number in range(1, rounds + 1):
        plan = schedule.plan(number, 0.0)
        assert plan.first_step == steps
        steps += plan.steps
        lengths.append(plan.steps)
        reached = math.fsum(counted[:steps])
        # The step with which the part is reached is the round's last; or its only one.
        assert reached >= number * part * (1 - 1e-12)
        assert reached - counted[steps - 1] < number * part or plan.steps == 1
    assert steps == rounds * updates
    assert min(lengths) >= 1
    if updates > 2 and rounds > 10:
        assert lengths[0] <= updates / 2
        assert 4.9 * updates < lengths[-1] < 5.1 * updates
        assert all(a <= b + 1 for a, b in itertools.pairwise(lengths))


@pytest.mark.parametrize("warmup", [0, 9])
def test_at_a_constant_rate_rounds_are_equal(warmup: int) -> None:
    """So that a run can be trained further, as one of any length."""
    for rounds in (6, 12):
        flags = {"rounds": rounds, "local_updates": 8, "warmup": warmup, "lr_schedule": "constant"}
        schedule = schedule_of(**flags)
        assert [schedule.first_step(n) for n in range(1, 7)] == [0, 8, 16, 24, 32, 40]
        plain = schedule_of(**flags, local_updates_schedule="constant")
        assert schedule.plan(1, 0.0) == plain.plan(1, 0.0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_bound_of_a_round_is_that_of_its_rates(optimizer: str) -> None:
    """Not of the highest rate: rounds grow, and their grid with them would."""
    schedule = schedule_of(rounds=34, local_updates=60, warmup=100, local_optimizer=optimizer)
    plain = schedule_of(rounds=34, local_updates=60, warmup=100, local_optimizer=optimizer,
                        local_updates_schedule="constant")
    side = longest_side(schedule.config.model)
    one = max(adamw_step_bound(1.0, 0.01, 0.9, 0.999),
              muon_step_bound(1.0, 0.01, side) if optimizer == "muon" else 0)
    for number in range(1, 35):
        plan = schedule.plan(number, 0.0)
        rates = math.fsum(LR * rate(t, 2040, 100)
                          for t in range(plan.first_step, plan.first_step + plan.steps))
        assert rates * one * (1 - 1e-12) <= plan.bound <= (rates + LR / 1024) * one * (1 + 1e-12)
        constant = plain.plan(number, 0.0)
        assert (constant.steps, constant.first_step) == (60, 60 * (number - 1))
        assert constant.bound == pytest.approx(60 * LR * one, rel=1e-12)
        assert plan.bound < 0.8 * constant.bound


FLAGS = ("--num_clients", 5, "--cohort", 3, "--rounds", 6, "--local_updates", 3, "--lr_schedule",
         "cosine", "--local_updates_schedule", "quadratic", "--checkpoint_freq", 1,
         "--val_freq", 1)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    pytest.param(("--client_moments", "reset"), marks=pytest.mark.soak),  # places are counted
    ("--aggregation", "int4", "--local_optimizer", "muon", "--muon_momentum", 0.8)])
def test_the_same_bits_in_any_world_and_after_a_stop(run: Run, tmp_path: Path,
                                                     flags: tuple[Any, ...]) -> None:
    alone = run("fed_avg", *FLAGS, *flags, name="alone")
    five = run("fed_avg", *FLAGS, *flags, processes=5, name="five")
    assert alone.code == five.code == 0, five.output
    assert alone.bits == five.bits
    assert without_clocks(alone) == without_clocks(five)
    run("fed_avg", *FLAGS, *flags, script=FAULTY, env=fault(tmp_path, "kill", "reduce:5"))
    resumed = run("fed_avg", *FLAGS, *flags, processes=3)
    assert "resuming from step" in resumed.output
    assert resumed.bits == alone.bits
    steps = Schedule(_config(alone.run_dir), [10**5] * 5)
    shown = read_run(alone.run_dir)
    positions = [round(x, 9) for x, _ in shown.points("val_ppl", "steps").values()]
    assert positions[-6:] == [steps.first_step(number + 1) for number in range(1, 7)]
    assert positions[-1] == 18


@pytest.mark.parametrize("damage", [
    {"batch_size": 0}, {"num_clients": None}, {"sequence_length": "x"}, {"cohort": 0},
    {"num_clients": None, "cohort": 0.1}])
def test_a_position_that_settings_do_not_tell_is_none(damage: dict[str, Any]) -> None:
    settings = {"method": "fed_avg", "config": "tiny", "seed": 0, "local_updates": 4,
                "local_updates_schedule": "quadratic", "num_clients": 5, "batch_size": 2,
                "sequence_length": 8}
    record = Record(3, 1.0, 1.0, 1.0, 3200.0, 1.0, 1.0, None, None)
    found = [from_settings(Path("x"), settings | more, "").local_steps(record)
             for more in ({}, {"cohort": 0.5}, {"cohort": 1}, damage)]
    assert found[:3] == [40, 100, 200]
    assert math.isnan(found[3])


def _config(folder: Path) -> FederatedConfig:
    settings = json.loads((folder / "config.json").read_text())
    config = resolve("fed_avg", {name: settings[name] for name in (
        "config", "num_clients", "cohort", "rounds", "local_updates", "lr_schedule", "lr",
        "local_updates_schedule")})
    assert isinstance(config, FederatedConfig)
    return config


@pytest.mark.parametrize(("flags", "message"), [
    ({"sync": "epoch"}, "--local_updates_schedule quadratic: must be constant with --sync epoch"),
    ({"dp": "example", "dp_clip": 1, "dp_noise": 1, "dp_delta": 1e-5},
     "--local_updates_schedule quadratic: must be constant with --dp example"),
    ({"extend": True}, "--local_updates_schedule quadratic: must be constant with --extend"),
    ({"client_moments": "reset_epoch"}, "quadratic: must be constant with --client_moments rese"),
    ({"local_optimizer": "muon", "muon_momentum": 1.0}, "--muon_momentum 1.0: must be in .0, 1."),
    ({"local_optimizer": "muon", "client_moments": "average_sqrt", "grad_clip": 1,
      "muon_momentum": 0.8}, "--muon_momentum 0.8: must be at least --beta1 0.9 with --client_mom"),
])
def test_what_does_not_go_with_it_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve("fed_avg", {"local_updates": 8, "lr_schedule": "cosine",
                            "local_updates_schedule": "quadratic"} | flags)

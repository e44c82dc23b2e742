"""What keeps the secret of the noise: the same for the same sum, another for anything else."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fedrun.common.errors import InputError
from fedrun.common.files import write_json
from fedrun.federation.messages import RoundPlan
from fedrun.federation.noise_keeper import Keeper, Standing, TooMuchSpent, level_of, settings_of
from fedrun.federation.spending import Spending
from fedrun.privacy.accountant import gaussian_epsilon
from fedrun.secure.noise import noise_name
from tests.support.private import PROVENANCE, private_config, private_schedule, releases

SIZE = 3000
TERMS = [1, 2, 3, 4]


def keeper(folder: Path, text: str = "text", provenance: dict[str, Any] | None = None,
           earlier: tuple[str, ...] = (), rounds: int = 9, done: int = 0, **flags: object
           ) -> Keeper:
    config = private_config(**{"num_clients": 12, "cohort": 4, "rounds": rounds,
                               "dp_dir": folder / "keys"} | flags)
    schedule = private_schedule(**{"rounds": rounds} | flags)
    return Keeper(config, level_of(config, schedule, SIZE),
                  settings_of(config, schedule.noise, rounds), PROVENANCE | (provenance or {}),
                  text, earlier, done)


def plan(number: int = 2, **flags: object) -> RoundPlan:
    return private_schedule(**flags).plan(number, 0.0)


def test_the_same_sum_has_the_same_noise_and_is_charged_once(tmp_path: Path) -> None:
    first = keeper(tmp_path)
    key, charged = first.release(plan(), "model", TERMS)
    assert charged
    assert len(key) == 32
    assert first.release(plan(), "model", TERMS) == (key, False)
    again = keeper(tmp_path)
    assert again.standing.releases == [(2, (plan().cohort, 1.5, [], 1))]
    assert again.release(plan(), "model", TERMS) == (key, False)
    (release,) = releases(tmp_path)
    assert release[:3] == [first.run, 2, noise_name(key)]
    assert release[4:7] == ["client", plan().cohort, 1.5]


@pytest.mark.parametrize("changed", [
    {"text": "another"}, {"seed": 1}, {"lr": 1e-3}, {"local_updates": 2}, {"threads": 2},
    {"dp_clip": 0.4}, {"dp_noise": 1.4}, {"provenance": {"versions": {"torch": "2"}}},
    {"provenance": {"kernels": "own"}}, {"provenance": {"gpu": "H200"}},
    {"provenance": {"init_from": "x"}}, {"provenance": {"plugin": "x"}}, {"model": "another"},
    {"terms": [1, 2, 3, 5]}, {"cohort": 6}, {"number": 3}, {"lr_schedule": "cosine"},
    {"grad_clip": 1}, {"dtype": "bf16"}, {"client_moments": "reset"}], ids=str)
def test_whatever_is_changed_draws_afresh_and_is_charged(changed: dict[str, Any], tmp_path: Path
                                                         ) -> None:
    key, _ = keeper(tmp_path).release(plan(), "model", TERMS)
    model, terms = changed.pop("model", "model"), changed.pop("terms", TERMS)
    round_ = plan(changed.pop("number", 2), **{k: v for k, v in changed.items()
                                              if k not in ("text", "provenance")})
    other, charged = keeper(tmp_path, **changed).release(round_, model, terms)
    assert other != key
    assert charged
    assert len(releases(tmp_path)) == 2


@pytest.mark.parametrize("changed", [
    {"rounds": 12}, {"max_epsilon": 100}, {"val_freq": 7}, {"dataset": "elsewhere"},
    {"client_store": "disk"}, {"checkpoint_freq": 5}, {"timeout": 9}], ids=str)
def test_what_decides_no_sum_changes_no_noise(changed: dict[str, Any], tmp_path: Path) -> None:
    made = keeper(tmp_path).release(plan(), "model", TERMS)
    assert keeper(tmp_path, **changed).release(plan(), "model", TERMS) == (made[0], False)


def test_another_secret_is_another_noise(tmp_path: Path) -> None:
    one, _ = keeper(tmp_path / "a").release(plan(), "model", TERMS)
    assert one != keeper(tmp_path / "b").release(plan(), "model", TERMS)[0]


def test_with_cosine_learning_rates_the_length_decides_too(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"lr_schedule": "cosine"}
    keeper(tmp_path, **flags).release(plan(), "model", TERMS)
    assert keeper(tmp_path, rounds=12, **flags).release(plan(), "model", TERMS)[1]


def test_what_an_earlier_run_of_the_model_released_counts(tmp_path: Path) -> None:
    before = keeper(tmp_path, lr=1e-2)
    before.release(plan(), "model", TERMS)
    assert keeper(tmp_path).standing.releases == []
    assert keeper(tmp_path).standing.on_text == pytest.approx(gaussian_epsilon(1 / 1.5, 1e-3))
    after = keeper(tmp_path, earlier=(before.run,))
    assert after.standing.runs == [before.run, after.run]
    assert after.standing.releases == [(0, (plan().cohort, 1.5, [], 1))], "no round of this run"


def test_what_was_released_with_other_software_is_not_taken_for_the_rounds_to_come(tmp_path: Path
                                                                                    ) -> None:
    """They will be other sums, and cost: planned, and weighed against --max_epsilon, as such."""
    before = keeper(tmp_path)
    for number in (1, 2):
        before.release(plan(number), "model", TERMS)
    updated = keeper(tmp_path, provenance={"versions": {"torch": "2"}})
    assert updated.standing.releases == []
    resumed = keeper(tmp_path, provenance={"versions": {"torch": "2"}}, earlier=before.runs, done=1)
    config = private_config(num_clients=12, cohort=4, rounds=9, dp_dir=tmp_path / "keys")
    level = level_of(config, private_schedule(), SIZE)
    spending = Spending(config, private_schedule(), level, resumed.standing, 1)
    before_it = spending.epsilon
    resumed.release(plan(2), "model", TERMS)
    spending.charge(plan(2), {"": True})
    assert spending.epsilon > before_it


def test_rounds_that_come_out_differently_are_planned_as_paid_again(tmp_path: Path) -> None:
    """Killed after three rounds, with a checkpoint of the first, on GPUs without --deterministic:
    nothing is planned as free, nor taken for less than --max_epsilon."""
    before = keeper(tmp_path)
    for number in (1, 2, 3):
        before.release(plan(number), "model", TERMS)
    standing = keeper(tmp_path, provenance={"gpu": "a GPU"}, earlier=before.runs, done=1).standing
    assert (before.standing.repeatable, standing.repeatable) == (True, False)
    schedule, once = private_schedule(), gaussian_epsilon(1 / 1.5, 1e-3)
    config = private_config(num_clients=12, cohort=4, rounds=9, max_epsilon=1.01 * once)
    planned = {}
    for repeatable in (True, False):
        known = dataclasses.replace(keeper(tmp_path).standing, repeatable=repeatable)
        spending = Spending(config, schedule, level_of(config, schedule, SIZE), known, 1)
        planned[repeatable] = spending._after(2, 3).epsilon
        assert bool(spending.ends_before(2, 3)) == (not repeatable)
    assert planned[True] == spending._spent.epsilon < planned[False]


def test_no_less_is_planned_than_is_spent(tmp_path: Path) -> None:
    """A run that ended by --max_epsilon, and the same in another folder that went on without it."""
    flags: dict[str, Any] = {"num_clients": 12, "cohort": 4, "rounds": 9, "max_epsilon": 2,
                             "data_dir": tmp_path, "dp_dir": tmp_path / "keys"}
    further = keeper(tmp_path)
    for number in range(1, 10):
        further.release(plan(number), "model", TERMS)
    config, schedule = private_config(**flags), private_schedule()
    config.run_dir.mkdir()
    spending = Spending(config, schedule, level_of(config, schedule, SIZE),
                        keeper(tmp_path).standing, 3)
    assert not spending.refusal()
    spending.begin(torch.zeros(SIZE))
    page = (config.run_dir / "privacy.md").read_text()
    assert "client: epsilon 3.75 at delta 0.001 over all\n9 rounds" in page
    assert "| spent before this start | epsilon 3.75 by this run |" in page


def test_an_epsilon_that_the_sampler_cannot_vouch_for_says_so(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"num_clients": 12, "cohort": 4, "rounds": 9, "data_dir": tmp_path,
                             "dp_noise": None, "dp_epsilon": 1000}
    config, schedule = private_config(**flags), private_schedule(**flags)
    level = level_of(config, schedule, SIZE)
    refused = Spending(config, schedule, level, Standing([], [], 0.0), 0).refusal()
    assert refused == ("--dp_epsilon 1000: the run would come to epsilon inf: the noise as it is "
                       "drawn is not exact enough for so much epsilon, or so small a "
                       "--dp_delta as 0.001")


def test_an_infinite_epsilon_is_null_in_files_and_the_page_says_so(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"num_clients": 12, "cohort": 4, "rounds": 9, "data_dir": tmp_path,
                             "dp_noise": 0.02}
    config, schedule = private_config(**flags), private_schedule(**flags)
    spending = Spending(config, schedule, level_of(config, schedule, SIZE), Standing([], [], 0.0),
                        0)
    config.run_dir.mkdir()
    spending.begin(torch.zeros(SIZE))
    spending.charge(plan(), {"": True})
    assert spending.epsilon == math.inf
    write_json(tmp_path / "event.json", spending.event(True))
    assert json.loads((tmp_path / "event.json").read_text()) == {"epsilon": None}
    page = (config.run_dir / "privacy.md").read_text()
    assert "client: epsilon inf at delta" in page
    assert "`null` there is infinite: nothing is guaranteed" in page


def test_two_processes_that_make_one_run_at_once_both_count_its_rounds(tmp_path: Path) -> None:
    """Whoever is second releases nothing new, but its model cost as much as the other's."""
    one, other = keeper(tmp_path), keeper(tmp_path)
    made = one.release(plan(), "model", TERMS)
    assert made[1]
    assert other.release(plan(), "model", TERMS) == made
    assert other.release(plan(), "model", TERMS) == (made[0], False)
    assert len(releases(tmp_path)) == 1


def test_what_another_process_has_released_of_a_run_counts_towards_max_epsilon(tmp_path: Path
                                                                               ) -> None:
    limits: dict[str, Any] = {"max_epsilon": 4.6}
    one, other = keeper(tmp_path, **limits), keeper(tmp_path, **limits)
    for changed in range(4):
        one.release(plan(), "model", [changed, *TERMS[1:]])
    with pytest.raises(TooMuchSpent):
        other.release(plan(), "model", [9, *TERMS[1:]])
    assert other.release(plan(), "model", [0, *TERMS[1:]])[1], "that is spent already"


def test_a_run_is_not_taken_up_with_a_log_that_lacks_its_rounds(tmp_path: Path) -> None:
    """With another --dp_dir, or a log that was lost: what was spent would not count."""
    before = keeper(tmp_path)
    for number in (1, 2):
        before.release(plan(number), "model", TERMS)
    assert len(keeper(tmp_path, earlier=before.runs, done=2).standing.releases) == 2
    with pytest.raises(InputError, match=r"--dp_dir .*: its log has no round 3 of this run"):
        keeper(tmp_path, earlier=before.runs, done=3)
    with pytest.raises(InputError, match="its log has no round 1 of this run"):
        keeper(tmp_path / "elsewhere", earlier=before.runs, done=2)
    keeper(tmp_path / "elsewhere")


def test_a_changed_round_is_refused_that_would_pass_max_epsilon(tmp_path: Path) -> None:
    """Nobody knew before the training that it would be another sum."""
    kept = keeper(tmp_path, max_epsilon=4.6)
    kept.release(plan(), "model", TERMS)
    kept.release(plan(), "model", [0, *TERMS[1:]])
    kept.release(plan(), "model", [5, *TERMS[1:]])
    kept.release(plan(), "model", [6, *TERMS[1:]])
    with pytest.raises(TooMuchSpent, match=r"--max_epsilon 4\.6"):
        kept.release(plan(), "model", [7, *TERMS[1:]])
    assert kept.release(plan(), "model", TERMS)[1] is False
    assert len(releases(tmp_path)) == 4


def test_the_server_counts_as_the_log_does(tmp_path: Path) -> None:
    kept = keeper(tmp_path, max_epsilon=5)
    config = private_config(num_clients=12, cohort=4, rounds=9, max_epsilon=5,
                            dp_dir=tmp_path / "keys")
    schedule = private_schedule()
    level = level_of(config, schedule, SIZE)
    spending = Spending(config, schedule, level, kept.standing, 0)
    number = 1
    while not spending.ends_before(number):
        kept.release(plan(number), "model", TERMS)
        spending.charge(plan(number), {"": True})
        number += 1
    with pytest.raises(TooMuchSpent):
        kept.release(plan(number), "model", TERMS)
    assert number % 3 == 1, "a turn of all clients is three rounds"
    again = Spending(config, schedule, level, keeper(tmp_path, max_epsilon=5).standing, 2)
    assert 0 < again.epsilon < spending.epsilon, "of two rounds"
    assert again.ends_before(number)
    assert not again.ends_before(3), "to repeat a round costs nothing"
    for repeated in range(3, number):
        again.charge(plan(repeated), {"": False})
    assert again.epsilon == pytest.approx(spending.epsilon, rel=1e-12)

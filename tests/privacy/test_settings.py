"""The flags of --dp: which go together, and who trains when."""

from __future__ import annotations

import collections
import math
from pathlib import Path
from typing import Any

import pytest

from fedrun.common.errors import InputError
from fedrun.config import FederatedConfig
from fedrun.flags import flags_of, resolve
from fedrun.privacy.settings import PrivacySettings
from tests.support.private import EXAMPLE, PRIVATE, private_config, private_schedule


@pytest.mark.parametrize(("method", "flags", "message"), [
    ("fed_avg", {"dp_clip": None}, "--dp_clip none: must be from 1e-06 to 1e+06 with --dp client"),
    ("fed_avg", {"dp_clip": 0}, "--dp_clip 0: must be from"),
    ("fed_avg", {"dp_clip": "nan"}, "--dp_clip nan: must be from"),
    ("fed_avg", {"dp_clip": "inf"}, "--dp_clip inf: must be from"),
    ("fed_avg", {"dp_noise": None}, "--dp_noise none: must be given with --dp client"),
    ("fed_avg", {"dp_epsilon": 8}, "--dp_noise 1.5: must be given with --dp client, or"),
    ("fed_avg", {"dp_noise": 0}, "--dp_noise 0: must be > 0"),
    ("fed_avg", {"dp_noise": "nan"}, "--dp_noise nan: must be > 0"),
    ("fed_avg", {"dp_noise": None, "dp_epsilon": -1}, "--dp_epsilon -1: must be > 0"),
    ("fed_avg", {"max_epsilon": 0}, "--max_epsilon 0: must be > 0"),
    ("fed_avg", {"dp_delta": None}, "--dp_delta none: must be given with --dp client"),
    ("fed_avg", {"dp_delta": 0.25}, "--dp_delta 0.25: must be given with --dp client, above 0 and "
     "below 1/4"),
    ("fed_avg", {"dp_delta": 0}, "--dp_delta 0: must be given"),
    ("fed_avg", {"dp_colluding": 0}, "--dp_colluding 0: must be left out without --dp client and"),
    ("fed_avg", {"weighting": "samples"}, "--weighting samples: must be uniform with --dp client"),
    ("fed_avg", {"weighting": "trained"}, "--weighting trained: must be uniform"),
    ("fed_avg", {"aggregation": "int8"}, "--aggregation int8: must be exact with --dp client"),
    ("fed_avg", {"aggregation": "float"}, "--aggregation float: must be exact with --dp client"),
    ("fed_avg", {"client_moments": "average"}, "--client_moments average: must be keep, reset"),
    ("fed_avg", {"eval_clients": True}, "--eval_clients true: must be false with --dp client"),
    ("fed_avg", {"save_client_deltas": True}, "--save_client_deltas true: must be false"),
    ("fed_avg", {"sync": "epoch"}, "--sync epoch: must be round with --dp client"),
    ("fed_avg", {"dtype": "fp64"}, "--dtype fp64: must be auto, fp32 or bf16 with --dp client"),
    ("fed_avg", {"cohort": 3}, "--cohort 3: must be a divisor of --num_clients 4"),
    ("fed_avg", {"dp_dir": "results/x/keys", "run_name": "x"},
     "--dp_dir results/x/keys: must be outside the folders of runs, such as results/x"),
    ("fed_avg", {"dp_dir": "results/x", "run_name": "x"}, "--dp_dir results/x: must be outside"),
    ("fed_avg", {"dp": "site"}, "--dp site: must be none or client or example"),
    ("fed_avg", {"dp": None}, "--dp_clip 0.5: must be none without --dp client"),
    ("fed_avg", {"dp": "none"}, "--dp_clip 0.5: must be none without --dp client"),
    ("fed_entropy", {}, "--dp client: must be none with fed_entropy"),
    ("fed_fisher", {}, "--dp client: must be none with fed_fisher"),
    ("fed_sgd", {}, "--dp client: must be none with fed_sgd"),
    ("central", {}, "unknown flag --dp"),
    ("fed_avg", EXAMPLE | {"dp_clip": None}, "--dp_clip none: must be from 1e-06 to 1e+06 with "
     "--dp example"),
    ("fed_avg", EXAMPLE | {"dp_epsilon": 8}, "--dp_noise 1.5: must be given with --dp example, or"),
    ("fed_avg", EXAMPLE | {"dp_delta": None}, "--dp_delta none: must be given with --dp example, "
     "from 1e-11"),
    ("fed_avg", EXAMPLE | {"dp_delta": 1e-12}, "--dp_delta 1e-12: must be given with --dp example"),
    ("fed_avg", EXAMPLE | {"grad_clip": 1, "client_moments": "average_sqrt"}, "--client_moments "
     "average_sqrt: must be another with --dp example"),
    ("fed_avg", EXAMPLE | {"client_moments": "average_rows"}, "--client_moments average_rows: must "
     "be another with --dp example"),
    ("fed_avg", EXAMPLE | {"grad_clip": 1}, "--grad_clip 1: must be none with --dp example: "
     "--dp_clip"),
    ("fed_avg", EXAMPLE | {"sampling": "replacement"}, "--sampling replacement: must be shuffle "
     "with --dp example"),
    ("fed_avg", EXAMPLE | {"save_client_deltas": True}, "--save_client_deltas true: must be false "
     "with --dp example"),
    ("fed_avg", EXAMPLE | {"cohort": 3}, "--cohort 3: must be a divisor of --num_clients 4 with "
     "--dp example"),
    ("fed_entropy", EXAMPLE, "--dp example: must be none or client with fed_entropy, which "
     "measures more"),
    ("fed_fisher", EXAMPLE, "--dp example: must be none or client with fed_fisher"),
])
def test_what_does_not_go_together_is_refused_by_name(method: str, flags: dict[str, Any],
                                                      message: str) -> None:
    with pytest.raises(InputError) as refused:
        private_config(method, **flags)
    assert str(refused.value).startswith(message)


def test_sites_need_masks(tmp_path: Path) -> None:
    config = private_config(weighting="uniform")
    with pytest.raises(InputError, match=r"--secure_sum false: must be true with --dp client and"):
        type(config)(**{**vars(config), "sites": tmp_path / "sites.yaml"})


def test_sites_go_with_single_sequences_masked_or_not(tmp_path: Path) -> None:
    config = private_config(weighting="uniform", dp="example")
    for masked in (True, False):
        given = vars(config) | {"sites": tmp_path / "sites.yaml", "secure_sum": masked}
        assert type(config)(**given).private
    for name, value, message in (
            ("site_holdout", 0.1, "--site_holdout 0.1: must be none with --dp example: its loss"),
            ("dp_colluding", 2, "--dp_colluding 2: must be left out without --dp client and")):
        with pytest.raises(InputError) as refused:
            type(config)(**given | {"secure_sum": True, name: value})
        assert str(refused.value).startswith(message)


@pytest.mark.parametrize("method", ["fed_avg", "fed_momentum", "diloco", "fed_adam", "fed_yogi",
                                    "fed_adagrad"])
def test_methods_that_sum_updates_alone_go_with_it(method: str) -> None:
    config = private_config(method)
    assert config.strategy.plan_weights([10, 30], 100) == [0.5, 0.5], "uniform without being asked"
    assert config.results_dict()["dp_clip"] == 0.5
    assert "dp_dir" not in config.results_dict()


@pytest.mark.parametrize(("method", "flags"), [
    ("fed_avg", {"weighting": "trained"}), ("fed_avg", {"aggregation": "int8"}),
    ("fed_avg", {"aggregation": "float"}), ("fed_avg", {"client_moments": "average"}),
    ("fed_avg", {"sync": "epoch"}), ("fed_avg", {"eval_clients": True}), ("fed_sgd", {}),
    ("diloco", {"prox_mu": 0.1, "local_updates": 3})], ids=str)
def test_what_is_made_of_noised_gradients_is_free(method: str, flags: dict[str, Any]) -> None:
    assert private_config(method, **(EXAMPLE | flags)).private


def test_without_dp_nothing_is_different() -> None:
    plain = resolve("fed_avg", {})
    assert isinstance(plain, FederatedConfig)
    assert not plain.private
    assert plain.to_dict()["weighting"] == "samples"
    assert all(flag.help for flag in flags_of(PrivacySettings).values()), "docstrings of a mixin"


def test_the_folder_of_keys_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert private_config().dp_folder == tmp_path / ".local/state/fedrun"
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert private_config().dp_folder == Path("/var/state/fedrun")
    assert private_config(dp_dir="~/keys").dp_folder == tmp_path / "keys"


def test_all_clients_train_equally_often_by_a_schedule_of_the_seed() -> None:
    schedule = private_schedule()
    cohorts = [schedule.plan(number, 0.0).cohort for number in range(1, 10)]
    for turn in range(3):  # of 12 / 4 rounds
        drawn = [k for cohort in cohorts[3 * turn:3 * turn + 3] for k in cohort]
        assert sorted(drawn) == list(range(12))
    assert len({tuple(cohort) for cohort in cohorts}) == 9, "a new permutation each time"
    assert cohorts == [private_schedule().cohort(number) for number in range(1, 10)]
    assert cohorts != [private_schedule(seed=1).cohort(number) for number in range(1, 10)]
    counts = collections.Counter(k for cohort in cohorts for k in cohort)
    assert set(counts.values()) == {3}


def test_weights_are_uniform_and_the_bound_has_room_for_the_noise() -> None:
    plan = private_schedule().plan(2, 0.0)
    assert plan.weights == [0.25] * 4
    assert math.fsum(plan.weights) == 1
    # The clipped mean, and eight standard deviations of noise of 1.5 clips a client.
    assert 0.5 * (1 + 8 * 1.5 / 4) < plan.bound < 0.5 * (1 + 1.2 * 8 * 1.5 / 4)
    assert private_schedule(dp=None, **dict.fromkeys(
        ("dp_clip", "dp_noise", "dp_delta"))).plan(2, 0.0).bound != plan.bound


def test_noise_follows_from_epsilon_and_the_length() -> None:
    given = {"dp_noise": None, "dp_epsilon": 8}
    short, long = (private_schedule(**given, rounds=rounds).noise for rounds in (3, 12))
    assert long == pytest.approx(2 * short, rel=1e-3), "four times as often: twice the noise"
    assert private_schedule().noise == PRIVATE_NOISE


PRIVATE_NOISE = float(PRIVATE["dp_noise"])

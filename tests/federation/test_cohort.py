"""--cohort: clients drawn again for each round, the same in every world."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest

from fedrun.config import FederatedConfig
from fedrun.federation.schedule import Schedule
from fedrun.flags import resolve
from tests.support.runs import FAULTY, Run, fault, without_clocks


def schedule(cohort: str, clients: int = 10, seed: int = 0) -> Schedule:
    config = resolve("fed_avg", {"num_clients": str(clients), "cohort": cohort, "rounds": "2000",
                                 "seed": str(seed)})
    assert isinstance(config, FederatedConfig)
    return Schedule(config, [8 * (k + 1) for k in range(clients)])


@pytest.mark.parametrize(("cohort", "size"), [("3", 3), ("0.3", 3), ("0.01", 1), ("10", 10),
                                              ("none", 10)])
def test_size_and_weights_of_a_cohort(cohort: str, size: int) -> None:
    plan = schedule(cohort).plan(5, 0.0)
    assert len(set(plan.cohort)) == len(plan.cohort) == size
    assert plan.cohort == sorted(plan.cohort)
    total = sum(k + 1 for k in plan.cohort)
    assert plan.weights == pytest.approx([(k + 1) / total for k in plan.cohort])


def test_every_client_is_drawn_as_often_and_by_seed_and_round_alone() -> None:
    drawn, other = schedule("3"), schedule("3", seed=1)
    plans = [drawn.plan(number, 0.0).cohort for number in range(1, 1001)]
    counts = collections.Counter(k for cohort in plans for k in cohort)
    assert all(abs(counts[k] - 300) < 75 for k in range(10))  # five standard deviations
    assert plans[41] == schedule("3").plan(42, 1.0).cohort
    assert plans != [other.plan(number, 0.0).cohort for number in range(1, 1001)]


@pytest.mark.parametrize("cohort", ["0", "-1", "2.5", "11", "nan"])
def test_what_is_no_cohort_is_refused(cohort: str) -> None:
    with pytest.raises(ValueError, match=r"--cohort .*: must be .* or a share in \(0, 1\)"):
        schedule(cohort)


# Clients with a state stay with a worker; those without train on whichever is free.
@pytest.mark.slow
@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_the_same_bits_in_1_and_3_processes_and_after_a_stop(run: Run, tmp_path: Path, moments: str
                                                                ) -> None:
    flags = ("--num_clients", 5, "--cohort", 2, "--rounds", 5, "--client_moments", moments,
             "--local_updates", 2)
    alone = run("fed_avg", *flags, name="alone")
    three = run("fed_avg", *flags, processes=3, name="three")
    assert alone.code == three.code == 0, three.output
    assert alone.bits == three.bits
    assert without_clocks(alone) == without_clocks(three)
    assert [len(r["cohort"]) for r in three.history] == [2, 2, 2]
    assert three.history[-1]["tokens"] == 5 * 2 * 2 * 2 * 32
    run("fed_avg", *flags, script=FAULTY, env=fault(tmp_path, "term", "record:2"))
    resumed = run("fed_avg", *flags, processes=2)
    assert "resuming from step" in resumed.output
    assert resumed.bits == alone.bits
    assert bool(list(resumed.run_dir.rglob("client_*.safetensors"))) == (moments == "keep")

"""Secure sums at one site: which plans it takes, which rounds it refuses, what its journal says."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedrun.common.errors import ErrorCode, InputError, error_code
from fedrun.config import FederatedConfig
from fedrun.data.sites import Sites
from fedrun.distributed.data_plane import DataPlane
from fedrun.federation.messages import RoundPlan
from fedrun.federation.schedule import Schedule
from fedrun.federation.secure_sum import MasksRefused, PlanRefused, SecureSum, TooFewSites
from fedrun.federation.site_keys import (
    JOURNAL,
    JournalRefused,
    RoundRefused,
    digest_of_text,
)
from fedrun.strategies.fed_avg import FedAvg
from tests.support.private import PRIVATE
from tests.support.site_runs import config_with, make_leaders, make_sites

MODEL = torch.linspace(-1, 1, 1000)


class Fixed(Schedule):
    """Always this cohort, as if it had been drawn."""

    drawn: tuple[int, ...] = ()

    def cohort(self, number: int) -> list[int]:
        return list(self.drawn)


def secure_sum(config: FederatedConfig, sites: Sites, schedule: Schedule | None = None,
               done: int = 0) -> tuple[SecureSum, RoundPlan]:
    """At a site in a simulation, and the plan of an honest server."""
    schedule = schedule or Schedule(config, [20 + k for k in range(config.num_clients)])
    reference = config.strategy.first_entropy_reference(50, config.cohort_size)
    return (SecureSum(config, sites, schedule, 50, DataPlane(), done),
            schedule.plan(done + 1, reference))


@pytest.fixture
def sites(tmp_path: Path) -> Sites:
    return make_sites(tmp_path, 2, 1, 1, 2)


CHANGES: dict[str, Any] = {
    "round": 2, "steps": 3, "first_step": 3, "cohort": [0, 2, 3, 5],
    "weights": [0.25, 0.25, 0.25, 0.25, 1e-9, 0.1], "bound": 1.0, "gradient_bound": 1.0,
    "entropy_reference": 0.5, "start_from_global": False}
SERVERS: dict[str, Any] = {"evaluate": False, "save": True, "last": True, "stop": "SIGTERM"}


def test_every_field_of_a_plan_is_checked_or_the_servers(tmp_path: Path, sites: Sites) -> None:
    assert {f.name for f in dataclasses.fields(RoundPlan)} - {"kept"} == {*CHANGES, *SERVERS}
    config = config_with(tmp_path)
    for name, value in SERVERS.items():
        secure, plan = secure_sum(config, sites)
        assert getattr(plan, name) != value
        secure.begin(replace(plan, **{name: value}), MODEL)


@pytest.mark.parametrize("name", CHANGES)
def test_a_plan_that_the_settings_do_not_give_is_refused(tmp_path: Path, sites: Sites, name: str
                                                         ) -> None:
    secure, plan = secure_sum(config_with(tmp_path), sites)
    with pytest.raises(PlanRefused, match=rf"round 1: the server's plan has {name} ") as refused:
        secure.begin(replace(plan, **{name: CHANGES[name]}), MODEL)
    assert error_code(refused.value) == "plan"
    secure.begin(plan, MODEL)  # and the right one is taken


@pytest.mark.parametrize(("flags", "message"), [
    ({"local_updates": "1"}, "--local_updates 1: must be at least 2 in each round with --secure"),
    ({"local_updates": "3", "rounds": "40", "lr_schedule": "cosine",
      "local_updates_schedule": "quadratic"}, "--local_updates_schedule quadratic: must be const")])
def test_rounds_of_one_local_update_are_refused(tmp_path: Path, sites: Sites, message: str,
                                                flags: dict[str, str]) -> None:
    """But where nothing is hidden."""
    sizes = [20] * 6
    with pytest.raises(InputError, match=message):
        Schedule(config_with(tmp_path, flags=flags), sizes)
    assert Schedule(config_with(tmp_path, flags=flags | {"secure_sum": "false"}), sizes)


def test_one_local_update_is_enough_where_noise_hides_it_or_no_step_is_made(
        tmp_path: Path, sites: Sites) -> None:
    flags = {name: str(value) for name, value in PRIVATE.items()} | {"local_updates": "1"}
    assert Schedule(config_with(tmp_path, flags=flags), [20] * 6).steps(1) == 1
    assert Schedule(config_with(tmp_path, "fed_sgd"), [20] * 6).steps(1) == 1


@pytest.mark.parametrize("flags", [{"seed": "1"}, {"cohort": "3"}, {"weighting": "uniform"},
                                   {"lr": "1e-3"}, {"local_updates": "3"}])
def test_the_plan_of_other_settings_is_refused(tmp_path: Path, sites: Sites,
                                               flags: dict[str, str]) -> None:
    cohorts = {"cohort": "4"}
    secure, _ = secure_sum(config_with(tmp_path, flags=cohorts), sites)
    _, other = secure_sum(config_with(tmp_path, flags=cohorts | flags), sites)
    with pytest.raises(PlanRefused, match="round 1: the server's plan has "):
        secure.begin(other, MODEL)


def test_rounds_come_one_after_the_other(tmp_path: Path, sites: Sites) -> None:
    secure, plan = secure_sum(config_with(tmp_path, flags={"rounds": "9"}), sites, done=4)
    secure.begin(plan, MODEL)
    with pytest.raises(PlanRefused, match="round 6: the server's plan has round 5, but"):
        secure.begin(plan, MODEL)
    for number, taken in ((7, False), (6, True)):
        again = secure.schedule.plan(number, plan.entropy_reference)
        if taken:
            secure.begin(again, MODEL)
        else:
            with pytest.raises(PlanRefused, match="plan has round 7, but the settings give 6"):
                secure.begin(again, MODEL)


@pytest.mark.parametrize(("cohort", "refused"), [
    ((0, 1, 2), "of 2 sites (north, south); must be of 3 at least"), ((0, 2, 3), ""),
    ((4, 5), "of 1 sites (west); must"), ((0, 1, 2, 3, 4, 5), "")])
def test_a_cohort_is_of_three_sites_at_least(tmp_path: Path, sites: Sites,
                                             cohort: tuple[int, ...], refused: str) -> None:
    of_cohort(config_with(tmp_path), sites, cohort, refused)


@pytest.mark.parametrize(("cohort", "refused"), [
    ((0, 2, 3), "of 3 sites (north, south, east); must be of 4 at least"), ((0, 2, 3, 5), "")])
def test_several_sums_of_the_same_updates_need_more_sites(
        tmp_path: Path, sites: Sites, cohort: tuple[int, ...], refused: str) -> None:
    config = config_with(tmp_path, "fed_geometric_median", {"weiszfeld_steps": "2"})
    of_cohort(config, sites, cohort, refused)


def of_cohort(config: FederatedConfig, sites: Sites, cohort: tuple[int, ...], refused: str) -> None:
    """Begin the round of this cohort, which is refused in these words, if any."""
    schedule = Fixed(config, [20] * 6)
    schedule.drawn = cohort
    secure, plan = secure_sum(config, sites, schedule)
    assert plan.cohort == list(cohort)
    if not refused:
        secure.begin(plan, MODEL)
        return
    with pytest.raises(PlanRefused) as error:
        secure.begin(plan, MODEL)
    assert refused in str(error.value)


@pytest.mark.parametrize(("sizes", "refused"), [
    ([200, 250, 20, 20, 5, 5], ""), ([200, 261, 20, 20, 5, 5], "north has 0.902 of the weights"),
    ([5, 5, 20, 20, 5, 600], "west has 0.924 of the weights; must be at most 0.9")])
def test_no_site_has_nearly_all_of_the_weight(tmp_path: Path, sites: Sites, sizes: list[int],
                                              refused: str) -> None:
    config = config_with(tmp_path)
    secure, plan = secure_sum(config, sites, Schedule(config, sizes))
    if not refused:
        secure.begin(plan, MODEL)
        return
    with pytest.raises(PlanRefused, match=f"round 1: {refused}"):
        secure.begin(plan, MODEL)


class Heavy(FedAvg):
    """A method whose weights sum to more than the integers of a sum have room for."""

    def plan_weights(self, shard_tokens: Any, round_tokens: int) -> list[float]:
        return [0.17] * len(shard_tokens)


def test_a_sum_that_may_not_fit_is_refused(tmp_path: Path, sites: Sites) -> None:
    config = replace(config_with(tmp_path), strategy=Heavy())
    secure, plan = secure_sum(config, sites)
    with pytest.raises(PlanRefused, match=r"its weights may sum to 1\.02, more than the 1 that"):
        secure.begin(plan, MODEL)
    for flags in ({"weighting": "trained"}, {"weighting": "uniform"}, {"aggregation": "int8"}):
        secure, plan = secure_sum(config_with(tmp_path, flags=flags), sites)
        secure.begin(plan, MODEL)
    secure, plan = secure_sum(config_with(tmp_path, "fed_sgd"), sites)
    secure.begin(plan, MODEL)


@pytest.mark.parametrize(("clients", "found"), [
    ([0, 1, 2], 2), ([0, 1], 1), ([], 0), ([0, 2, 3], 3), ([0, 1, 2, 3, 4, 5], 4)])
def test_a_simulation_counts_the_sites_with_a_term(tmp_path: Path, sites: Sites,
                                                   clients: list[int], found: int) -> None:
    secure, plan = secure_sum(config_with(tmp_path), sites)
    secure.begin(plan, MODEL)
    assert secure.mask("vector", 32) is None
    if found >= 3:
        secure.count(clients)
        return
    with pytest.raises(TooFewSites, match=f"{found} sites have a finite update") as refused:
        secure.count(clients)
    assert error_code(refused.value) == "few"


# ---- a site of its own -------------------------------------------------------------------------

class Alone(DataPlane):
    """The plane of one site's only worker, where this comes back as the sum of all sites' words."""

    def __init__(self, others: int) -> None:
        super().__init__(of_site=True)
        self.others = others
        self.sent: list[list[int]] = []

    def sum_words(self, words: Any, mask: Any = None) -> list[int]:
        vector = np.array(words, np.int64)
        if mask is not None:
            mask.add_to(vector)
        self.sent.append([int(word) for word in vector])
        # As if the masks of the others canceled this one's.
        return [int(word) + self.others for word in words] if mask is not None else [
            int(np.int64(-2**62))]


@dataclasses.dataclass
class AtSite:
    """North, with keys that it has agreed on with the others."""

    folder: Path
    sites: Sites
    plane: Alone = dataclasses.field(default_factory=lambda: Alone(2))

    def start(self, run: str = "run 1", done: int = 0, text: str = "text",
              flags: Mapping[str, str] | None = None, plane: Alone | None = None,
              schedule: type[Schedule] = Schedule, sizes: list[int] | None = None,
              method: str = "fed_avg") -> tuple[SecureSum, RoundPlan]:
        """A start of this site, with fresh keys, and the next round's plan."""
        config = config_with(self.folder, method, {"rounds": "9", **(flags or {})})
        leaders = make_leaders(self.folder, self.sites, run, config.seed, text)
        found, plan = secure_sum(config, self.sites, schedule(config, sizes or [20] * 6), done)
        found.leader, found.plane = leaders["north"], plane or self.plane
        return found, plan


@pytest.fixture
def north(tmp_path: Path, sites: Sites) -> AtSite:
    return AtSite(tmp_path, sites)


def go(secure: SecureSum, plan: RoundPlan, model: torch.Tensor = MODEL,
       clients: tuple[int, ...] = (0, 1)) -> None:
    secure.begin(plan, model)
    secure.count(clients)


def test_the_count_is_masked_and_the_round_in_the_journal_before_it(
        north: AtSite, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = north.folder / "north" / JOURNAL
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    secure, plan = north.start()
    assert journal.stat().st_size == 0
    go(secure, plan)
    (word,), = north.plane.sent
    assert not -10 < word < 10, "not the count itself"
    assert synced[-1] == journal.stat().st_size > 100
    assert "run 1" in journal.read_text()


@pytest.mark.parametrize(("others", "clients", "raised"), [
    (2, (0, 1), None), (2, (0,), None), (2, (), TooFewSites), (1, (0, 1), TooFewSites),
    (4, (0, 1), MasksRefused), (-2, (0, 1), MasksRefused), (2**62, (0,), MasksRefused)])
def test_a_site_sees_by_the_count_how_many_take_part(
        north: AtSite, others: int, clients: tuple[int, ...],
        raised: type[RoundRefused] | None) -> None:
    secure, plan = north.start(plane=Alone(others))
    if raised is None:
        go(secure, plan, clients=clients)
        for name, bits in (("vector", 32), ("tail", 64)):
            assert secure.mask(name, bits) is not None
        return
    with pytest.raises(raised):
        go(secure, plan, clients=clients)


@pytest.mark.parametrize(("others", "clients", "raised"), [
    (3, (0, 1), None), (3, (), None), (2, (0, 1), MasksRefused), (4, (0,), MasksRefused)])
def test_with_noise_the_count_is_of_all_sites_whoever_is_finite(
        north: AtSite, others: int, clients: tuple[int, ...],
        raised: type[RoundRefused] | None) -> None:
    secure, plan = north.start(plane=Alone(others), flags=PRIVATE)
    if raised is None:
        go(secure, plan, clients=clients)
        return
    with pytest.raises(raised):
        go(secure, plan, clients=clients)


def refused(secure: SecureSum, plan: RoundPlan, model: torch.Tensor = MODEL) -> str:
    """The line with which the journal refuses a round, of which nothing masked is sent."""
    plane = secure.plane
    assert isinstance(plane, Alone)
    before = len(plane.sent)
    with pytest.raises(JournalRefused) as error:
        go(secure, plan, model)
    assert error_code(error.value) == "journal"
    (word,), = plane.sent[before:]
    assert not -10 < word < 10, "masked too, but by what does not cancel"
    return str(error.value)


def test_a_round_is_repeated_with_the_same_terms_alone(north: AtSite) -> None:
    go(*north.start())
    journal = (north.folder / "north" / JOURNAL).read_bytes()
    go(*north.start())  # killed between journal and sending
    go(*north.start(flags={"val_freq": "1", "rounds": "12", "lr": "1e-3"}))
    assert (north.folder / "north" / JOURNAL).read_bytes() == journal
    for start in (north.start(sizes=[20, 25, 20, 20, 20, 20]), north.start(flags={"cohort": "5"})):
        line = refused(*start)
        assert "update of round 1, run run 1: made of other terms in round 1, run run 1" in line
    assert "made of other terms" in refused(*north.start(text="other text"))


def test_the_same_start_in_another_run_has_the_same_terms(north: AtSite) -> None:
    """Or the difference of the two sums would be the terms of whom one of them lacks."""
    go(*north.start())
    go(*north.start(run="run 2"))
    go(*north.start(run="run 3", flags={"lr": "1e-3"}))
    line = refused(*north.start(run="run 4", flags={"cohort": "5"}))
    assert "update of round 1, run run 4: made of other terms in round 1, run run" in line
    # From another model, another seed, or in another round there is nothing to subtract.
    go(*north.start(run="run 5", flags={"cohort": "5"}), model=MODEL + 1)
    go(*north.start(run="run 6", flags={"cohort": "5", "seed": "1"}))
    go(*north.start(run="run 7", done=1, flags={"cohort": "5"}))
    refused(*north.start(run="run 8", flags={"cohort": "4"}), model=MODEL + 1)


def test_other_sums_of_the_same_updates_are_other_terms(north: AtSite) -> None:
    """Each would show more of the same updates. The sums of a round that is repeated are the same.
    """
    median, two, one = "fed_geometric_median", {"weiszfeld_steps": "2"}, {"weiszfeld_steps": "1"}
    plane = Alone(3)
    go(*north.start(method=median, flags=two, plane=plane))
    go(*north.start(method=median, flags=two, plane=plane))
    for start in (north.start(run="run 2"), north.start(run="run 3", method=median, flags=one)):
        assert "made of other terms in round 1, run run 1" in refused(*start)
    again = north.start(method=median, flags=two, done=1, plane=plane)
    go(*again, model=MODEL + 1)


def test_every_sum_of_the_vectors_has_a_mask_of_its_own(north: AtSite) -> None:
    secure, plan = north.start(method="fed_geometric_median", flags={"weiszfeld_steps": "2"},
                               plane=Alone(3))
    go(secure, plan)
    secure.make_ahead(8, 32)
    made = []
    for mask in secure.vector_masks(2, 32):
        assert mask is not None
        made.append(np.zeros(8, np.int32))
        mask.add_to(made[-1])
        with pytest.raises(Exception, match="added already"):
            mask.add_to(made[-1])
    assert not (made[0] == made[1]).any()
    with pytest.raises(Exception, match="made already"):
        secure.vector_masks(2, 32)


def test_other_sites_are_other_terms(north: AtSite, tmp_path: Path) -> None:
    go(*north.start())
    fewer = replace(north.sites, sites=north.sites.sites[:3])
    secure, plan = north.start(run="run 2")
    assert secure.leader is not None
    secure.leader.sites = fewer
    assert "made of other terms" in refused(secure, plan)


def test_a_journal_that_cannot_be_written_refuses(north: AtSite, monkeypatch: pytest.MonkeyPatch
                                                  ) -> None:
    secure, plan = north.start()

    def full(descriptor: int, data: bytes) -> int:
        return len(data) // 2

    monkeypatch.setattr(os, "write", full)
    assert "the disk is full" in refused(secure, plan)


def test_masks_are_of_one_round_and_made_once(north: AtSite) -> None:
    secure, plan = north.start()
    go(secure, plan)
    assert secure.leader is not None
    assert secure.mask("vector", 32) is not None
    with pytest.raises(Exception, match="made already"):
        secure.mask("vector", 32)
    go(secure, secure.schedule.plan(2, plan.entropy_reference))
    with pytest.raises(Exception, match="made already"):
        secure.leader.mask(1, "tail", 64)


def test_the_digest_of_a_text_is_of_what_each_client_trains_on() -> None:
    text = np.arange(40_000, dtype=np.uint16).reshape(10_000, 4)
    shards = [np.arange(0, 9000), np.arange(9000, 10_000)]
    digests = {digest_of_text((shard, text) for shard in each) for each in (
        shards, shards[::-1], [np.arange(10_000)], [shards[0], shards[1][:-1]],
        [np.arange(1, 9001), shards[1]])}
    other = text.copy()
    other[8999, 3] ^= 1
    digests |= {digest_of_text((shard, other) for shard in shards)}
    assert len(digests) == 6
    moved = np.concatenate([text[:1], text])  # elsewhere in an array
    assert digest_of_text((shard + 1, moved) for shard in shards) in digests


def test_codes_are_those_of_the_errors() -> None:
    codes: dict[type[Exception], ErrorCode] = {
        PlanRefused: "plan", TooFewSites: "few", MasksRefused: "masks", JournalRefused: "journal"}
    assert {kind: error_code(kind("why")) for kind in codes} == codes

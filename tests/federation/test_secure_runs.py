"""Runs between sites of their own with secure sums, from their start to their end."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedrun import cli
from fedrun.federation.site_keys import JOURNAL
from tests.support.real_sites import NAMES, Institutions
from tests.support.runs import Outcome, error_lines, without_clocks
from tests.support.spoiled import spoil_updates

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
FAULTS = "tests.support.site_faults"
NORTH, SOUTH = 1, 2  # a client of each


@pytest.fixture(scope="module")
def institutions() -> Iterator[Institutions]:
    """In a folder that other users can reach, which those of pytest are not."""
    with tempfile.TemporaryDirectory(prefix="fedrun-sites-") as folder:
        yield Institutions(Path(folder))


@pytest.fixture
def simulate(institutions: Institutions, capfd: pytest.CaptureFixture[str]
             ) -> Callable[..., Outcome]:
    """A simulation of the sites in the process of the test."""
    def run_it(name: str, *flags: object) -> Outcome:
        folder = institutions.root / "simulated"
        code = cli.main([*institutions.flags(
            "--data_dir", folder, "--cache_dir", folder / "cache", "--site_data",
            institutions.root / "{site}" / "text" / "*.txt", *flags, name=name)])
        out, err = capfd.readouterr()
        return Outcome(code, out + err, folder / name)
    return run_it


def fault(kind: str, number: int, **more: object) -> dict[str, str]:
    return {"FAULT": kind, "FAULT_ROUND": str(number),
            **{f"FAULT_{name.upper()}": str(value) for name, value in more.items()}}


def test_masked_sums_and_plain_ones_end_in_the_same_bits(
        institutions: Institutions, simulate: Callable[..., Outcome]) -> None:
    masked = institutions.train("--secure_sum", "true", name="masked")
    assert masked.server.code == 0, "\n".join(masked.printed)
    plain = institutions.train(name="plain").server
    alone = simulate("alone")
    assert masked.server.bits == plain.bits == alone.bits
    assert without_clocks(masked.server) == without_clocks(plain) == without_clocks(alone)
    record = alone.history[-1]
    assert {"update_cosine", "effective_clients", "step_norm"} <= record.keys()
    assert record["left_out"] == 0
    assert record["left_out_why"] == {}
    assert not {"client_weights", "update_norms"} & record.keys(), "nothing of a client"
    rounds = [event for event in masked.server.events if event["event"] == "round"]
    assert len(rounds) == 3
    assert not any("clients" in event for event in rounds)
    for name in NAMES:
        lines = (institutions.root / name / "site" / JOURNAL).read_text().splitlines()
        assert len(lines) == 3
    assert not list((institutions.root / "server").rglob(JOURNAL))


def test_what_sites_hold_out_is_recorded_as_a_sum(
        institutions: Institutions, simulate: Callable[..., Outcome]) -> None:
    flags = ("--secure_sum", "true", "--site_holdout", 0.1, "--seed", 6)
    masked = institutions.train(*flags, name="held out")
    assert masked.server.code == 0, "\n".join(masked.printed)
    alone = simulate("held out alone", *flags)
    assert masked.server.bits == alone.bits
    assert without_clocks(masked.server) == without_clocks(alone)
    assert all(6 < record["site_val_ppl"] < 400 for record in alone.history)
    assert len({record["site_val_tokens"] for record in alone.history}) == 1


def test_a_site_that_can_hold_out_nothing_says_so_in_its_own_log(institutions: Institutions
                                                                  ) -> None:
    run = institutions.train("--secure_sum", "true", "--site_holdout", 1e-6, name="nothing")
    assert run.server.code == 2, run.server.output
    (line,) = error_lines(run.server.output)
    assert "site north: " in line
    assert "--site_holdout" not in line
    assert "site north: --site_holdout 1e-06: must be at least 1/" in run.printed[1]


def test_a_client_that_is_not_finite_adds_zero(
        institutions: Institutions, simulate: Callable[..., Outcome],
        monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"north": fault("spoil", 2, clients=NORTH)}
    masked = institutions.train("--secure_sum", "true", "--seed", 1, name="spoiled", env=env,
                                module=FAULTS).server
    assert masked.code == 0, masked.output
    spoil_updates(monkeypatch, math.nan, 2, {NORTH})
    alone = simulate("spoiled alone", "--secure_sum", "true", "--seed", 1)
    assert masked.bits == alone.bits
    assert without_clocks(masked) == without_clocks(alone)
    assert [(r["left_out"], r["left_out_why"]) for r in masked.history] == [
        (0, {}), (1, {"not finite": 1}), (0, {})]
    assert "round 2: 1 of 5 clients are left out (not finite: 1); their moments are reset" in (
        masked.output)


def test_below_three_finite_sites_all_end_with_one_line(
        institutions: Institutions, simulate: Callable[..., Outcome],
        monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"south": fault("spoil", 2, clients=SOUTH)}
    masked = institutions.train("--secure_sum", "true", "--seed", 2, name="few", env=env,
                                module=FAULTS)
    spoil_updates(monkeypatch, math.nan, 2, {SOUTH})
    alone = simulate("few alone", "--secure_sum", "true", "--seed", 2)
    for ended in (masked.server, alone):
        assert ended.code == 1
        (line,) = error_lines(ended.output)
        assert "round 2: fewer than three sites have a finite update" in line
        assert [record["global_step"] for record in ended.history] == [1]
        assert ended.outcome["outcome"] == "failed"
        assert "the last good model is in" in ended.output
    assert masked.server.bits == alone.bits, "of round 1"
    assert not any("Traceback" in printed for printed in masked.printed[1:])
    monkeypatch.undo()
    spoil_updates(monkeypatch, math.nan, 2, {SOUTH})
    plain = simulate("enough", "--seed", 2)  # without secure sums two sites are enough
    assert plain.code == 0, plain.output


def test_a_round_ends_the_run_where_most_clients_are_left_out(
        institutions: Institutions, simulate: Callable[..., Outcome],
        monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_updates(monkeypatch, math.nan, 2, {0, 1, 2})
    alone = simulate("diverged")
    (line,) = error_lines(alone.output)
    assert line.endswith("round 2: 3 of 5 clients are left out, more than half (not finite: 3): "
                         "--lr 0.002 may be too large")
    assert alone.outcome["kind"] == "diverged"


@pytest.mark.parametrize("lie", [
    {"weights": [0.9, 0.025, 0.025, 0.025, 0.025]},
    pytest.param({"cohort": [0, 1, 2, 4, 3]}, marks=pytest.mark.soak),
    pytest.param({"round": 3}, marks=pytest.mark.soak)])
def test_a_server_that_lies_is_refused_at_every_site(institutions: Institutions,
                                                     lie: dict[str, object]) -> None:
    name, = lie
    run = institutions.train("--secure_sum", "true", "--seed", 3, name=f"lie {name}",
                             module=FAULTS, env={"server": fault("lie", 2, plan=json.dumps(lie))})
    assert run.server.code == 1
    (line,) = error_lines(run.server.output)
    assert "the server's plan is not the one that the settings give" in line
    refused = [printed for printed in run.printed[1:]
               if f"round 2: the server's plan has {name} " in printed]
    assert refused, "\n".join(run.printed)  # the others may have seen that one has failed


def test_a_site_that_is_killed_before_it_sends_repeats_the_round(
        institutions: Institutions, simulate: Callable[..., Outcome]) -> None:
    flags = ("--secure_sum", "true", "--seed", 4)
    killed = institutions.train(*flags, name="killed", module=FAULTS,
                                env={"east": fault("kill", 2)})
    assert killed.server.code != 0
    journal = institutions.root / "east" / "site" / JOURNAL
    known = journal.read_bytes()
    assert known.count(b"\n") >= 2
    again = institutions.train(*flags, name="killed")
    assert again.server.code == 0, "\n".join(again.printed)
    assert again.server.bits == simulate("not killed", *flags).bits
    assert journal.read_bytes().startswith(known)


def test_a_round_under_other_weights_is_refused(institutions: Institutions) -> None:
    """In a new run, whose id the server chooses."""
    flags = ("--secure_sum", "true", "--seed", 5)
    assert institutions.train(*flags, name="first").server.code == 0
    other = institutions.train(*flags, "--weighting", "uniform", name="second")
    assert other.server.code == 1
    (line,) = error_lines(other.server.output)
    assert "round 1: site north: its journal refuses the sum" in line
    assert str(institutions.root / "north") not in other.server.output
    for printed in other.printed[1:]:
        # Besides, a site may find the server gone when it leaves.
        (line,) = [each for each in error_lines(printed) if "made of other terms" in each]
        assert "update of round 1, run " in line
    same = institutions.train(*flags, "--lr", "1e-3", name="third")
    assert same.server.code == 0, "tuning over the same clients"

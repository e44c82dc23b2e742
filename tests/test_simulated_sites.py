"""Runs with --sites whose text one owner has: a simulation of sites, in any number of processes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fedrun
from fedrun import cli
from fedrun.common.errors import InputError
from fedrun.config import FederatedConfig
from fedrun.data.site_texts import deal_all, read_all
from fedrun.data.sites import Sites
from fedrun.federation.schedule import Schedule
from fedrun.flags import config_of, resolve
from fedrun.model.pretrained import find_pretrained
from fedrun.strategies import STRATEGIES
from fedrun.strategies.robust import Robust
from tests.support.runs import CORPUS, FAULTY, Run, assert_equal, fault, without_clocks
from tests.support.site_files import THREE, sites_file, sites_of, texts_of
from tests.support.sites import NAMES

FLAGS = ("--rounds", 4, "--checkpoint_freq", 2, "--cohort", 4)


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """The flags of a simulation of three sites."""
    return ["--sites", str(sites_file(tmp_path, THREE)),
            "--site_data", texts_of(tmp_path / "texts", THREE)]


@pytest.mark.parametrize("processes", [3, pytest.param(2, marks=pytest.mark.soak),
                                       pytest.param(5, marks=pytest.mark.slow)])
def test_the_same_bits_in_any_number_of_processes(processes: int, run: Run, given: list[str]
                                                  ) -> None:
    alone = run("fed_avg", *FLAGS, *given, name="alone")
    several = run("fed_avg", *FLAGS, *given, processes=processes, name="several")
    assert alone.code == several.code == 0, several.output
    assert_equal(several, alone)
    assert alone.config["num_clients"] == 5
    # Nothing that is private to a site is in the run's folder, and nothing of it in a setting.
    assert "site_data" not in alone.config
    for file in alone.run_dir.rglob("*.json*"):
        assert "texts/" not in file.read_text()


def test_what_stays_at_clients_is_in_no_sum_of_sites(run_here: Run, given: list[str]) -> None:
    """Masked or not, sums are of what is shared, to the same bits; what stays is in no model."""
    flags = ("--rounds", 2, "--cohort", 4, *given, "--personal", "*out_proj*", "--local_updates", 2)
    plain = run_here("fed_avg", *flags, name="plain")
    masked = run_here("fed_avg", *flags, "--secure_sum", name="masked")
    assert plain.code == masked.code == 0, plain.output + masked.output
    assert plain.bits == masked.bits
    start = np.load(plain.run_dir / "server" / "params" / "step_000000.npz")
    whole = np.load(plain.run_dir / "server" / "params" / "step_000002.npz")
    assert not np.array_equal(whole["layers.0.in_proj"], start["layers.0.in_proj"])
    shared = sum(value.numel() for name, value in plain.model.items() if "out_proj" not in name)
    assert plain.history[-1]["bytes"] == masked.history[-1]["bytes"]
    assert 0 <= plain.history[-1]["bytes"] / (2 * 4 * 2) - 4 * shared < 64
    own = [load_file(run.run_dir / "checkpoints" / "step_000002" / f"client_{client}.safetensors")
           for run in (plain, masked) for client in plain.history[-1]["cohort"]]
    values = [state["personal"] for state in own]
    assert all(torch.equal(a, b) for a, b in zip(values[:4], values[4:], strict=True))
    assert not any(torch.equal(values[0], other) for other in values[1:4])


@pytest.mark.parametrize("processes", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_loss_of_all_sites_on_what_they_hold_out(
        processes: int, run: Run, run_here: Run, given: list[str], tmp_path: Path) -> None:
    """Against the final model's losses in float64, a sequence at a time."""
    flags = ("--rounds", 2, "--secure_sum", "--site_holdout", 0.2, "--local_updates", 2, *given)
    made = (run_here if processes == 1 else run)("fed_avg", *flags)
    assert made.code == 0, made.output
    if processes > 1:
        assert_equal(run("fed_avg", *flags, processes=processes, name="several"), made)
        return
    record = made.history[-1]
    config = config_of(made.config)
    texts = read_all(sites_of(THREE), given[3], made.run_dir / "tokenizer",
                     config.sequence_length, tmp_path / "another cache")
    dealt = deal_all(sites_of(THREE), texts, config.seed, config.batch_size, 0.2)
    model = find_pretrained(str(made.run_dir), "").build(torch.float64)
    with torch.no_grad():
        losses = [model.loss(torch.from_numpy(row[None].astype(np.int64)))
                  for text in dealt.held_out for row in text]
    tokens = sum(count for _, count in losses)
    mean = sum(loss.item() for loss, _ in losses) / tokens
    assert record["site_val_tokens"] == tokens > 1000
    assert record["site_val_loss"] == pytest.approx(mean, rel=1e-5)
    assert record["site_val_ppl"] == pytest.approx(np.exp(mean), rel=1e-4)
    assert record["site_val_loss"] != record["server_val_loss"]
    evaluated = [event for event in made.events if "site_val_ppl" in event]
    assert [event["site_val_ppl"] for event in evaluated] == [
        one["site_val_ppl"] for one in made.history]


def test_one_site_of_contiguous_clients_is_a_plain_run(run: Run, tmp_path: Path) -> None:
    """On a data set that has the site's text as its train split, the server's as its validation."""
    folder, rows = tmp_path / "north", CORPUS.read_text(encoding="utf-8").splitlines(keepends=True)
    folder.mkdir()
    (folder / "train.txt").write_text("".join(rows[:6000]), encoding="utf-8")
    (folder / "validation.txt").write_text("".join(rows[6000:6200]), encoding="utf-8")
    flags = ("--dataset", folder, "--val_fraction", "none", "--rounds", 3)
    plain = run("fed_avg", *flags, "--num_clients", 3, name="plain")
    sites = run("fed_avg", *flags, "--sites", sites_file(tmp_path, {"north": {"clients": 3}}),
                "--site_data", f"{tmp_path}/{{site}}/train.txt", name="sites")
    assert plain.code == sites.code == 0, sites.output
    assert sites.bits == plain.bits
    of_clients = {"client_weights", "update_norms", "left_out", "left_out_why"}
    for with_sites, record in zip(without_clocks(sites), without_clocks(plain), strict=True):
        assert with_sites["left_out"] == len(record["left_out"]) == 0
        # The sums over clients are rounded; what they say of single ones is not there.
        assert with_sites.keys() >= record.keys() - of_clients
        for name in record.keys() - of_clients:
            value = record[name]
            near = value if isinstance(value, str) else pytest.approx(value, rel=1e-6)
            assert with_sites[name] == near, name


@pytest.mark.slow
def test_a_run_is_resumed_with_its_sites_and_texts_alone(run: Run, given: list[str], tmp_path: Path
                                                         ) -> None:
    """Stopped, then refused with another file of the sites or another text, by name; resumed with
    both as they were, elsewhere."""
    flags = ("--rounds", 4, "--checkpoint_freq", 1)
    whole = run("fed_avg", *flags, *given, name="whole")
    stopped = run("fed_avg", *flags, *given, script=FAULTY, env=fault(tmp_path, "term", "record:2"))
    assert stopped.code == 0, stopped.output
    path = given[1]
    content = Path(path).read_text()
    Path(path).write_text(content.replace("clients: 2\n    partition", "clients: 1\n    partition"))
    refused = run("fed_avg", *flags, *given)
    assert refused.code == 2
    assert "--sites: the file of the sites of this run was " in refused.output
    Path(path).write_text(content)
    file = tmp_path / "texts" / "east" / "1.txt"
    text = file.read_text()
    file.write_text(text.replace("a", "e", 1))
    refused = run("fed_avg", *flags, *given)
    assert refused.code == 2
    assert "--site_data: the text of the sites of this run was " in refused.output
    refused = run("fed_avg", *flags, "--num_clients", 5)
    assert refused.code == 2
    assert re.search("sites /.* there, None here", refused.output)
    file.write_text(text)
    moved, elsewhere = tmp_path / "again.yaml", tmp_path / "elsewhere"
    moved.write_text("# moved\n" + content)
    shutil.copytree(tmp_path / "texts", elsewhere)
    resumed = run("fed_avg", *flags, "--sites", moved, processes=2, env={
        "FEDRUN_SITE_DATA": f"{elsewhere}/{{site}}/?.txt"})
    assert "resuming from step" in resumed.output
    assert_equal(resumed, whole)


def test_from_python(given: list[str], run_here: Run, little_text: tuple[str, ...], tmp_path: Path
                     ) -> None:
    _, path, _, data = given
    flags: dict[str, Any] = {name[2:]: value for name, value in zip(
        little_text[::2], little_text[1::2], strict=True)}
    made = fedrun.train("fed_avg", sites=Path(path), site_data=data, rounds=2, local_updates=2,
                        data_dir=str(tmp_path), run_name="library", **flags)
    command = run_here("fed_avg", *given, "--rounds", 2, "--local_updates", 2, "--secure_sum")
    assert command.bits == (made.folder / "model.safetensors").read_bytes()
    assert "--secure_sum hides nothing here" in command.output
    with pytest.raises(InputError, match="needs --site_data, where the text of the sites is"):
        fedrun.train("fed_avg", sites=path, **flags)


def test_a_method_that_weighs_clients_anew_tells_nothing_of_one(given: list[str], run_here: Run
                                                               ) -> None:
    outcome = run_here("fed_geometric_median", *given, "--rounds", 2, "--weiszfeld_steps", 1,
                       "--local_updates", 2, "--secure_sum")
    assert outcome.code == 0, outcome.output
    for record in outcome.history:
        # A cosine would be one by the planned weights, which the sum does not have.
        assert not {"client_used", "client_weights", "update_cosine"} & record.keys()
        assert record["step_norm"] > 0
    assert not any("clients" in event for event in outcome.events if event["event"] == "round")
    page = (outcome.run_dir / "privacy.md").read_text(encoding="utf-8")
    assert "--weiszfeld_steps 1`, the same updates are summed once for each" in page


# ---- what is refused -----------------------------------------------------------------------------

@pytest.mark.parametrize(("method", "argv", "message"), [
    ("fed_avg", ["--partition", "documents"], "--partition documents: must be left out beside"),
    ("fed_avg", ["--partition", "contiguous"], "--partition contiguous: must be left out beside"),
    ("fed_avg", ["--alpha", "1"], "--alpha 1.0: must be left out beside --sites"),
    ("fed_avg", ["--size-skew=0"], "--size_skew 0.0: must be left out beside --sites"),
    ("fed_avg", ["--num_clients", "4"], "--num_clients 4: must be left out beside --sites"),
    ("fed_avg", ["--cohort", "6"], "--cohort 6: must be an integer in [1, 5]"),
    ("fed_avg", ["--eval_clients"], "--eval_clients true: must be false with --sites"),
    ("fed_avg", ["--save_client_deltas"], "--save_client_deltas true: must be false with --sites"),
    ("fed_entropy", [], "none with fed_entropy, which weights each client by an entropy"),
    ("fed_avg", ["--secure_sum", "--aggregation", "float"], "--aggregation float: must be exact"),
    ("fed_avg", ["--secure_sum", "--aggregation", "int4"], "--aggregation int4: must be exact or"),
    ("fed_avg", ["--aggregation", "int4"], "int4: must be exact, float or int8 with --sites"),
    ("fed_avg", ["--secure_sum", "--cohort", "2"], "--cohort 2: must be at least 3 clients with"),
    ("fed_avg", ["--site_holdout", "0.1"],
     "--site_holdout 0.1: must be none without --sites FILE and --secure_sum"),
    ("fed_avg", ["--secure_sum", "--site_holdout", "0"], "--site_holdout 0.0: must be in (0, 1)"),
    ("fed_avg", ["--secure_sum", "--site_holdout", "1"], "--site_holdout 1.0: must be in (0, 1)"),
    ("fed_avg", ["--secure_sum", "--site_holdout=nan"], "--site_holdout nan: must be in (0, 1)"),
    ("central", [], "unknown flag --sites"),
    ("fed_avg", ["--sites", "no.yaml"], "--sites no.yaml: No such file or directory"),
])
def test_settings_that_do_not_go_with_sites(
        method: str, argv: list[str], message: str, tmp_path: Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    path = sites_file(tmp_path, THREE)
    assert cli.main([method, "--sites", str(path), *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("argv", "message"), [
    (["--secure_sum"], "--secure_sum true: must be false without --sites FILE"),
    (["--site_holdout", "0.1"], "--site_holdout 0.1: must be none without --sites FILE and"),
    (["--site_data", "x"], "--site_data (or FEDRUN_SITE_DATA, or others of --site): must be given"),
    (["--site", "x"], "--site x: must be given with --site_dir"),
])
def test_settings_that_need_sites(argv: list[str], message: str,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fed_avg", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_secure_sum_needs_three_sites(count: int, tmp_path: Path) -> None:
    names = [*THREE][:count]
    flags = {"sites": str(sites_file(tmp_path, {name: {"clients": 3} for name in names})),
             "secure_sum": True}
    if count >= 3:
        assert resolve("fed_avg", flags)
        return
    with pytest.raises(InputError, match=f"--secure_sum true: must be false with the {count} "):
        resolve("fed_avg", flags)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_several_sums_of_the_same_updates_need_more_sites(steps: int, tmp_path: Path) -> None:
    """And every round has clients of at least that number of sites."""
    dealing = {name: {"clients": 2} for name in NAMES[:4]}
    flags = {"sites": str(sites_file(tmp_path, dealing)), "secure_sum": True, "rounds": 50,
             "local_updates": 2, "weiszfeld_steps": steps}
    if steps == 3:
        with pytest.raises(InputError, match=r"--secure_sum true: must be false with the 4 sites.*"
                           r"at least 5 have to be in the 3 sums of fed_geometric_median"):
            resolve("fed_geometric_median", flags)
        return
    with pytest.raises(InputError, match=f"--cohort {steps + 1}: must be at least {steps + 2} "):
        resolve("fed_geometric_median", flags | {"cohort": steps + 1})
    config = resolve("fed_geometric_median", flags | {"cohort": steps + 2})
    assert isinstance(config, FederatedConfig)
    sites = sites_of(dealing)
    schedule = Schedule(config, [8] * sites.num_clients, sites)
    assert {owners(sites, schedule.cohort(n)) for n in range(1, 51)} == {steps + 2}


def test_the_number_of_clients_is_that_of_the_file(tmp_path: Path) -> None:
    """And a recorded config, whose file of the sites may be gone, is read back as it was."""
    path = sites_file(tmp_path, THREE)
    for method in STRATEGIES:
        if method != "fed_entropy" and not issubclass(STRATEGIES[method], Robust):
            assert resolve(method, {"sites": path}).to_dict()["num_clients"] == 5
    config = resolve("fed_avg", {"sites": path, "num_clients": 5, "secure_sum": "true"})
    path.unlink()
    again = config_of(config.to_dict())
    assert again == config
    assert isinstance(again, FederatedConfig)
    assert again.sites == path


# ---- cohorts -------------------------------------------------------------------------------------

def cohorts(tmp_path: Path, dealing: dict[str, dict[str, Any]], cohort: int, with_sites: bool = True
            ) -> tuple[Sites, list[list[int]]]:
    """The cohorts of 300 rounds."""
    config = resolve("fed_avg", {"sites": sites_file(tmp_path, dealing), "cohort": cohort,
                                 "rounds": 300})
    assert isinstance(config, FederatedConfig)
    sites = sites_of(dealing)
    schedule = Schedule(config, [8] * sites.num_clients, sites if with_sites else None)
    assert schedule.plan(7, 0.0).cohort == schedule.cohort(7)
    return sites, [schedule.cohort(number) for number in range(1, 301)]


def owners(sites: Sites, cohort: list[int]) -> int:
    assert cohort == sorted(set(cohort))
    return len({sites.site_of(client) for client in cohort})


@pytest.mark.parametrize("clients", [(4, 4, 4), (40, 1, 1), (6, 3, 2, 1, 1)])
def test_every_cohort_has_clients_of_three_sites(clients: tuple[int, ...], tmp_path: Path) -> None:
    dealing = {f"s{n}": {"clients": count} for n, count in enumerate(clients)}
    for size in (3, 5):
        sites, drawn = cohorts(tmp_path, dealing, size)
        _, plain = cohorts(tmp_path, dealing, size, with_sites=False)
        assert all(owners(sites, cohort) >= 3 and len(cohort) == size for cohort in drawn)
        kept = [cohort for cohort in plain if owners(sites, cohort) >= 3]
        assert kept == [cohort for cohort, first in zip(drawn, plain, strict=True)
                        if owners(sites, first) >= 3], "what was drawn with three sites stays"
        assert len(kept) < 300


def test_every_allowed_cohort_is_drawn_as_often(tmp_path: Path) -> None:
    """Of three sites with 2, 1 and 1 clients a cohort of three that has all three is one of two."""
    sites, drawn = cohorts(tmp_path, {"a": {"clients": 2}, "b": {}, "c": {}}, 3)
    found = {tuple(cohort): drawn.count(cohort) for cohort in drawn}
    assert set(found) == {(0, 2, 3), (1, 2, 3)}
    assert np.abs(np.array([*found.values()]) - 150).max() < 45  # five standard deviations
    assert sites.num_clients == 4


def test_two_sites_or_a_cohort_of_two_stay_as_they_are_drawn(tmp_path: Path) -> None:
    for dealing, size in (({"a": {"clients": 5}, "b": {"clients": 5}}, 4),
                          (THREE, 2)):
        _, drawn = cohorts(tmp_path, dealing, size)
        assert drawn == cohorts(tmp_path, dealing, size, with_sites=False)[1]

"""`fedrun plan` of runs between sites and with --dp: held against what such runs send and leave."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from fedrun import cli
from fedrun.config import FederatedConfig
from fedrun.experiment import prepare_experiment
from fedrun.flags import resolve
from fedrun.tools import plan_memory
from fedrun.tools.plan import parse
from fedrun.tools.plan_disk import files, sent
from fedrun.tools.plan_memory import CLIPPED, DIGESTED, MASK, MASKED
from fedrun.tools.plan_protected import journal_bytes, log_bytes, word_bytes
from fedrun.tools.plan_ranks import Layout, of_worker, ranks
from fedrun.tools.plan_report import report
from fedrun.tools.plan_text import Text, text_of
from tests.support.planned import PLAN, config_of
from tests.support.private import PRIVATE
from tests.support.real_sites import NAMES, Institutions
from tests.support.runs import CORPUS, Run
from tests.support.site_files import THREE, sites_file, sites_of, texts_of

OF_CLIENTS = tuple(part for name, value in PRIVATE.items() for part in (f"--{name}", value))
OF_SEQUENCES = ("--dp", "example", "--dp_clip", "1", "--dp_noise", "0.8", "--dp_delta", "1e-4")


@pytest.fixture(scope="module")
def institutions() -> Iterator[Institutions]:
    with TemporaryDirectory(prefix="fedrun-sites-") as folder:
        yield Institutions(Path(folder))


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


# ---- what runs send and leave --------------------------------------------------------------------

@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "flags"), [
    ("held", ("--secure_sum", "true", "--site_holdout", "0.1", "--checkpoint_freq", "1")),
    pytest.param("open", (), marks=pytest.mark.slow),
    pytest.param("noised", (*OF_CLIENTS, "--secure_sum", "true"), marks=pytest.mark.slow),
    pytest.param("drawn", OF_SEQUENCES, marks=pytest.mark.slow)])
def test_bytes_and_files_of_sites(institutions: Institutions, name: str, flags: tuple[str, ...]
                                  ) -> None:
    """Of three sites with a process each: sent, to the byte, by each; states, journal and log."""
    counted = {site: institutions.root / site / f"counted-{name}" for site in NAMES}
    ran = institutions.train(*flags, name=name, module="tests.support.counted_fedrun", env={
        site: {"COUNTED": str(file)} for site, file in counted.items()} | {
            "server": {"COUNTED": "/dev/null"}})
    assert ran.server.code == 0, ran.printed
    asked = parse([*institutions.flags(*flags, name=name), "--site_dir", "x", "--processes", "4"])
    assert asked is not None
    text = Text(400, None, None, institutions.sites, real=True)
    config, layout = asked.config, Layout(4, 1, False, False, institutions.sites)
    assert isinstance(config, FederatedConfig)
    schedule = text.schedule(config)
    found = plan_memory.worker(config, 400, False, layout.most(config), schedule)
    traffic = sent(config, found, layout, 3, schedule)
    words = sum(word_bytes(config, layout, institutions.sites, evaluated)
                for evaluated in (True, True, True))  # the first, every second, and the last
    assert {int(file.read_text()) for file in counted.values()} == {round(3 * traffic.mean) + words}
    assert traffic.recorded == ran.server.history[-1]["bytes"]
    north, largest = institutions.root / "north" / "site", institutions.sites["north"]
    planned = files(config, found, layout, 3)
    if config.checkpoint_freq is not None:
        of = {where: sum(file.stat().st_size for file in where.rglob("*.safetensors"))
              for where in (north / "states", ran.server.run_dir / "checkpoints")}
        assert of == {north / "states": planned.at_site["clients' states of 2 checkpoints"],
                      ran.server.run_dir / "checkpoints": 2 * planned.checkpoint}
        assert journal_bytes(config, schedule, largest, 3) == (north / "journal").stat().st_size
    if config.dp == "client":
        log = log_bytes(schedule, found.level or pytest.fail("no level"), 3, largest)
        assert log == (north / "privacy.log").stat().st_size


@pytest.mark.parametrize("flags", [OF_CLIENTS, pytest.param(OF_SEQUENCES, marks=pytest.mark.slow)])
def test_the_log_of_what_a_run_has_spent(run_here: Run, tmp_path: Path, flags: tuple[str, ...]
                                         ) -> None:
    """To the byte: rates of sequences, which stand in it, come from the shards."""
    run = run_here("fed_avg", "--num_clients", 4, "--cohort", 2, "--rounds", 3, *flags,
                   "--dp_dir", tmp_path / "keys")
    assert run.code == 0, run.output
    given = {flag[2:]: value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
    config = resolve("fed_avg", {name: run.config[name] for name in (
        "config", "dataset", "tokenizer", "val_fraction", "cache_dir", "num_clients", "cohort",
        "rounds", "batch_size", "sequence_length")} | given)
    config = dataclasses.replace(config, dtype="fp32")
    assert isinstance(config, FederatedConfig)
    schedule = text_of(config, None).schedule(config)
    found = plan_memory.worker(config, 400, False, schedule=schedule)
    assert found.level is not None
    assert log_bytes(schedule, found.level, 3, None) == (
        tmp_path / "keys" / "privacy.log").stat().st_size


# ---- memory --------------------------------------------------------------------------------------

def test_memory_that_gpus_and_masks_need_of_the_host() -> None:
    """By hand: 4 bytes a parameter for an update's digest and for a mask, 8 for a sum of int64."""
    config = config_of("fed_avg", config="tiny", num_clients=5, rounds=3, batch_size=2,
                       sequence_length=32, **PRIVATE)
    example = config_of("fed_avg", config="tiny", num_clients=5, rounds=3, batch_size=2,
                        sequence_length=32, dp="example", dp_clip="1", dp_noise="1",
                        dp_delta="1e-4")
    for one, bytes_each in ((config, 4), (example, 8)):
        found = plan_memory.worker(one, 400, gpu=True, schedule=Text(400, None, None).schedule(one))
        device, host = of_worker(one, found, 1, gpu=True)
        assert host[DIGESTED] == bytes_each * found.flat.size
        assert device[CLIPPED] == (8 * found.flat.size if one is example else 0)
        assert not of_worker(one, found, 1, gpu=False)[1][DIGESTED]
    masked = dataclasses.replace(config_of("fed_avg", config="tiny", num_clients=4, rounds=3,
                                           local_updates=2), sites=Path("x"), secure_sum=True)
    found = plan_memory.worker(masked, 400, gpu=True)
    layout = Layout(4, 1, False, True, sites_of(THREE))
    server, first = ranks(masked, found, layout)
    assert first.host[MASK] == first.host[MASKED] == 4 * (found.flat.size + 1)
    assert not server.host[MASK]


def test_a_layout_of_sites() -> None:
    """Two, one and two clients; two workers each."""
    layout = Layout(7, 1, False, False, sites_of(THREE))
    config = config_of("fed_avg", config="tiny", num_clients=5)
    assert (layout.team, layout.hosted(5)) == (2, 1)
    assert (layout.most(config), layout.turns(config)) == (1, 1)
    one = Layout(4, 1, False, False, sites_of(THREE))
    assert (one.team, one.hosted(5), one.most(config), one.turns(config)) == (1, 2, 2, 2)


# ---- the command ---------------------------------------------------------------------------------

def test_a_simulation_is_planned_from_the_text_of_its_sites(tmp_path: Path) -> None:
    """Whose sequences are counted once they are tokenised."""
    data, file = texts_of(tmp_path / "texts", THREE), sites_file(tmp_path, THREE)
    asked = parse(["fed_avg", "--config", "tiny", "--dataset", str(CORPUS), "--tokenizer",
                   "bpe:400", "--sequence_length", "32", "--batch_size", "2", "--cache_dir",
                   str(tmp_path / "cache"), "--sites", str(file), "--site_data", data])
    assert asked is not None
    assert text_of(asked.config, None, asked.site).shards is None
    out = "\n".join(report(*asked))
    assert "not known before their text is tokenised" in out
    assert "how many rounds: unknown" in out
    experiment = prepare_experiment(asked.config, torch.device("cpu"), site=asked.site)
    assert text_of(asked.config, None, asked.site).shards == experiment.shards.sizes
    out = "\n".join(report(*asked))
    assert "not known before" not in out
    assert f"\n  {experiment.length.steps:,} rounds" in out


def test_plans_of_sites_and_noise(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = str(sites_file(tmp_path, THREE))
    own = ("--sites", file, "--secure_sum", "true", "--site_dir", "x", "--rounds", "2",
           "--local_updates", "2")
    assert cli.main([*PLAN, *own, "--processes", "4", *OF_CLIENTS]) == 0
    out = capsys.readouterr().out
    for shown in ("a server, and 1 for each of 3 sites", "memory of the first worker of a site",
                  "a mask, made ahead", "sent by a site in a round", "the masks of a site",
                  "the noise of a round", "noise multiplier 1.5; epsilon", "a site's journal",
                  "the log of what was spent", "not known before the sites say so"):
        assert shown in out
    assert cli.main([*PLAN, *own, "--processes", "3"]) == 2
    assert "--processes 3: must be one for the server" in capsys.readouterr().err
    assert cli.main([*PLAN, "--dp", "example", "--dp_clip", "1", "--dp_epsilon", "4", "--dp_delta",
                     "1e-5", "--rounds", "2"]) == 0
    out = capsys.readouterr().out
    assert "sum of clipped gradients" in out
    assert "how much noise --dp_epsilon 4 leads to is not known" in out

"""Settings that had another name: read in run folders and files, an error as flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedrun import cli
from fedrun.common.old_names import renamed
from fedrun.config import FederatedConfig
from fedrun.flags import resolve
from fedrun.model.pretrained import find_pretrained
from fedrun.plots.groups import groups
from fedrun.plots.run_folder import read_run
from fedrun.records import run_files
from fedrun.tools import study_file, study_runs
from tests.support import folders
from tests.support.runs import FAULTY, FLAGS, Run, fault, outcome_of

OLD = {"client_state": "average", "reduce": "float", "wire": "exact"}
NEW = {"client_moments": "average", "aggregation": "float"}


@pytest.mark.parametrize(("before", "now"), [
    (OLD, NEW), (NEW, NEW), ({}, {}),
    ({"reduce": "exact", "wire": "exact"}, {"aggregation": "exact"}),
    ({"reduce": "exact", "wire": "int8"}, {"aggregation": "int8"}),
    ({"reduce": "exact"}, {"aggregation": "exact"}),
    ({"wire": "int8", "lr": 1.0}, {"aggregation": "int8", "lr": 1.0}),
    # Contradictions stay, to be refused by whoever asks for known names only.
    ({"reduce": "float", "wire": "int8"}, {"reduce": "float", "wire": "int8"}),
    ({"wire": "int8", "aggregation": "exact"}, {"wire": "int8", "aggregation": "exact"}),
    ({"client_state": ["x"]}, {"client_moments": ["x"]}),
])
def test_old_names_become_todays(before: dict[str, Any], now: dict[str, Any]) -> None:
    assert renamed(before) == now
    assert renamed(renamed(before)) == now


@pytest.mark.parametrize(("argv", "message"), [
    (["--wire", "int8"], "--wire int8: this flag is now --aggregation int8"),
    (["--wire=int8"], "--wire int8: this flag is now --aggregation int8"),
    (["--reduce", "float"], "--reduce float: this flag is now --aggregation float"),
    (["--client-state", "reset"], "--client_state reset: this flag is now --client_moments reset"),
    (["--wire"], "--wire: this flag is now --aggregation"),
])
def test_an_old_flag_gets_the_new_one(argv: list[str], message: str,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["fed_avg"], ["study", "no/such.yaml"]):
        assert cli.main([*command, *argv]) == 2
        assert capsys.readouterr().err == f"fedrun: error: {message}\n"


def test_old_flags_are_refused_in_python_and_not_in_the_help() -> None:
    with pytest.raises(ValueError, match="--wire int8: this flag is now --aggregation int8"):
        resolve("fed_avg", {"wire": "int8"})
    shown = cli.method_parser("fed_avg").format_help()
    assert "--aggregation" in shown
    assert not {"--wire", "--reduce", "--client_state"} & set(shown.split())


def test_files_of_settings_are_read_in_the_old_spelling(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump(OLD))
    config: Any = resolve("fed_avg", {"config": str(path)})
    assert (config.client_moments, config.aggregation) == ("average", "float")
    path.write_text(yaml.safe_dump(OLD | {"wire": "int8"}))
    with pytest.raises(ValueError, match="unknown key 'reduce', now aggregation"):
        resolve("fed_avg", {"config": str(path)})


def test_a_study_is_read_in_the_old_spelling(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(yaml.safe_dump({
        "reference": "one", "base": {"method": "fed_avg", "rounds": 2, "reduce": "exact"},
        "settings": {"one": {"client_state": "average"}, "two": {"wire": "int8"}}}))
    found = study_file.read(path, tmp_path, {})
    one, two = (found.config(s, (), 0) for s in found.settings.values())
    assert isinstance(one, FederatedConfig)
    assert isinstance(two, FederatedConfig)
    assert (one.client_moments, one.aggregation) == ("average", "exact")
    assert (two.client_moments, two.aggregation) == ("keep", "int8")
    overridden = study_file.read(path, tmp_path, {"aggregation": "float"})
    assert all(s.flags["aggregation"] == "float" for s in overridden.settings.values())


@pytest.mark.slow
def test_a_folder_in_the_old_spelling_is_resumed_plotted_and_reported(
        run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a run of the old spelling leaves: its config.json and its checkpoints' manifests."""
    flags = (*FLAGS, "--client_moments", "average", "--aggregation", "float")
    whole = run("fed_avg", *flags, name="whole")
    old = run("fed_avg", *flags, name="old", script=FAULTY, env=fault(tmp_path, "term", "record:5"))
    assert outcome_of(old) == "stopped", old.output
    spell_old(old.run_dir)
    resumed = run("fed_avg", *flags, name="old")
    assert resumed.code == 0, resumed.output
    assert resumed.bits == whole.bits
    assert (outcome_of(resumed), len(resumed.history)) == ("finished", len(whole.history))
    held = json.loads((old.run_dir / "config.json").read_text())
    assert (held["client_moments"], held["aggregation"]) == ("average", "float")
    assert not held.keys() & OLD.keys()

    spell_old(old.run_dir)
    again = run("fed_avg", *flags, name="old")
    assert (again.code, "finished already" in again.output) == (0, True)
    other = run("fed_avg", *FLAGS, name="old")
    assert other.code == 2
    assert "client_moments average there, keep here" in other.output
    assert "aggregation float there, exact here" in other.output

    spell_old(whole.run_dir)
    settings = find_pretrained(str(whole.run_dir), "RUN").settings
    folders.ours(tmp_path, "central", **{name: settings[name] for name in (
        "dataset", "dtype", "sequence_length")})  # of one protocol, so that one figure has both
    assert (settings["client_moments"], settings["aggregation"]) == ("average", "float")
    assert cli.main(["report", "--data_dir", str(tmp_path)]) == 0
    assert cli.main(["plot", "perplexities", "--data_dir", str(tmp_path), "--out_dir",
                     str(tmp_path / "plots")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "client_moments" in page.replace("<wbr>", "")
    assert "client_state" not in page.replace("<wbr>", "")
    assert "found 3 runs" in capsys.readouterr().out
    (old.run_dir / "config.json").unlink()  # its checkpoints still describe it
    assert (run_files.recorded_settings(old.run_dir) or {}).get("aggregation") == "float"


def spell_old(run_dir: Path) -> None:
    """Rewrite a folder as a run wrote it when its settings had their old names."""
    path = run_dir / "config.json"
    path.write_text(json.dumps(spelled_old(json.loads(path.read_text()))))
    for manifest in run_dir.glob("checkpoints/*/manifest.json"):
        held = json.loads(manifest.read_text())
        held["config"] = spelled_old(held["config"])
        manifest.write_text(json.dumps(held | {"sha256": run_files.manifest_checksum(held)}))


def spelled_old(settings: dict[str, Any]) -> dict[str, Any]:
    settings = renamed(settings)
    kept = {name: value for name, value in settings.items() if name not in NEW}
    how = settings["aggregation"]
    return kept | {"client_state": settings["client_moments"],
                   "reduce": "float" if how == "float" else "exact",
                   "wire": "int8" if how == "int8" else "exact"}


def test_old_and_new_folders_are_one_group_in_figures(tmp_path: Path) -> None:
    """Float sums repeat exact ones; eight bits are a variant, under the new name."""
    default: dict[str, Any] = {"client_moments": "keep", "aggregation": "exact"}
    made = [folders.ours(tmp_path, seed=0, **default),
            folders.ours(tmp_path, seed=1, **spelled_old(default)),
            folders.ours(tmp_path, seed=2, **spelled_old(default | {"aggregation": "float"}))]
    assert [group.variant for group in groups([read_run(path) for path in made])] == [""]
    made += [folders.ours(tmp_path, seed=3, **spelled_old(default | {"aggregation": "int8"})),
             folders.ours(tmp_path, seed=4, **default | {"aggregation": "int8"})]
    found = {group.variant: len(group.runs) for group in groups([read_run(p) for p in made])}
    assert found == {"aggregation=exact": 3, "aggregation=int8": 2}


def test_a_study_takes_its_runs_in_the_old_spelling(tmp_path: Path) -> None:
    config = resolve("fed_avg", {"data_dir": tmp_path, "run_name": "one", **NEW})
    path = folders.ours(tmp_path, name="one")
    folders.write(path / "config.json", spelled_old(config.to_dict()))
    folders.write(path / "outcome.json", {"outcome": "finished", "step": 90})
    folders.write(path / "training_history.json", [{"global_step": 90,
                                                    "val_loss_halves": [1.5, 2.5]}])
    assert study_runs.loss_halves(config) == [1.5, 2.5]

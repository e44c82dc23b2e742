"""The files that a study leaves are read as its run folders would be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrun import cli
from fedrun.common.errors import InputError
from fedrun.plots import perplexity
from fedrun.plots.groups import groups
from fedrun.plots.runs import find_runs
from fedrun.tools import study_file
from tests.support import folders, hostile
from tests.support.runs import ROOT

TRACKED = sorted(path.parent for path in (ROOT / "results").glob("*/histories.json"))
ROW = {"setting": "mine", "flags": {"method": "fed_avg", "config": "tiny", "rounds": 3,
                                    "client_state": "average"}, "best": {"lr": 0.004}}
HISTORY = [{"global_step": 1, "server_val_ppl": 900.0, "tokens": 64},
           {"global_step": 3, "server_val_ppl": 300.0, "tokens": 192}]


def a_study(folder: Path, rows: Any = (ROW,), name: str = "mine_lr_0.004_seed_5") -> Path:
    folder.mkdir(exist_ok=True)
    folders.write(folder / "table.json", list(rows))
    folders.write(folder / "histories.json", {name: HISTORY})
    return folder


@pytest.mark.parametrize("folder", TRACKED, ids=lambda folder: folder.name)
def test_tracked_studies_are_read(folder: Path) -> None:
    """Final perplexities are those of its table, which the study made from the run folders."""
    found = find_runs(folder)
    histories = json.loads((folder / "histories.json").read_text())
    assert {run.name for run in found.runs} == set(histories)
    assert found.passed_over == []
    seeds = re.search(r"Ratio: seeds ([\d, ]+),", (folder / "table.md").read_text())
    assert seeds
    reported = set(map(int, seeds[1].split(", ")))
    values = r"(_(server_)?(lr|momentum)_[\d.e-]+)+"
    for row in json.loads((folder / "table.json").read_text()):
        runs = [run for run in found.runs if run.seed in reported
                and re.fullmatch(f"{row['setting']}{values}_seed_\\d", run.name)]
        assert {run.method for run in runs} == {row["flags"]["method"]} or not runs
        assert {run.settings["lr"] for run in runs} == {row["best"]["lr"]} or not runs
        if "final_ppl" in row:
            assert np.mean([run.final.val_ppl for run in runs]) == pytest.approx(row["final_ppl"])


@pytest.mark.slow
def test_tracked_studies_are_drawn(tmp_path: Path) -> None:
    """Of those that were evaluated at their ends alone, only these are."""
    wire = str(ROOT / "results" / "wire")
    for study, figures in (("original", {"1_central_vs_fed", "2_lu_comparison",
                                         "3_method_comparison", "4_multi_config_comparison",
                                         "5_configs_in_one_axes"}), ("wire", set())):
        assert cli.main(["plot", "perplexities", "--data_dir", str(ROOT / "results" / study),
                         "--out_dir", str(tmp_path / study)]) == 0
        names = {path.stem for path in (tmp_path / study).glob("*.png")}
        assert "0_all_runs" in names
        assert {name.partition("_ssm")[0] for name in names - {"0_all_runs"}} == figures
    page = tmp_path / "page.html"
    assert cli.main(["report", "--data_dir", wire, "--out", str(page)]) == 0
    assert "exact_60_lr_0.002_seed_1" in page.read_text(encoding="utf-8").replace("<wbr>", "")


def test_a_run_has_the_settings_that_the_study_gave_it(tmp_path: Path) -> None:
    """And is found by the name that the study gave it."""
    path = ROOT / "configs" / "experiments" / "methods.yaml"
    study = study_file.read(path, tmp_path, {})
    rows, histories, expected = [], {}, {}
    for setting in study.settings.values():
        point = setting.points()[-1]
        config = study.config(setting, point, 3)
        rows.append({"setting": setting.name, "flags": setting.flags, "best": dict(point)})
        key = "step" if config.method == "central" else "global_step"
        histories[config.name] = [{key: 1, "val_loss": 5.0, "server_val_loss": 5.0}]
        expected[config.name] = {k: v for k, v in config.to_dict().items()
                                 if k not in ("data_dir", "run_name")}
    folders.write(tmp_path / "table.json", json.loads(json.dumps(rows, default=str)))
    folders.write(tmp_path / "histories.json", histories)
    found = find_runs(tmp_path)
    assert found.passed_over == []
    assert {run.name: {k: v for k, v in run.settings.items() if k not in ("data_dir", "run_name")}
            for run in found.runs} == expected


def test_flags_under_former_names_are_read(tmp_path: Path) -> None:
    (run,) = find_runs(a_study(tmp_path)).runs
    assert (run.method, run.config, run.seed, run.local_updates) == ("fed_avg", "tiny", 5, 1)
    assert (run.settings["client_moments"], run.settings["sync"]) == ("average", "round")
    assert run.points("val_ppl", "tokens") == {1: (64, 900.0), 3: (192, 300.0)}


def test_flags_that_are_unknown_here_are_shown_as_they_are(tmp_path: Path) -> None:
    for flags in ({"config": "elsewhere/large.yaml"}, {"warp": 9}, {"method": "a_method_of_mine"}):
        row = ROW | {"flags": ROW["flags"] | flags}  # type: ignore[operator]
        found = find_runs(a_study(tmp_path, [row]))
        ((name, reason),) = found.passed_over
        assert name == "mine"
        assert "shown with the settings that table.json has" in reason
        (run,) = found.runs
        assert run.settings.items() >= flags.items()
        made, _ = perplexity.figures(found.runs, "tokens")
        assert not isinstance(made["0_all_runs"], str)


def test_a_folder_of_studies_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_study(tmp_path / "mine")
    folders.ours(tmp_path)
    assert cli.main(["plot", "perplexities", "--data_dir", str(tmp_path), "--out_dir",
                     str(tmp_path / "plots")]) == 0
    said = capsys.readouterr().out
    assert "found 1 run\n" in said
    assert f"skipped mine: is a study: --data_dir {tmp_path / 'mine'} shows it" in said
    assert cli.main(["plot", "deltas", "--data_dir", str(tmp_path / "mine")]) == 1
    assert "histories.json: has no weights" in capsys.readouterr().out


@pytest.mark.parametrize("kind", hostile.damaged())
def test_damaged_files_are_one_line(tmp_path: Path, kind: str,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    for file, of in (("histories.json", dict), ("table.json", list)):
        folder = a_study(tmp_path / file)
        (folder / file).unlink()
        hostile.put(folder / file, hostile.damaged(of)[kind])
        assert cli.main(["plot", "perplexities", "--data_dir", str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"--data_dir {folder}: {file} " in error


@pytest.mark.parametrize(("rows", "name", "wanted"), [
    ([7], "mine_lr_0.004_seed_5", "row 1 lacks setting"),
    ([ROW, {"setting": "x", "flags": {}, "best": {}}], "mine_lr_0.004_seed_5", "row 2 lacks"),
    ([{**ROW, "best": {"lr": [1]}}], "mine_lr_0.004_seed_5", "no setting for it"),
    ([ROW], "mine_lr_0.008_seed_5", "no setting for it"),
    ([ROW], "mine_lr_0.004", "no setting for it"),
    ([ROW], f"mine_lr_0.004_seed_{2**63}", "seed and local_updates must be whole"),
    ([], "mine_lr_0.004_seed_5", "no setting for it")])
def test_files_of_others_are_one_line(tmp_path: Path, rows: list[Any], name: str, wanted: str
                                      ) -> None:
    with pytest.raises(InputError) as raised:
        find_runs(a_study(tmp_path, rows, name))
    assert wanted in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    (a_study(tmp_path) / "table.json").unlink()
    with pytest.raises(InputError, match=r"table\.json cannot be read: No such file"):
        find_runs(tmp_path)


def test_damaged_histories_of_single_runs_are_skipped(tmp_path: Path) -> None:
    odd = {"mine_lr_0.004_seed_6": hostile.ODD_RECORDS, "mine_lr_0.004_seed_7": {},
           "mine_lr_0.004_seed_8": [{"global_step": 1}]}
    folder = a_study(tmp_path)
    folders.write(folder / "histories.json", {"mine_lr_0.004_seed_5": HISTORY} | odd)
    found = find_runs(folder)
    assert [len(group.runs) for group in groups(found.runs)] == [1]
    assert found.passed_over == [
        (name, "no record of histories.json has a validation perplexity") for name in odd]

"""Runs between sites in model cards and studies."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fedrun.data.sites import write_sites
from fedrun.flags import resolve
from fedrun.library.exporting import model_card
from fedrun.model.pretrained import find_pretrained
from fedrun.records.outcome import write_outcome
from fedrun.tools import study_runs, study_table
from fedrun.tools.study_file import Study
from tests.support.folders import STEPS, ours, perplexity_at, with_model, write
from tests.support.site_files import THREE, sites_of
from tests.support.site_folders import NAMED, at_sites, of_sites


def test_a_model_card_says_that_the_sites_texts_made_it(tmp_path: Path) -> None:
    def card(run: Path) -> str:
        found = find_pretrained(str(with_model(run)), "RUN")
        return model_card(found, "hf", tmp_path / "out", found.build())

    made = card(of_sites(tmp_path, name="sites", dataset="owner/text"))
    assert "clients, local updates per round: 1) on the texts of its sites from scratch" in made
    assert "datasets:" not in made
    assert f"| sites | north, south, east ({NAMED.digest()[:8]}) |" in made
    end = at_sites(perplexity_at(STEPS[-1], 0, 1))
    assert f"| perplexity on text held out by the sites | {end:.2f} |" in made
    plain = card(ours(tmp_path, name="plain", dataset="owner/text"))
    assert ") on owner/text from scratch" in plain
    assert "datasets:\n- owner/text\n" in plain
    assert "sites" not in plain


def test_a_study_takes_a_run_of_the_same_sites_alone(tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """By what their file says, as the text by what was read."""
    monkeypatch.setattr(study_runs, "_content", lambda *_: "the server's text")
    for name, sites in (("here", NAMED), ("copy", NAMED),
                        ("other", sites_of({**THREE, "north": {"clients": 2, "rounded_to": 8}}))):
        write_sites(tmp_path / f"{name}.yaml", sites)

    def config(name: str) -> Any:
        return resolve("fed_avg", {"data_dir": tmp_path, "run_name": "run", "rounds": 2,
                                   "sites": tmp_path / f"{name}.yaml"})

    run = tmp_path / "run"
    run.mkdir()
    write(run / "config.json", config("here").to_dict())
    write(run / "environment.json", {"made_with": {
        "content": "the server's text", "sites": NAMED.digest()[:16]}})
    write(run / "training_history.json", [{"val_loss_halves": [1.5, 2.5]}])
    write_outcome(run, "finished", 2)
    assert study_runs.loss_halves(config("here")) == [1.5, 2.5]
    assert study_runs.loss_halves(config("copy")) == [1.5, 2.5]
    with pytest.raises(ValueError, match="holds a run with another sites"):
        study_runs.loss_halves(config("other"))


def test_a_studys_table_has_a_column_where_something_is_held_out(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {(held, seed): json.loads((of_sites(
        tmp_path, holdout=held, seed=seed, name=f"{held} {seed}") / "training_history.json"
        ).read_text()) for held in (True, False) for seed in (1, 2)}
    monkeypatch.setattr(study_table, "loss_halves", lambda run: [1.0, 2.0])
    monkeypatch.setattr(study_table, "history", runs.__getitem__)
    monkeypatch.setattr(study_table, "_traffic", lambda *_: {})

    def study(*settings: bool) -> Study:
        made = [SimpleNamespace(name=f"held {held}", flags={}, best=(("lr", 1e-3),), held=held,
                                tuned={(("lr", 1e-3),): 1.0}, axis={}) for held in settings]
        return cast(Study, SimpleNamespace(
            settings={one.name: one for one in made}, report_seeds=[1, 2], references=["held"],
            reference_of=lambda setting: setting, tuned_ratio=lambda setting: 1.0, published={},
            tune_seed=0, config=lambda setting, best, seed: (setting.held, seed)))

    rows = study_table.table(study(True, False))
    lines = study_table.markdown(study(True, False), rows).splitlines()[2:]
    ends = [at_sites(perplexity_at(STEPS[-1], seed, 1)) for seed in (1, 2)]
    assert lines[0].endswith("| best ppl | final ppl, held out by the sites |")
    assert lines[2].endswith(f"| {sum(ends) / 2:.2f} ± {(ends[1] - ends[0]) / 2**0.5:.2f} |")
    assert lines[3].endswith("|  |")
    assert len({line.count("|") for line in lines}) == 1
    assert "held out" not in study_table.markdown(study(False), study_table.table(study(False)))

"""The YAML files of studies: which runs they ask for, and what is wrong with them."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest

from fedrun.tools import study, study_file
from fedrun.tools.study_file import Study
from fedrun.tools.study_setting import StudySetting
from tests.support.runs import ROOT
from tests.support.studies import ORIGINAL


def test_grids_grow_at_their_edges_alone() -> None:
    setting = StudySetting("s", {}, {"lr": [1.0, 2.0, 4.0], "mu": [0.1]}, extensions=2)
    losses = {0.5: 3.5, 1.0: 3.0, 2.0: 2.0, 4.0: 1.0, 8.0: 0.5, 16.0: 0.7}

    def score() -> None:
        setting.tuned = {p: losses[dict(p)["lr"]] for p in setting.points()}

    score()
    assert setting.extend()
    assert sorted(setting.grid["lr"]) == [1, 2, 4, 8]
    score()
    assert setting.extend()
    score()
    assert dict(setting.best) == {"lr": 8.0, "mu": 0.1}
    assert not setting.extend()  # interior, and no extension is left
    hopeless = StudySetting("h", {}, {"lr": [1.0, 2.0]}, extensions=2)
    hopeless.tuned = dict.fromkeys(hopeless.points(), math.inf)
    assert not hopeless.extend()


def test_grids_end_where_there_is_no_way_on() -> None:
    """At 0, at integers that are there already, and where a run would be refused."""
    def grown(values: list[float], best: float, most: float = 99, whole: bool = False
              ) -> list[float]:
        setting = StudySetting("s", {}, {"x": [*values]}, extensions=1,
                               whole=frozenset({"x"} if whole else ()))
        setting.tuned = {p: abs(dict(p)["x"] - best) for p in setting.points()}
        assert setting.extend(lambda point: dict(point)["x"] < most) == (len(values) < len(
            setting.grid["x"])) == (setting.extensions == 0)
        return setting.grid["x"]

    assert grown([0.5, 0.9], 0.9) == [0.5, 0.9, pytest.approx(1.62)]
    assert grown([0.5, 0.9], 0.9, most=1) == [0.5, 0.9]
    assert grown([0.0, 0.1], 0.1) == grown([0.0, 0.1], 0.0) == [0.0, 0.1]
    assert grown([2, 3], 3, whole=True) == [2, 3, 4]
    assert grown([2, 3], 2, whole=True) == [2, 3, 1]
    assert grown([1, 2], 1, whole=True) == [1, 2, 0]


def test_the_original_grid(tmp_path: Path) -> None:
    found = study_file.read(ORIGINAL, tmp_path, {})
    configs = {config.name: config for config in study.unfinished(found)}
    assert len(configs) == 36
    assert Counter(config.method for config in configs.values()) == {
        "central": 9, "fed_avg": 18, "fed_momentum": 3, "fed_entropy": 3, "fed_fisher": 3}
    assert set(found.published) < set(found.settings)
    for flags, comparable in (
            ({"dataset": "pydocs"}, False), ({"report_seeds": "0"}, False),
            ({"axes": ["seed=0,1"]}, False), ({"axes": ["config=study"]}, False),
            ({"report_seeds": "2,1,0"}, True), ({"axes": ["seed=0,1,2"]}, True),
            ({"axes": ["config=ssm_1_layer_padded", "local_updates=1"]}, True)):
        assert bool(study_file.read(ORIGINAL, tmp_path, flags).published) == comparable, flags
    small = study_file.read(ORIGINAL, tmp_path, {"scale": "small"})
    assert len(study.unfinished(small)) == 36
    assert not small.published
    for config in study.unfinished(small):
        whole = configs[config.name.replace("tiny_1_layer", "ssm_1_layer_padded")
                        .replace("tiny_4_layer", "ssm_4_layer_padded")
                        .replace("tiny", "ssm_2_layer_padded").replace("0.002", "0.0005")]
        assert config.model.to_dict()["n_layer"] == whole.model.to_dict()["n_layer"]
        differing = {name for name, value in config.results_dict().items()
                     if whole.results_dict()[name] != value}
        assert differing == {"dataset", "tokenizer", "model", "lr"} - (
            set() if config.model != whole.model else {"model"})


@pytest.mark.parametrize("name", sorted(
    path.stem for path in (ROOT / "configs" / "experiments").glob("*.yaml")))
def test_shipped_studies_are_valid(name: str, tmp_path: Path) -> None:
    read: Study = study_file.read(ROOT / "configs" / "experiments" / f"{name}.yaml", tmp_path, {})
    for setting in read.settings.values():
        for point in setting.points():
            config = read.config(setting, point, 1)
            assert config.seed == 1
    if name == "methods":  # all at equal tokens
        for setting in read.settings.values():
            config = read.config(setting, setting.points()[0], 0)
            steps = (config.rounds or 0) * getattr(config, "local_updates", 1)
            assert steps == 240
    if name == "bytes":  # equal tokens, and no row with few outer steps
        for setting in read.settings.values():
            config = read.config(setting, setting.points()[0], 0)
            clients = config.to_dict()["num_clients"] if config.method != "central" else 1
            updates = getattr(config, "local_updates", 1)
            assert config.rounds is not None
            assert config.rounds >= 33
            sequences = config.rounds * updates * clients * config.batch_size
            assert sequences == pytest.approx(2040 * 8, rel=0.01)
            assert len(setting.points()) <= 8
            if "server_momentum" in setting.grid:  # which must stay below 1
                assert setting.extensions == 0


AXES = """
reference: central
axes: {config: [study, tiny], local_updates: [1, 8], seed: [3, 4]}
grid: {lr: [0.001]}
scales: {small: {base: {dataset: pydocs}, axes: {config: [tiny]}}}
base: {rounds: 8, num_clients: 2}
settings:
  central: {method: central}
  averaged: {method: fed_avg}
  entropy: {method: fed_entropy, only_first: [config], local_updates: 2}
"""


def test_axes_make_rows_with_a_reference_each(tmp_path: Path) -> None:
    path = tmp_path / "axes.yaml"
    path.write_text(AXES)
    found = study_file.read(path, tmp_path, {})
    assert (found.tune_seed, found.report_seeds) == (3, [3, 4])
    assert {name: found.reference_of(s).name for name, s in found.settings.items()} == {
        "central_study": "central_study", "central_tiny": "central_tiny",
        "averaged_study_local_updates_1": "central_study",
        "averaged_study_local_updates_8": "central_study",
        "averaged_tiny_local_updates_1": "central_tiny",
        "averaged_tiny_local_updates_8": "central_tiny",
        "entropy_study": "central_study"}
    row = found.settings["averaged_tiny_local_updates_8"]
    config = found.config(row, row.points()[0], 4)
    assert (config.config, config.to_dict()["local_updates"]) == ("tiny", 8)
    assert config.name == "averaged_tiny_local_updates_8_lr_0.001_seed_4"

    small = study_file.read(path, tmp_path, {
        "scale": "small", "axes": ["local-updates=4"], "report_seeds": "7", "temperature": "2"})
    assert small.folder == tmp_path / "axes_small"
    assert small.report_seeds == [7]
    assert [*small.settings] == ["central_tiny", "averaged_tiny_local_updates_4", "entropy_tiny"]
    settings = small.to_dict()["settings"]
    assert {row["dataset"] for row in settings.values()} == {"pydocs"}
    assert settings["entropy_tiny"]["temperature"] == 2  # which only this method has
    assert study_file.read(path, tmp_path, {"name": "mine"}).folder == tmp_path / "mine"

    path.write_text("{reference: a, settings: {a: {method: central}, b: {method: fed_avg, "
                    "grid: {local_updates: [1, 2]}}}}")
    with pytest.raises(ValueError, match=r"--local_updates: every setting of .* has a grid"):
        study_file.read(path, tmp_path, {"num_clients": 2, "local_updates": 3})
    path.write_text("{reference: a, axes: {dataset: [x/t.txt, y/t.txt, z.txt]}, settings: "
                    "{a: {method: central}}}")
    assert [*study_file.read(path, tmp_path, {}).settings] == ["a_x_t.txt", "a_y_t.txt", "a_z.txt"]

    path.write_text(AXES.replace("{method: fed_avg}", "{method: fed_avg, config: wide.yaml}"))
    with pytest.raises(ValueError, match=r"wide\.yaml"):
        study_file.read(path, tmp_path, {})
    path.write_text(AXES.replace("{method: fed_avg}", "{method: fed_avg, config: study_federated}"))
    with pytest.raises(ValueError, match=r"averaged.*: central is not run at the same values"):
        study_file.read(path, tmp_path, {})


@pytest.mark.parametrize(("text", "said"), [
    ("{reference: a, axes: {config: tiny}, settings: {a: {method: central}}}",
     "axes.config tiny: must be a list"),
    ("{reference: a, base: {temperature: 1}, settings: {a: {method: central}}}",
     "base: temperature: no setting"),
    ("{reference: a, settings: {a: {method: fedavg}}}", "settings.a: method fedavg: must be one"),
    ("{reference: a, settings: {a: {method: central, only_first: [lr]}}}", "only_first"),
    ("{settings: {a: {method: central}}}", "reference"),
    ("{reference: [a, b], settings: {a: {method: central}}}", "reference b: must be one of a, or"),
    ("{reference: [], settings: {a: {method: central}}}", "reference None: must be one of a, or"),
    ("{reference: a, settings: {a: {method: central, extensions: -1}}}", "a: extensions -1"),
    ("{reference: a, settings: {a: {lr: 1}}}", "settings.a"),
    ("{reference: a, seeds: [1], settings: {a: {method: central}}}", "unknown key 'seeds'"),
    ("{reference: a, settings: {a: {method: fed_avg, temperature: 1}}}", "temperature"),
    ("{reference: a}", "settings"),
    ("{reference: a, base: {seed: 1}, settings: {a: {method: central}}}", "base: seed: not used"),
    ("{reference: a, settings: {a: {method: central, data_dir: x}}}",
     "settings.a: data_dir: not used by study"),
    ("{reference: a, settings: {a: null}}", "settings.a"),
    ("{reference: a, jobs: 0, settings: {a: {method: central}}}", "jobs 0: must be an integer"),
    ("{reference: a, grid: {lr: fast}, settings: {a: {method: central}}}", "settings.a: grid"),
    ("{reference: a, grid: 3, settings: {a: {method: central}}}", "grid 3: must be a mapping"),
    ("{reference: a, workers: 0, settings: {a: {method: central}}}", "workers 0: must be an int"),
    ("{reference: a, figures: [curves], settings: {a: {method: central}}}",
     "figures curves: must be one of perplexities"),
    ("[" * 1100, "cannot be read as YAML"),
    ("{reference: a, grid: {lr: []}, settings: {a: {method: central}}}", "grid .*different number"),
    ("{reference: a, grid: {lr: [1, 1]}, settings: {a: {method: central}}}", "different numbers"),
    ("{reference: a, report_seeds: [1, 1], settings: {a: {method: central}}}", "different integer"),
    ("{reference: a, report_seeds: [1.5], settings: {a: {method: central}}}", "different integers"),
    ("{reference: [[a]], settings: {a: {method: central}}}", "reference .*must be one of a, or"),
    ("{reference: a, axes: {dataset: [x/t.txt, 'x t.txt', y/t.txt]}, "
     "settings: {a: {method: central}}}", "a_x_t.txt: must be another name"),
    ("{reference: a, axes: {seq: [1]}, settings: {a: {method: central}}}", "axes seq"),
])
def test_an_invalid_study_is_reported_before_any_run(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        study_file.read(path, tmp_path, {})

"""Flags that do nothing: refused if a command never reads them, else a warning."""

from __future__ import annotations

import dataclasses
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedrun import cli
from fedrun.config import RunConfig
from fedrun.data.text_options import TextOptions
from fedrun.flags import method_flags, resolve
from fedrun.run import run
from fedrun.strategies import STRATEGIES
from fedrun.strategies.base import Strategy
from fedrun.unused import IDLE, NEVER_READ, idle
from tests.support.folders import ours, with_model
from tests.support.runs import SMALL

STUDY = {"reference": "central", "grid": {"lr": [1e-3]}, "settings": {
    "central": {"method": "central", "rounds": 2},
    "two": {"method": "fed_avg", "rounds": 2}}}


@pytest.fixture
def study_file(tmp_path: Path) -> str:
    path = tmp_path / "little.yaml"
    path.write_text(yaml.safe_dump(STUDY))
    return str(path)


@pytest.mark.parametrize(("argv", "message"), [
    (["central", "--timeout", "60"], "--timeout: not used by central (a single process"),
    (["study", "FILE", "--seed", "5"], "--seed: not used by study (the study's file"),
    (["study", "FILE", "--run_name", "x"], "--run_name: not used by study"),
    (["study", "FILE", "--data-dir=x"], "--data_dir: not used by study"),
    (["study", "FILE", "--lr", "1e-3"], "--lr: every setting of"),
    (["study", "FILE", "--roundz", "3"], "unknown flag --roundz, did you mean --rounds?"),
    (["study", "FILE", "--rounds"], "--rounds: expected one argument"),
    (["study", "FILE", "--grid", "lr"], "unknown flag --grid"),
    (["study", "FILE", "--jobs", "0"], "jobs 0: "),
])
def test_a_flag_that_nothing_reads_is_an_error(argv: list[str], message: str, study_file: str,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([study_file if a == "FILE" else a for a in argv]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


# For each setting that others can make idle: a value that is not its default, settings under which
# it is idle with what is said, and settings under which it is not.
IDLE_CASES: list[tuple[str, dict[str, Any], dict[str, Any], str, dict[str, Any]]] = [
    ("central", {"alpha": 0.1}, {}, "--alpha 0.1 has no effect with --batches all",
     {"batches": "clients", "partition": "dirichlet"}),
    ("central", {"alpha": 0.1}, {"batches": "clients"}, "without --partition dirichlet",
     {"batches": "one_client", "partition": "dirichlet"}),
    ("central", {"partition": "documents"}, {}, "--partition documents has no effect with",
     {"batches": "clients"}),
    ("central", {"num_clients": 8}, {}, "--num_clients 8 has no effect with --batches all",
     {"batches": "one_client"}),
    ("central", {"size_skew": 0.5}, {}, "--size_skew 0.5 has no effect", {"batches": "clients"}),
    ("central", {"n_epochs": 3}, {"rounds": 4}, "--n_epochs 3 has no effect with --rounds", {}),
    ("central", {"epoch_passes": 2}, {"rounds": 4}, "--epoch_passes 2 has no effect", {}),
    ("fed_avg", {"epoch_passes": 2}, {"rounds": 4}, "--epoch_passes 2 has no effect",
     {"rounds": 4, "sync": "epoch"}),
    ("fed_avg", {"alpha": 0.1}, {}, "without --partition dirichlet", {"partition": "dirichlet"}),
    ("fed_avg", {"prox_mu": 0.1}, {}, "--prox_mu 0.1 has no effect with --local_updates 1",
     {"local_updates": 2}),
    ("fed_avg", {"local_updates_schedule": "quadratic"}, {"lr_schedule": "cosine"},
     "has no effect with --local_updates 1", {"lr_schedule": "cosine", "local_updates": 2}),
    ("fed_avg", {"local_updates_schedule": "quadratic"}, {"local_updates": 2},
     "has no effect with --lr_schedule constant", {"lr_schedule": "cosine", "local_updates": 2}),
    ("central", {"muon_momentum": 0.9}, {}, "--muon_momentum 0.9 has no effect without --local_op",
     {"local_optimizer": "muon"}),
    ("fed_avg", {"moments_every": "3,6"}, {}, "without --client_moments average_sqrt",
     {"client_moments": "average_sqrt", "grad_clip": 1}),
    ("fed_avg", {"client_store": "disk"}, {"num_clients": 1}, "with one client", {}),
    ("fed_avg", {"client_store": "disk"}, {"client_moments": "reset"}, "that keep no state", {}),
    ("fed_avg", {"weighting": "uniform"}, {"cohort": 1}, "with one client in a round", {}),
    ("fed_entropy", {"temperature": 0.5}, {"num_clients": 1}, "with one client in a round", {}),
    ("fed_entropy", {"entropy_holdout": 0.2}, {"entropy_on": "validation"},
     "--entropy_holdout 0.2 has no effect with --entropy_on validation", {}),
    ("fed_fisher", {"fisher_microbatches": 4}, {}, "without --fisher corrected",
     {"fisher": "corrected"}),
    ("fed_momentum", {"momentum_form": "nesterov"}, {"server_momentum": 0},
     "with --server_momentum 0", {}),
    ("diloco", {"server_momentum_warmup": True}, {"server_momentum": 0},
     "--server_momentum_warmup True has no effect with --server_momentum 0", {}),
    ("central", {"server_momentum_warmup": True}, {"server_momentum": 0, "outer_every": 2},
     "with --server_momentum 0", {"outer_every": 2}),
    *(("central", flag, {}, "without --outer_every", {"outer_every": 2}) for flag in (
        {"server_lr": 1}, {"server_momentum": 0.5}, {"server_momentum_warmup": True})),
    ("fed_avg", {"extend": True}, {}, "--extend True has no effect with --lr_schedule constant",
     {"lr_schedule": "cosine"}),
    ("fed_avg", {"dp_dir": "x"}, {}, "--dp_dir x has no effect without --dp client",
     {"dp": "client", "dp_clip": 1, "dp_noise": 1, "dp_delta": 1e-3}),
    ("fed_avg", {"config": "tiny"}, {"init_from": "x"}, "the model of --config tiny", {}),
]


@pytest.mark.parametrize(("method", "flag", "makes_idle", "message", "makes_it_act"), IDLE_CASES)
def test_a_flag_without_effect_is_a_warning(
        method: str, flag: dict[str, Any], makes_idle: dict[str, Any], message: str,
        makes_it_act: dict[str, Any]) -> None:
    (name,) = flag
    assert message in idle(resolve(method, flag | makes_idle))[name]
    assert name not in idle(resolve(method, makes_idle))
    assert name not in idle(resolve(method, flag | makes_it_act))


def test_every_rule_has_a_case() -> None:
    assert {name for _, flag, *_ in IDLE_CASES for name in flag} == {*IDLE, "config"}
    for method in ("central", *STRATEGIES):
        assert not idle(resolve(method, {"rounds": 7})), "defaults cause no warning"


WORDS = {"config", "data_dir", "run_name"}  # read by the config itself: they name the run's folder


QUICK = ("central", "fed_avg")


@pytest.mark.parametrize("method", [*QUICK, *(
    pytest.param(method, marks=pytest.mark.slow) for method in STRATEGIES if method not in QUICK)])
def test_whatever_a_run_does_not_read_is_in_the_tables(
        method: str, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run, watched: which of its settings does code outside the config ask for?"""
    read: dict[str, set[str]] = defaultdict(set)

    def watched(self: object, name: str) -> Any:
        file = sys._getframe(1).f_code.co_filename
        path = Path(file)
        itself = {"config", "flags", "unused"} & {path.stem, path.parent.name}
        if "fedrun" in file and not itself:
            read[name].add(file)
        return object.__getattribute__(self, name)

    for cls in (RunConfig, Strategy):
        monkeypatch.setattr(cls, "__getattribute__", watched, raising=False)
    flags: dict[str, Any] = {k[2:]: v for k, v in zip(SMALL[::2], SMALL[1::2], strict=True)}
    flags |= {"rounds": 2, "data_dir": tmp_path, "cache_dir": cache_dir, "num_clients": 5}
    assert run(resolve(method, flags)) == 0
    assert read["text_options"], "which is made of the flags that decide which text is read"
    unread = set(method_flags(method)) - set(read) - WORDS - {
        field.name for field in dataclasses.fields(TextOptions)}
    assert not unread - set(IDLE) - set(NEVER_READ.get(method, ()))


def test_a_study_refuses_flags_without_effect(study_file: str, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(study_file)
    content = yaml.safe_load(path.read_text())
    content["settings"]["two"]["grid"] = {"local_updates": [2]}
    content["axes"] = {"config": ["tiny"]}
    path.write_text(yaml.safe_dump(content))
    argv = ["study", study_file, "--results", str(tmp_path), "--print_config"]
    assert cli.main([*argv, "--lr", "5e-4", "--num_clients", "2"]) == 0
    captured = capsys.readouterr()
    assert "--lr does not apply to central_tiny, tuned on a grid of it" in captured.err
    rows = yaml.safe_load(captured.out)["settings"]
    assert (rows["two_tiny"]["lr"], rows["two_tiny"]["num_clients"]) == (5e-4, 2)
    assert rows["central_tiny"]["lr"] == 1e-3
    for flags, message in ((["--n-epochs", "2"], "--n_epochs 2 has no effect with --rounds in any"),
                        (["--alpha=0.1"], "--alpha 0.1 has no effect"),
                        (["--temperature", "2"], "--temperature: no setting of the study has"),
                        (["--config", "study"], "--config: an axis of"),
                        (["--axes", "config"], "--axes config: must be FLAG=VALUE,VALUE"),
                        (["--axes", "config=tiny", "--axes", "config=study"],
                         "--axes config=study: must be the only --axes for config"),
                        (["--axes", "seed=1", "--report_seeds", "2"], "--report_seeds 2: must be"),
                        (["--axes", "momentum=1"], "axes momentum: must be a flag of a setting"),
                        (["--scale", "huge"], "--scale huge: must be one of"),
                        (["--report_seeds", "1,a"], "must be different integers"),
                        (["--overwrite"], "--overwrite: not used by study (a study resumes its"),
                        (["--seed", "5", "--lr", "0.01"], "--seed: not used by study")):
        assert cli.main([*argv, *flags]) == 2
        assert message in capsys.readouterr().err


def test_tools_warn_of_flags_without_effect(tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    model = str(with_model(ours(tmp_path)))
    command = ["generate", model, "--prompt", "once upon", "--max_new_tokens", "2"]
    assert cli.main([*command, "--top_k", "3", "--seed", "1"]) == 0
    message = capsys.readouterr().err
    assert "--top_k 3 has no effect with --temperature 0" in message
    assert "--seed 1 has no effect with --temperature 0" in message
    assert cli.main([*command, "--top_k", "3", "--temperature", "1"]) == 0
    assert "no effect" not in capsys.readouterr().err

"""Commands, flags, precedence, and the one line that a wrong value gets."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fedrun import cli
from fedrun import torchrun as launcher
from fedrun.config import FederatedConfig, RunConfig
from fedrun.flags import config_of, configs_dir, method_flags, methods, resolve
from fedrun.model.config import ModelConfig
from fedrun.records.outcome import write_outcome
from fedrun.records.provenance import Length
from fedrun.records.run_lock import release_run_dir
from fedrun.start import RunRefused, StartDecision, decide_start, prepare_run_dir
from fedrun.strategies import STRATEGIES
from tests.support.runs import ROOT, execute, fresh_python


def parsed(*argv: str) -> RunConfig:
    config = cli.parse(argv)
    assert config is not None
    return config


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_padded_presets_differ_in_the_padding_alone(layers: int) -> None:
    padded, plain = (parsed("fed_avg", "--config", name).model.to_dict() for name in (
        f"ssm_{layers}_layer_padded", f"pure_ssm_{layers}_layer"))
    assert padded == plain | {"pad_vocab_multiple": 8}
    assert parsed("fed_avg", "--config", f"ssm_{layers}_layer_padded").model.rows(50257) == 50264


def test_defaults_are_those_of_the_study() -> None:
    central, federated = parsed("central"), parsed("fed_avg")
    assert (central.batch_size, central.val_freq) == (16, 10)
    assert isinstance(federated, FederatedConfig)
    assert (federated.batch_size, federated.val_freq) == (4, 30)
    assert (federated.num_clients, federated.local_updates) == (4, 1)
    for config in (central, federated):
        assert (config.config, config.n_epochs, config.lr) == ("pure_ssm_1_layer", 1, 5e-4)
        assert (config.sequence_length, config.seed) == (256, 0)
        assert str(config.data_dir) == "results"
        model = config.model
        assert isinstance(model, ModelConfig)
        assert (model.d_model, model.d_state, model.headdim, model.expand, model.ngroups,
                model.d_conv) == (512, 128, 64, 2, 1, 4)


def test_folder_names_are_those_of_the_study() -> None:
    assert parsed("central", "--seed", "3").name == "central_config_pure_ssm_1_layer_seed_3"
    assert parsed("fed_avg", "--local_updates", "8", "--config", "pure_ssm_4_layer").name == (
        "federated_config_pure_ssm_4_layer_lu_8_seed_0")
    assert parsed("fed_avg", "--run_name", "mine").name == "mine"


def test_the_folder_of_a_run_from_a_model_is_named_after_it(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
        ) -> None:
    (tmp_path / "old-1.5").mkdir()
    monkeypatch.chdir(tmp_path / "old-1.5")
    for model in (".", "../old-1.5/", str(tmp_path / "old-1.5")):
        assert cli.parse(["central", "--config", "tiny", "--init_from", model,
                          "--print_run_dir"]) is None
        assert capsys.readouterr().out == "results/central_config_old-1_5_seed_0\n"


def test_underscores_and_dashes_are_the_same() -> None:
    assert parsed("fed-avg", "--num-clients", "7", "--local-updates=2") == parsed(
        "fed_avg", "--num_clients=7", "--local_updates", "2")


def test_integers_are_taken_as_they_are() -> None:
    for text, seed in (("9007199254740993", 2**53 + 1), ("1e3", 1000), ("7.0", 7), ("-0", 0)):
        assert parsed("central", "--seed", text).seed == seed
    for wrong in ("1.5", "inf", "nan", "9" * 5000, "1" + "0" * 400, "x"):
        with pytest.raises(ValueError, match=r"--seed .*: must be an integer"):
            parsed("central", "--seed", wrong)


def test_precedence_default_method_config_flags(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("lr: 1e-3\nbatch_size: 8\nmodel: {n_layer: 3}\n")
    config = parsed("central", "--config", str(mine), "--batch_size", "2")
    assert config.val_freq == 10            # the method's file over the field's default
    assert config.lr == 1e-3                # --config (a text in YAML 1.1) over both
    assert config.batch_size == 2           # a flag over all
    assert config.model == ModelConfig(n_layer=3)
    assert config.config_name == "mine"


def test_printed_config_is_a_config_again(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--lr", "3e-3", "--sync", "epoch", "--rounds", "9"]
    assert cli.main(["fed_avg", *flags, "--print_config"]) == 0
    lines = capsys.readouterr().out.splitlines(keepends=True)
    saved = tmp_path / "pure_ssm_1_layer.yaml"
    saved.write_text("".join(line for line in lines if not line.startswith(("method:", "config:"))))
    again = parsed("fed_avg", "--config", str(saved))
    assert again.results_dict() | {"config": ""} == (
        parsed("fed_avg", *flags).results_dict() | {"config": ""})


ODD: tuple[dict[str, Any], ...] = (
    {"lr": 1e-320, "grad_clip": math.inf, "alpha": 0.1 + 0.2, "seed": 2**63 - 1, "cohort": 0.25},
    {"run_name": 'a "name" of ünïcode\n', "dataset": "texts/\udcff*.txt", "cohort": 3,
     "text_column": "title,body", "data_dir": "~/a b", "cache_dir": Path("/"), "keep": "best"},
    {"checkpoint_freq": None, "rounds": 7, "prox_mu": 1e-3, "local_updates": 8, "tokenizer": "",
     "server": "colocated", "extend": True, "weighting": "uniform"})


@pytest.mark.parametrize("method", ["central", *STRATEGIES])
def test_a_config_is_read_back_from_json(method: str) -> None:
    known = method_flags(method)
    presets = [{"config": path.stem} for path in (configs_dir() / "models").glob("*.yaml")
               if method == "fed_avg" or path.stem not in ("study_federated", "federated_fast")]
    assert len(presets) > 5
    refused = {"fed_sgd": {"grad_clip", "prox_mu", "local_updates"}, "fed_median": {"cohort"},
               "fed_trimmed_mean": {"cohort"}, "fed_krum": {"cohort"}}.get(method, set())
    for flags in (*presets, *ODD):
        config = resolve(method, {k: v for k, v in flags.items() if k in known.keys() - refused})
        again = config_of(json.loads(json.dumps(config.to_dict())))
        assert again == config
        assert repr(again) == repr(config)  # types too
    # What no flag can say.
    made = dataclasses.replace(config, run_name="none", init_from="none")
    assert config_of(json.loads(json.dumps(made.to_dict()))) == made


@pytest.mark.parametrize(("argv", "message"), [
    (["fed_avgg"], "unknown command 'fed_avgg', did you mean fed_avg?"),
    (["fed_sign"], r"unknown command 'fed_sign'.*\(a method of your own needs --plugin FILE\)$"),
    (["fed_avg", "tiny", "--lr", "1"], "unexpected argument 'tiny' \\(fedrun fed_avg --help"),
    (["report", "my runs"], "unexpected argument 'my runs' \\(fedrun report --help"),
    (["generate", "RUN", "One", "two"], "unexpected argument 'two'"),
    (["generate", "RUN", "One", "--prompt", "two"], "--prompt two: was given without the flag too"),
    (["evaluate", "RUN", "a.txt", "--dataset", "b.txt"], "--dataset b.txt: was given without"),
    (["fed_avg", "--num_client", "3"], "did you mean --num_clients?"),
    (["fed_avg", "--num_clients", "0"], "--num_clients 0: must be an integer >= 1"),
    (["fed_avg", "--num_clients", "2.5"], "--num_clients 2.5: must be an integer"),
    (["fed_avg", "--lr", "-1"], "--lr -1.0: must be > 0"),
    (["fed_avg", "--lr", "nan"], "--lr nan"),
    (["fed_avg", "--cohort", "9"], r"--cohort 9: must be an integer in \[1, 4\]"),
    (["fed_avg", "--cohort", "1.5"], r"--cohort 1.5: must be an integer in \[1, 4\]"),
    (["fed_avg", "--cohort", "inf"], "--cohort inf: must be"),
    (["fed_avg", "--cohort", "2", "--sync", "epoch"], "--cohort 2: must be none with --sync"),
    (["central", "--epoch_passes", "inf"], "--epoch_passes inf: must be a finite number > 0"),
    (["fed_avg", "--lr"], "--lr: expected one argument"),
    (["fed_avg", "--sync", "never"], "--sync never: must be round or epoch"),
    (["fed_avg", "--rounds", "0"], "--rounds 0"),
    (["fed_avg", "--timeout", "0"], "--timeout"),
    (["fed_avg", "--run_name", "../x"], "--run_name ../x"),
    (["fed_avg", "--config", "pure_ssm_9"], "must be .*pure_ssm_1_layer, pure_ssm_2_layer"),
    (["fed_avg", "--config", "no/such.yaml"], "--config no/such.yaml"),
    (["central", "--local_updates", "4"], "unknown flag --local_updates"),
])
def test_a_wrong_value_gets_one_line_and_exit_code_2(
        argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert re.search(message.replace("?", "\\?"), captured.err)
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(("text", "message"), [
    ("learning_rate: 1\n", "unknown key 'learning_rate'"),
    ("model: {layers: 2}\n", "section `model` accepts n_layer"),
    ("model: {headdim: 48}\n", "model.headdim"),
    ("lr: fast\n", "lr fast: must be a number"),
    ("- a\n", "must be a mapping of settings"),
    ("a: [\n", "cannot be read as YAML"),
])
def test_a_wrong_file_is_named_with_its_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="--config") as caught:
        resolve("fed_avg", {"config": str(path)})
    assert message in str(caught.value)


def test_every_flag_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("central", *STRATEGIES):
        assert cli.method_parser(method).format_help().count("(default:") >= 15
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("central", *STRATEGIES, *cli.TOOLS))
    assert max(map(len, out.splitlines())) <= 80


def test_the_first_steps_of_the_overview_can_be_taken(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
        ) -> None:
    """Every command that it names exists, and accepts these flags."""
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    commands = first_steps()
    assert all(command in shown for _, command in cli.FIRST_STEPS)
    kinds = set()
    for words in commands:
        kinds.add(words[1])
        if words[0] == "python":
            assert "train(" in fresh_python(words[2])
        elif words[1] in cli.TOOLS:
            monkeypatch.chdir(ROOT if words[1] == "study" else tmp_path)
            with suppress(SystemExit):
                assert cli.main([*words[1:], "--print_config" if words[1] == "study" else "--help"]
                                ) == 0
            assert not capsys.readouterr().err
        else:
            assert cli.parse(words[1:]) is not None
    assert {"fed_avg", "generate", "report", "study", "-c"} == kinds


def test_the_first_steps_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which they are printed, in one folder: each trains a run of its own."""
    monkeypatch.chdir(tmp_path)
    runs = [config for words in first_steps() if words[1] in methods()
            if (config := cli.parse(words[1:])) is not None]
    assert len(runs) >= 3
    for config in runs:
        start = starts(config)
        assert not start.finished
        assert start.checkpoint is None
        assert config.lr == 4e-3  # the default lr leaves so little a model far from text
    names = {config.name for config in runs}
    assert {words[2] for words in first_steps() if words[1] == "generate"} <= names


def test_a_default_name_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody typed --run_name: the message says where the name is from, and what to do."""
    monkeypatch.chdir(tmp_path)
    starts(parsed("fed_avg", "--lr", "1e-3"))
    with pytest.raises(RunRefused, match=r"^the default name federated_\S+ is taken by a run "
                       r"with other settings \(lr .*\); choose another with --run_name, or "):
        starts(parsed("fed_avg", "--lr", "2e-3"))
    starts(parsed("fed_avg", "--run_name", "mine", "--lr", "1e-3"))
    with pytest.raises(RunRefused, match=r"^--run_name mine: \S+ holds a run with other settings"):
        starts(parsed("fed_avg", "--run_name", "mine", "--lr", "2e-3"))


def first_steps() -> list[list[str]]:
    """The commands of the overview as fedrun gets their words, launched or not."""
    found = []
    for _, command in cli.FIRST_STEPS:
        words = shlex.split(command.replace("\\\n", ""))
        if words[:3] == ["python", "-m", "fedrun.torchrun"]:
            args = launcher.parse(words[3:])
            assert args.nproc_per_node == "5"
            assert args.training_script == "fedrun"
            words = ["fedrun", *args.training_script_args]
        found.append(words)
    return found


def starts(config: RunConfig) -> StartDecision:
    """Start a run in its folder, and say that it has finished."""
    try:
        start = decide_start(config, Length(config, 10), lambda _: "fp32", {})
        prepare_run_dir(config, None)
        write_outcome(config.run_dir, "finished", config.rounds or 10)
    finally:
        release_run_dir(config.run_dir)
    return start


def test_help_imports_no_library_that_takes_time() -> None:
    """What is left takes a tenth of a second or so; a clock would measure the machine."""
    code, output = execute([sys.executable, "-X", "importtime", "-m", "fedrun", "fed_avg",
                            "--help"])
    assert code == 0
    imported = {line.rpartition("|")[2].strip() for line in output.splitlines()
                if line.startswith("import time:")}
    assert {"fedrun", "yaml"} <= imported
    assert not imported & {"torch", "numpy", "transformers", "datasets", "tokenizers", "pandas",
                           "pyarrow", "scipy", "sklearn", "matplotlib", "rich", "safetensors"}


@pytest.mark.slow
def test_presets_work_from_an_installed_wheel_in_an_empty_folder(tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    code, output = execute([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps",
                            "--wheel-dir", str(wheels), str(ROOT)], limit=110)
    assert code == 0, output
    code, output = execute([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps",
                            "--target", str(site), str(next(wheels.glob("*.whl")))])
    assert code == 0, output
    empty = tmp_path / "empty"
    empty.mkdir()
    code, output = execute([sys.executable, "-m", "fedrun", "central", "--config", "tiny",
                            "--print_config"], cwd=empty, env={"PYTHONPATH": str(site)})
    assert code == 0, output
    assert "d_model: 64" in output
    assert "batch_size: 16" in output

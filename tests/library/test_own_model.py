"""Whole runs with models of transformers: by hand, in several processes, resumed, and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fedrun
from fedrun import cli
from fedrun.data.tokens import TokenData, prepare
from fedrun.model.config import TransformersShape
from fedrun.model.transformers_lm import build
from fedrun.plots.groups import flat
from tests.support.fed_avg_by_hand import (
    CLIENTS,
    LENGTH,
    LOCAL_UPDATES,
    ROUNDS,
    fed_avg_by_hand,
)
from tests.support.runs import CORPUS, OF_SMALL, Outcome, Run, steps, without_clocks

GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32}
MAMBA = {"model_type": "mamba", "num_hidden_layers": 1, "hidden_size": 32, "state_size": 4}
BOTH = pytest.mark.parametrize("settings", [GPT2, pytest.param(MAMBA, marks=pytest.mark.slow)],
                               ids=["gpt2", "mamba"])


def written(folder: Path, settings: dict[str, Any]) -> Path:
    path = folder / f"{settings['model_type']}.yaml"
    path.write_text(yaml.safe_dump({"model": {"transformers": settings}}))
    return path


def by_hand(data: TokenData, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """On the library's own model."""
    model = build(TransformersShape(settings), data.vocab_size, 0).double()
    return fed_avg_by_hand(model, lambda client, tokens: client(input_ids=tokens).logits,
                           data.train)


@BOTH
def test_rounds_by_hand_equal_rounds_of_fedrun(run: Run, tmp_path: Path, cache_dir: Path,
                                               settings: dict[str, Any]) -> None:
    data = prepare(str(CORPUS), "bpe:400", LENGTH, cache_dir, OF_SMALL)
    expected = by_hand(data, settings)
    outcome = run("fed_avg", "--config", written(tmp_path, settings), "--rounds", ROUNDS,
                  "--num_clients", CLIENTS, "--local_updates", LOCAL_UPDATES, "--dtype", "fp64")
    assert outcome.code == 0, outcome.output
    assert outcome.model.keys() == expected.keys()
    for name, value in outcome.model.items():
        # The library computes parts of Mamba in fp32 whatever the type, which AdamW's first steps
        # magnify.
        tolerance = 1e-9 if settings is GPT2 else 1e-4
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=tolerance)


@BOTH
@pytest.mark.timeout(240)
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.soak), "auto"])
def test_the_same_bits_in_one_and_in_three_processes(run: Run, tmp_path: Path, dtype: str,
                                                     settings: dict[str, Any]) -> None:
    flags = ("--config", written(tmp_path, settings), "--rounds", 3, "--num_clients", 3,
             "--local_updates", 2, "--client_moments", "average", "--dtype", dtype)
    one, three = (run("fed_avg", *flags, processes=count, name=f"in_{count}") for count in (1, 3))
    for outcome in (one, three):
        assert outcome.code == 0, outcome.output
        assert outcome.history[-1]["generated"]
    assert one.bits == three.bits
    assert without_clocks(one) == without_clocks(three)


@pytest.fixture
def trained(run_here: Run, tmp_path: Path) -> Outcome:
    done = run_here("fed_avg", "--config", written(tmp_path, GPT2), "--rounds", 4,
                    "--num_clients", 2, "--val_freq", 2, "--checkpoint_freq", 2)
    assert done.code == 0, done.output
    return done


def test_what_a_run_leaves(trained: Outcome) -> None:
    assert trained.config["model"] == {"transformers": GPT2}
    shapes = {name: tuple(t.shape) for name, t in trained.model.items()}
    lm = build(TransformersShape(GPT2), shapes["transformer.wte.weight"][0], 0)
    assert shapes == {name: tuple(p.shape) for name, p in lm.named_parameters()}
    assert not (trained.run_dir / "server").exists()  # there are no tracked parameters
    assert steps(trained) == [1, 2, 4]


def test_it_resumes_to_the_bits_of_a_run_that_did_not_stop(run_here: Run, trained: Outcome,
                                                          tmp_path: Path) -> None:
    flags = ("--config", written(tmp_path, GPT2), "--num_clients", 2, "--val_freq", 2,
             "--checkpoint_freq", 2, "--rounds", 6)
    whole = run_here("fed_avg", *flags, name="whole")
    further = run_here("fed_avg", *flags, after=trained)
    assert further.code == whole.code == 0, further.output
    assert "resuming from step 4" in further.output
    assert "missing" not in further.output
    assert further.bits == whole.bits
    assert without_clocks(further) == without_clocks(whole)
    other = run_here("fed_avg", *flags[2:], "--config", written(tmp_path, GPT2 | {"n_head": 4}),
                     after=trained)
    assert other.code == 2
    assert "model.transformers" in other.output


def test_after_a_kill_its_results_are_written_from_the_last_checkpoint(
        run_here: Run, trained: Outcome, tmp_path: Path) -> None:
    """The run was killed between its last checkpoint and its end."""
    (trained.run_dir / "outcome.json").write_text(json.dumps({"outcome": "running", "step": 0}))
    (trained.run_dir / "model.safetensors").unlink()
    again = run_here("fed_avg", "--config", written(tmp_path, GPT2), "--rounds", 4,
                     "--num_clients", 2, "--val_freq", 2, "--checkpoint_freq", 2, after=trained)
    assert again.code == 0, again.output
    assert again.outcome["outcome"] == "finished"
    assert "transformer.wte.weight" in again.model


def test_the_commands_and_the_object_of_a_run(trained: Outcome, tmp_path: Path, cache_dir: Path,
                                              capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    run = fedrun.open_run(trained.run_dir)
    model = run.model()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained.model[name])
    text = run.generate("The import statement", max_new_tokens=40)  # more than its positions
    assert text.startswith("The import statement")
    assert run.generate("The import", max_new_tokens=5, temperature=1.0, top_k=3, seed=1)
    found = run.evaluate(cache_dir=cache_dir)
    assert found["loss"] == pytest.approx(trained.history[-1]["server_val_loss"], rel=1e-5)
    ids = torch.randint(0, 400, (2, 30), generator=torch.Generator().manual_seed(0))
    out = run.export(tmp_path / "hf")
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loaded[1].values())
    with torch.no_grad():
        torch.testing.assert_close(loaded[0](ids).logits, model(ids), rtol=0, atol=1e-6)
    assert loaded[0].config.eos_token_id == AutoTokenizer.from_pretrained(out).eos_token_id
    card = (out / "README.md").read_text()
    assert "- gpt2" in card
    assert "A gpt2 language model of" in card
    assert "embedding and head are tied" in card
    assert run.plot().axes
    figures = tmp_path / "figures"
    assert cli.main(["plot", "perplexities", "--data_dir", str(tmp_path), "--out_dir",
                     str(figures)]) == 0
    assert list(figures.glob("*.png"))
    assert cli.main(["report", "--data_dir", str(tmp_path), "--out", str(tmp_path / "page.html")]
                    ) == 0
    assert "gpt2" in (tmp_path / "page.html").read_text()
    capfd.readouterr()
    assert cli.main(["evaluate", str(trained.run_dir), "--sequence_length", "33", "--cache_dir",
                     str(cache_dir)]) == 2
    assert cli.main(["export", str(trained.run_dir), "--to", "mamba_ssm", str(tmp_path / "m")]) == 2
    errors = capfd.readouterr().err.splitlines()
    assert "--sequence_length 33: must be at most 32" in errors[0]
    assert "--to mamba_ssm: must be hf for a model of transformers (gpt2)" in errors[1]
    assert cli.main(["plot", "federated-deltas", "--data_dir", str(tmp_path)]) == 1
    assert ("skipped run: its model is one of transformers, which names no parameters to save"
            in capfd.readouterr().out)


def test_figures_name_the_fields_in_which_shapes_differ() -> None:
    nested = {"lr": 1e-3, "model": {"transformers": GPT2}}
    assert flat(nested) == {"lr": 1e-3} | {f"model.transformers.{name}": value
                                           for name, value in GPT2.items()}


@pytest.mark.parametrize(("method", "flags", "message"), [
    ("fed_avg", ("--save_client_deltas",), "--save_client_deltas true: must be false for a model"),
    ("fed_fisher", ("--fisher_scope", "mixers"), "--fisher_scope mixers: must be all or untied")])
def test_flags_that_need_names_are_refused(run_here: Run, tmp_path: Path, method: str,
                                           flags: tuple[str, ...], message: str) -> None:
    outcome = run_here(method, "--config", written(tmp_path, GPT2), "--rounds", 1, *flags)
    assert outcome.code == 2
    assert message in outcome.output
    assert not outcome.run_dir.exists()


@pytest.mark.parametrize("scope", ["all", "untied"])
def test_fed_fisher_and_fed_entropy_work(run_here: Run, tmp_path: Path, scope: str) -> None:
    method, flags = ("fed_fisher", ("--fisher_scope", scope)) if scope == "untied" else (
        "fed_entropy", ())
    outcome = run_here(method, "--config", written(tmp_path, MAMBA), "--rounds", 2,
                       "--num_clients", 2, *flags)
    assert outcome.code == 0, outcome.output


def test_central_training(run_here: Run, tmp_path: Path) -> None:
    outcome = run_here("central", "--config", written(tmp_path, GPT2), "--rounds", 12, "--lr",
                       "1e-2")
    assert outcome.code == 0, outcome.output
    losses = [record["val_loss"] for record in outcome.history]
    assert losses[-1] < losses[0] - 0.5
    assert not (outcome.run_dir / "params").exists()

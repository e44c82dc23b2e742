"""--personal: parameters that never leave a client."""

from __future__ import annotations

import json
import math
import statistics
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import fedrun
from fedrun.common.files import write_json
from fedrun.data.tokens import TokenData, prepare
from fedrun.federation.client import Client, LocalLosses
from fedrun.flags import config_of, resolve
from fedrun.model.config import ModelConfig
from fedrun.model.mamba2 import Mamba2LM
from fedrun.model.pretrained import find_pretrained
from fedrun.records.run_files import MARK
from fedrun.tools.study_runs import loss_halves, val_ppl
from fedrun.training.params import FlatParams
from tests.support.personal_by_hand import LENGTH, LOCAL_UPDATES, rounds_by_hand
from tests.support.runs import (
    FAULTY,
    OF_SMALL,
    Outcome,
    Run,
    assert_equal,
    error_lines,
    fault,
)

PERSONAL = "*norm*,backbone.layers.1.mixer.out_proj.weight"
FLAGS = ("--num_clients", 3, "--local_updates", LOCAL_UPDATES, "--personal", PERSONAL)


def stays(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in PERSONAL.split(","))


def first_model(vocab_size: int) -> Mamba2LM:
    """The model that runs start from."""
    shape = ModelConfig(n_layer=2, d_model=64, d_state=16, headdim=16)
    assert resolve("fed_avg", {"config": "tiny"}).model == shape
    model = Mamba2LM(shape, vocab_size)
    model.init_weights(0)
    return model


@pytest.fixture(scope="module")
def data(little_text: tuple[str, ...], cache_dir: Path) -> TokenData:
    return prepare(str(cache_dir / "little.txt"), "bpe:400", LENGTH, cache_dir, OF_SMALL)


def state_of(run: Outcome, client: int, step: int) -> dict[str, Tensor]:
    folder = run.run_dir / "checkpoints" / f"step_{step:06d}"
    return load_file(folder / f"client_{client}.safetensors")


def own(run: Outcome, client: int, step: int, model: Mamba2LM) -> dict[str, Tensor]:
    """What stays at a client, by name."""
    flat = FlatParams(model, PERSONAL)
    flat.own.copy_(state_of(run, client, step)["personal"])
    return {name: value.clone() for name, value in flat.views(flat.vector) if stays(name)}


@pytest.mark.parametrize(("flags", "tolerance"), [
    ((), 1e-9), (("--cohort", 2, "--client_moments", "average"), 1e-7)])  # squares have a grid
def test_rounds_by_hand_equal_rounds_of_fedrun(
        run_here: Run, data: TokenData, flags: tuple[object, ...], tolerance: float) -> None:
    rounds = 3
    found = run_here("fed_avg", *FLAGS, *flags, "--rounds", rounds, "--dtype", "fp64",
                     "--val_freq", 1)
    assert found.code == 0, found.output
    cohorts = [record.get("cohort", [0, 1, 2]) for record in found.history]
    assert len(cohorts) == rounds
    model = first_model(data.vocab_size).double()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    world, clients = rounds_by_hand(model, data.train, 3, cohorts, stays, "average" in flags)
    assert not all(torch.equal(world[name], start[name]) for name in world)
    for name, value in found.model.items():
        torch.testing.assert_close(value, world[name], rtol=0, atol=tolerance)
        assert torch.equal(value, start[name]) == stays(name)
    assert {client for cohort in cohorts for client in cohort} == {0, 1, 2}
    for client, theirs in enumerate(clients):
        ours = own(found, client, rounds, model)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance)
    # What is sent up and down again: shared elements, here in 8 bytes, and the sum of weights.
    shared = sum(value.numel() for name, value in world.items() if not stays(name))
    vectors = 3 if "average" in flags else 1
    turns = sum(map(len, cohorts))
    per_turn = found.history[-1]["bytes"] / turns / 2
    assert 0 < per_turn - 8 * vectors * shared < 64


@pytest.mark.parametrize("method", [
    ("fed_momentum",), ("diloco",), ("fed_adam",), ("fed_entropy",), ("fed_fisher",),
    ("fed_fisher", "--client_moments", "average"),
    ("fed_median",), ("fed_avg", "--sync", "epoch"),
    ("fed_avg", "--client_clip", "median", "--num_clients", 1)])
def test_a_first_round_moves_what_is_shared_as_it_does_without(
        run_here: Run, data: TokenData, method: tuple[Any, ...]) -> None:
    """All clients start alike, and these methods look at each element alone; where a norm counts,
    there is a single client, whose update has the median's norm."""
    flags = ("--rounds", 1, "--local_updates", 2, "--checkpoint_freq", "none")
    whole = run_here(*method, *flags, name="whole")
    personal = run_here(*method, *flags, "--personal", PERSONAL, name="personal")
    assert whole.code == personal.code == 0, whole.output + personal.output
    start = dict(first_model(data.vocab_size).named_parameters())
    for name, value in personal.model.items():
        if stays(name):
            assert torch.equal(value, start[name])
            assert not torch.equal(whole.model[name], start[name])
        else:
            assert not torch.equal(value, start[name])
            torch.testing.assert_close(value, whole.model[name], rtol=0, atol=2e-6)
    assert personal.history[-1]["bytes"] < whole.history[-1]["bytes"]


KEPT = ("--cohort", 2, "--client_moments", "average_sqrt", "--moments_every", "2,3", "--grad_clip",
        1, "--prox_mu", 0.1, "--aggregation", "int8", "--server_momentum_warmup", "true")


def test_the_same_bits_in_three_processes_and_after_a_kill(run: Run, tmp_path: Path) -> None:
    """Also in each client's file, which a store on disk writes."""
    flags = (*FLAGS, *KEPT, "--client_store", "disk", "--eval_clients", "--client_holdout", 0.05,
             "--rounds", 5, "--checkpoint_freq", 2)
    one = run("diloco", *flags, name="one")
    killed = run("diloco", *flags, name="three", script=FAULTY,
                 env=fault(tmp_path, "kill", "after-manifest:2"))
    three = run("diloco", *flags, name="three", processes=3)
    assert killed.code != 0
    assert "resuming from step 2" in three.output
    assert one.code == 0, one.output
    assert_equal(three, one)
    for client in range(3):
        ours, theirs = state_of(one, client, 5), state_of(three, client, 5)
        assert ours.keys() == theirs.keys()
        assert {"personal", "adamw.own_step", "residual"} <= ours.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_clients_are_measured_on_text_of_their_own(run_here: Run) -> None:
    """Which nobody trains on; each one's own model is neither the others' nor the global one."""
    found = run_here("fed_avg", *FLAGS, "--rounds", 2, "--lr", 2e-2, "--eval_clients",
                     "--client_holdout", 0.1, "--partition", "contiguous")
    assert found.code == 0, found.output
    record = found.history[-1]
    assert len(record["client_own_ppls"]) == len(record["client_val_ppls"]) == 3
    assert len({*record["client_own_ppls"], *record["client_val_ppls"],
                record["server_val_ppl"]}) == 7
    assert all(ppl < 400 for ppl in record["client_own_ppls"])


def test_the_best_model_and_a_study_go_by_what_clients_have(run_here: Run) -> None:
    """By their own models, which get better; with embeddings of their own the global one, which has
    those of the start, hardly does."""
    found = run_here("fed_avg", *FLAGS, "--rounds", 3, "--val_freq", 1, "--lr", 2e-2, "--personal",
                     "*embedding*", "--eval_clients", "--client_holdout", 0.1, "--keep", "best")
    assert found.code == 0, found.output
    losses = [statistics.fmean(map(math.log, record["client_own_ppls"]))
              for record in found.history]
    with safe_open(found.run_dir / "best" / "model.safetensors", "pt") as file:
        held = json.loads(file.metadata()["fedrun"])
    assert held == {"step": 1 + losses.index(min(losses)), "val_loss": pytest.approx(min(losses))}
    last = found.history[-1]
    assert min(losses) < last["server_val_loss"] - 0.3
    config = config_of({k: v for k, v in found.config.items() if k != MARK})
    halves = loss_halves(config)
    assert halves is not None
    mean = statistics.fmean(map(math.log, last["client_val_ppls"]))
    assert (16 * halves[0] + 21 * halves[1]) / 37 == pytest.approx(mean), "by their sequences"
    assert val_ppl(last) == pytest.approx(math.exp(mean))
    assert mean < last["server_val_loss"] - 0.3
    del last["client_val_loss_halves"]  # as of a run that did not measure them
    write_json(found.run_dir / "training_history.json", [last])
    with pytest.raises(ValueError, match="has measured its global model alone"):
        loss_halves(config)


def test_a_clients_own_model_can_be_had(run_here: Run, data: TokenData, tmp_path: Path) -> None:
    """The global model with its parameters in it; before its first round, those of the start."""
    found = run_here("fed_avg", *FLAGS, "--rounds", 1, "--cohort", 2)
    opened, model = fedrun.open_run(found.run_dir), first_model(data.vocab_size)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = found.history[-1]["cohort"]
    for client in range(3):
        theirs = own(found, client, 1, model) if client in trained else start
        for name, value in opened.model(client).named_parameters():
            assert torch.equal(value, theirs[name] if stays(name) else found.model[name])
    client = trained[0]
    measured = [opened.evaluate(client=which)["perplexity"] for which in (None, client)]
    assert measured[0] == pytest.approx(found.history[-1]["server_val_ppl"])
    assert measured[0] != measured[1]
    opened.export(tmp_path / "out", client=client)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the own model of one of the clients" in card
    assert "validation perplexity" not in card
    again = find_pretrained(str(tmp_path / "out"), "RUN").build()
    before = dict(opened.model(client).named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in again.named_parameters())
    with pytest.raises(ValueError, match=r"--client 3: must be a client of .*below its 3 clients"):
        opened.model(3)


def test_only_a_run_with_such_parameters_has_clients_models(run_here: Run) -> None:
    plain = run_here("fed_avg", "--rounds", 1, name="plain")
    with pytest.raises(ValueError, match=r"--client 0: must be left out for .*plain"):
        fedrun.open_run(plain.run_dir).model(0)
    gone = run_here("fed_avg", *FLAGS, "--rounds", 1, "--checkpoint_freq", "none", name="gone")
    with pytest.raises(ValueError, match=r"--client 0: .*gone has no valid checkpoint"):
        fedrun.open_run(gone.run_dir).model(0)


def test_a_client_that_is_left_out_keeps_what_it_had(run_here: Run,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = Client.train

    def train(client: Client, model: Any, steps: int, first_step: int, *args: Any, **how: Any
              ) -> LocalLosses:
        losses = healthy(client, model, steps, first_step, *args, **how)
        if client.index == 1 and first_step >= LOCAL_UPDATES:
            client.flat.own[3] = float("nan")
        return losses

    monkeypatch.setattr(Client, "train", train)
    found = run_here("fed_avg", *FLAGS, "--rounds", 2, "--checkpoint_freq", 1)
    assert found.code == 0, found.output
    assert found.history[-1]["left_out"] == [[2, 1]]
    assert found.history[-1]["left_out_why"] == ["its personal parameters are not finite"]
    before, after = (state_of(found, 1, step) for step in (1, 2))
    assert torch.equal(before["personal"], after["personal"])
    assert not torch.equal(*(state_of(found, 0, step)["personal"] for step in (1, 2)))
    assert before["adamw.exp_avg"].any()
    assert not after["adamw.exp_avg"].any()


@pytest.mark.parametrize(("method", "flags", "message"), [
    ("fed_avg", {"personal": "*norm*,,*D"}, "names of parameters or patterns"),
    ("fed_sgd", {"personal": "*norm*"}, "--personal *norm*: must be none for fed_sgd"),
    ("fed_avg", {"personal": "*norm*", "dp": "client", "dp_clip": "1", "dp_noise": "1",
                 "dp_delta": "0.01"}, "--personal *norm*: must be none with --dp client"),
    ("fed_avg", {"personal": "*norm*", "keep": "best"},
     "--keep best: must be last with --personal, or given with --eval_clients"),
    ("fed_avg", {"personal": "*norm*", "keep": "best", "eval_clients": "true", "cohort": "2",
                 "num_clients": "3"}, "--keep best: must be last with --personal and --cohort"),
    ("fed_avg", {"client_holdout": "1"}, "--client_holdout 1.0: must be in (0, 1)"),
    ("fed_avg", {"client_holdout": "0.1"}, "--client_holdout 0.1: must be none without --eval_cl"),
    ("fed_entropy", {"client_holdout": "0.1", "eval_clients": "true"},
     "--client_holdout 0.1: must be none with --entropy_on holdout")])
def test_what_does_not_go_together_is_refused(method: str, flags: dict[str, str], message: str
                                              ) -> None:
    with pytest.raises(ValueError, match="--") as refused:
        resolve(method, flags)
    assert message in str(refused.value)


@pytest.mark.parametrize(("patterns", "message"), [
    ("*nrom*", "no parameter of the model is named '*nrom*'; must be names or patterns with *"),
    ("*norm*,lm_head.weight", "no parameter of the model is named 'lm_head.weight'"),  # it is tied
    ("*", "must be names or patterns that leave some parameters to be averaged")])
def test_names_that_do_not_fit_are_one_line(run_here: Run, patterns: str, message: str) -> None:
    found = run_here("fed_avg", "--rounds", 1, "--personal", patterns)
    line, = error_lines(found.output)
    assert found.code == 2
    assert f"--personal {patterns}: " in line
    assert message in line


def test_what_stays_comes_last() -> None:
    model = first_model(400)
    flat, plain = FlatParams(model, PERSONAL), FlatParams(first_model(400))
    names = [part.name for part in flat.slices]
    assert names == sorted(name for name in names if not stays(name)) + sorted(filter(stays, names))
    assert sorted(names) == [part.name for part in plain.slices]
    assert [stays(part.name) for part in flat.slices] == [
        part.start >= flat.shared_size for part in flat.slices]
    assert flat.shared.numel() + flat.own.numel() == flat.size == plain.size
    assert plain.shared_size == plain.size
    assert {part.name for part in flat.matrices} == {part.name for part in plain.matrices}
    assert [part.start for part in flat.matrices] == sorted(part.start for part in flat.matrices)

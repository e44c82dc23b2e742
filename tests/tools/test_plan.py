"""`fedrun plan` says what runs then take: held against counted allocations and their files."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from fedrun import cli
from fedrun.config import FederatedConfig
from fedrun.experiment import prepare_experiment
from fedrun.federation.schedule import Schedule
from fedrun.federation.worker import Worker
from fedrun.flags import resolve
from fedrun.model import loss
from fedrun.model.config import TransformersShape
from fedrun.model.mamba2 import Mamba2LM
from fedrun.tools import plan_memory
from fedrun.tools.plan import parse
from fedrun.tools.plan_counting import LOSS_HEAD
from fedrun.tools.plan_disk import files, sent
from fedrun.tools.plan_machine import Rates
from fedrun.tools.plan_memory import (
    ACTIVATIONS,
    AVERAGED,
    BUFFER,
    CHECKPOINT,
    FISHER,
    GLOBAL_MODEL,
    GRADIENTS,
    MOMENTS,
    OWN,
    PARAMETERS,
    SERVER_RESIDUAL,
    SERVERS,
    STATES,
)
from fedrun.tools.plan_ranks import Layout, of_worker
from fedrun.tools.plan_report import report
from fedrun.tools.plan_text import Text, text_of
from fedrun.tools.plan_time import Seconds, published
from tests.support.allocations import peak_bytes
from tests.support.planned import (
    GEMMA2,
    GPT2,
    PLAN,
    config_of,
    experiment_of,
    made,
    printed,
    rounds,
)
from tests.support.private import PRIVATE
from tests.support.runs import Outcome, Run, execute

VOCAB, CLIENTS = 1000, 3
ALONE = Layout(processes=1, machines=1, colocated=False, gpu=False)
SHAPE = {"config": "study", "num_clients": CLIENTS, "batch_size": 2, "sequence_length": 32,
         "rounds": 3, "local_updates": 2}


@pytest.fixture(autouse=True)
def _fresh_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is kept that earlier tests have computed in, and no file written elsewhere."""
    monkeypatch.setattr(loss, "_scratch", loss._Scratch())
    monkeypatch.chdir(tmp_path)


SLOW = pytest.mark.slow
CASES = [("fed_avg", {}), ("fed_avg", {"micro_batch": 1, "checkpoint_activations": True}),
         ("fed_avg", {"moments_dtype": "bf16", "prox_mu": 0.1}),
         ("fed_avg", {"local_optimizer": "muon"}),
         ("fed_avg", {"aggregation": "int4", "client_moments": "average_sqrt", "grad_clip": 1}),
         ("fed_avg", {"aggregation": "int8", "client_moments": "average_sqrt", "grad_clip": 1,
                      "moments_every": "2,1"}),
         ("fed_avg", {"client_moments": "average"}), ("diloco", {"client_moments": "reset"}),
         ("fed_fisher", {"fisher": "corrected"}), ("fed_sgd", {"local_updates": 1}),
         ("fed_median", {"byzantine": 1}), ("fed_avg", {"client_clip": "median"}),
         ("fed_geometric_median", {}), ("fed_avg", PRIVATE), ("fed_avg", {"model": GPT2}),
         ("fed_adam", {"client_moments": "average", "personal": "*embedding*"}),
         ("diloco", {"overlap": True}),
         pytest.param("fed_avg", PRIVATE | {"dp": "example", "batch_size": 4}, marks=SLOW),
         pytest.param("fed_avg", {"model": GEMMA2, "dtype": "bf16"}, marks=SLOW)]


@pytest.mark.parametrize(("method", "flags"), CASES)
def test_memory_of_a_worker_is_what_it_allocates(method: str, flags: dict[str, object],
                                                 tmp_path: Path) -> None:
    """All together within a tenth, and item by item where a tensor can be named."""
    changed = {name: flags[name] for name in ("dtype",) if name in flags}
    if "model" in flags:
        changed["model"] = TransformersShape(cast(dict[str, Any], flags["model"]))
    given = {name: value for name, value in flags.items() if name not in changed}
    config = dataclasses.replace(config_of(
        method, **SHAPE | given, data_dir=str(tmp_path), checkpoint_freq=1), **cast(Any, changed))
    experiment = experiment_of(config, VOCAB)
    _, planned = of_worker(config, plan_memory.worker(
        config, VOCAB, gpu=False, schedule=experiment.schedule), CLIENTS, gpu=False)
    seen: dict[str, int] = {}

    def look(worker: Worker) -> None:
        state, kept = worker.global_state, [worker.store.checkout(k) for k in range(CLIENTS)]
        own = [sum(t.nbytes for t in one.values()) for one in kept]
        named = "personal" in kept[0]  # then a client's moments are copies beside the optimizer's
        moments = [sum(t.nbytes for name, t in one.items() if name.startswith("adamw."))
                   for one in kept]
        alone = sum(t.nbytes for t in worker.optimizer.state.values())
        seen.update({
            PARAMETERS: worker.flat.vector.nbytes, GRADIENTS: worker.flat.grad.nbytes,
            GLOBAL_MODEL: state.model.nbytes,
            BUFFER: sum(part.nbytes for part in worker.aggregator.memory)
            * (1 if worker.overlap is None else 2),
            SERVERS: sum(t.nbytes for t in state.server.values()),
            SERVER_RESIDUAL: sum(t.nbytes for t in state.sections.values()),
            AVERAGED: sum(t.nbytes for t in (state.moments or {}).values()),
            MOMENTS: alone if named else moments[0] or alone, STATES: sum(own[1:]),
            CHECKPOINT: sum(own) + sum(t.nbytes for t in state.named().values())
            + (0 if worker.overlap is None else worker.aggregator._memory[0].nbytes),
            FISHER: 0 if worker.fisher is None else sum(
                t.nbytes for t in vars(worker.fisher).values() if isinstance(t, torch.Tensor)),
            OWN: own[0] - moments[0] - 8})

    counted = peak_bytes(partial(rounds, experiment, "cpu", tmp_path, look))
    assert {item: planned[item] for item in seen} == pytest.approx(seen, rel=0.01, abs=16)
    assert planned.total() == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("flags", [{}, {"micro_batch": 1}, {"checkpoint_activations": True}])
@pytest.mark.parametrize("gpu", [False, True])
def test_activations_of_a_gradient(gpu: bool, flags: dict[str, object],
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """In the way of a CPU; and in that of a GPU, on the CPU, whose loss head keeps its memory."""
    config = config_of("fed_avg", **SHAPE | {"batch_size": 6, "sequence_length": 128} | flags)
    planned = plan_memory.gradient(config, VOCAB, 6, gpu).items
    worker = made(experiment_of(config, VOCAB), "cpu")
    model = worker.model
    assert isinstance(model, Mamba2LM)
    if gpu:
        monkeypatch.setattr(model, "_grad_in_chunks", model._grad_on_gpu)
    ids = torch.zeros(6, 128, dtype=torch.int64)
    counted = peak_bytes(partial(model.compute_grad, ids))
    assert planned[ACTIVATIONS] + planned[LOSS_HEAD] == pytest.approx(
        counted, rel=0.2 if gpu else 0.1)


SENT = [("fed_avg", ()), ("fed_avg", ("--client_moments", "average_sqrt", "--grad_clip", 1,
                                      "--moments_every", "2,3", "--aggregation", "int8")),
        ("fed_avg", ("--aggregation", "int4", "--client_moments", "average_sqrt", "--grad_clip", 1,
                     "--local_optimizer", "muon")),
        ("fed_avg", ("--client_moments", "average_rows", "--moments_every", 2, "--grad_clip", 1)),
        ("diloco", ("--keep", "best", "--save_client_deltas", "true"))]


@pytest.mark.parametrize(("method", "flags"), SENT)
def test_traffic_and_files_are_those_that_a_run_leaves(run_here: Run, method: str,
                                                       flags: tuple[object, ...]) -> None:
    run = run_here(method, "--num_clients", 3, "--rounds", 5, "--checkpoint_freq", 2, *flags)
    assert run.code == 0, run.output
    config = resolve(method, {name: value for name, value in run.config.items() if name in (
        "config", "num_clients", "rounds", "checkpoint_freq", "client_moments", "grad_clip",
        "moments_every", "aggregation", "local_optimizer", "keep", "save_client_deltas",
        "batch_size", "sequence_length", "val_freq")})
    config = dataclasses.replace(config, dtype="fp32")
    assert isinstance(config, FederatedConfig)
    rows = len(run.model["backbone.embedding.weight"])
    found = plan_memory.worker(config, rows, gpu=False)
    traffic = sent(config, found, ALONE, 5, Schedule(config, [10] * 3))
    assert traffic.recorded == run.history[-1]["bytes"]
    assert traffic.senders == 0
    planned = files(config, found, ALONE, 5)
    there = left(run)
    if "the best model" in there:  # its step and its loss are in the file too
        assert 0 < there["the best model"] - planned.left["the best model"] < 200
        there["the best model"] = planned.left["the best model"]
    assert planned.left == there
    assert planned.checkpoint == of(run.run_dir / "checkpoints/step_000005", "*.safetensors")


def left(run: Outcome) -> dict[str, int]:
    """Bytes of the files in a run's folder, by the names that the plan has for them."""
    folder = run.run_dir
    found = {"the model": of(folder, "model.safetensors"),
             "the best model": of(folder / "best", "model.safetensors"),
             "snapshots": of(folder / "server", "**/*.npz"),
             "snapshots of clients": of(folder, "client_*/**/*.npz"),
             "2 checkpoints": of(folder / "checkpoints", "*/*.safetensors")}
    return {name: size for name, size in found.items() if size}


def of(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.glob(pattern))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_published_shape_on_a_pretended_gpu(pretended_cuda: dict[str, str]) -> None:
    """Allocations of mamba2_130m: two clients, whose states wait in the host's memory."""
    code, output = execute([sys.executable, "-m", "tests.support.planned", "mamba2_130m"],
                           limit=280, env=pretended_cuda)
    assert code == 0, output
    found = json.loads(output.splitlines()[-1])
    assert found["planned"] == pytest.approx(found["counted"], rel=0.1), found


@pytest.mark.slow
def test_a_large_model_is_planned_without_its_memory() -> None:
    config = dataclasses.replace(config_of(
        "fed_avg", config="mamba2_1_3b", batch_size=2, sequence_length=256), dtype="bf16")
    found = plan_memory.worker(config, 50277, gpu=True)
    assert found.flat.size == 1_343_757_312
    assert found.items[PARAMETERS] == found.items[BUFFER] - 4 == 4 * 1_343_757_312
    # Six for a parameter and a token, and the scan's besides.
    assert 6 * found.flat.size * 512 < found.flop < 1.3 * 6 * found.flat.size * 512


# ---- the command ---------------------------------------------------------------------------------

def test_a_plan_from_a_measured_step(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = printed(capsys, "--rounds", "4")
    assert "81,968 parameters, a vocabulary of 400" in out
    assert "fits: " in out
    assert "measured here\n" in out
    assert "4 rounds" in out
    assert "2,048 tokens" in out
    assert "nothing: there is one worker" in out
    assert not list(tmp_path.iterdir())  # nothing was written


def test_a_plan_names_the_longest_round(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--rounds", "40", "--local_updates", "8", "--lr_schedule", "cosine")
    growing = printed(capsys, *flags, "--local_updates_schedule", "quadratic")
    longest = re.search(r"the longest round +([0-9]+) local updates", growing)
    assert longest is not None
    assert 4.5 * 8 <= int(longest[1]) <= 5.5 * 8
    assert "the longest round" not in printed(capsys, *flags)


def test_a_plan_from_published_rates(capsys: pytest.CaptureFixture[str]) -> None:
    """For a GPU that is not here, with less memory than it would take."""
    out = printed(capsys, "--device_rates", "h100", "--device_memory", "2.2MB", "--processes", "3")
    assert "NOT MEASURED" in out
    assert "memory of the server" in out
    assert "memory of a worker" in out
    assert "DOES NOT FIT" in out
    assert "  with --" in out
    assert "unknown until the text is tokenised" in out
    assert "sent by a worker in a round" in out


def test_rounds_and_hours_follow_from_a_text_that_is_tokenised(little_text: tuple[str, ...]
                                                              ) -> None:
    asked = parse(["fed_avg", *little_text, "--n_epochs", "2", "--num_clients", "3"])
    assert asked is not None
    config = asked.config
    experiment = prepare_experiment(config, torch.device("cpu"))
    assert text_of(config, None) == Text(experiment.data.vocab_size, experiment.shards.sizes,
                                         len(experiment.data.validation),
                                         public_bytes=experiment.data.validation.nbytes)
    out = "\n".join(report(*asked))
    assert f"\n  {experiment.length.steps:,} rounds" in out
    assert "an evaluation" in out
    assert "unknown" not in out


def test_seconds_of_a_round_by_hand() -> None:
    """Five clients take three turns on two workers."""
    config = config_of("fed_avg", config="tiny", num_clients=5, local_updates=4)
    two = Layout(processes=3, machines=1, colocated=False, gpu=True)
    assert Seconds(step=2, term=1, wire=0.5, evaluation=None, how="").of_round(
        config, two) == 3 * (4 * 2 + 1) + 0.5
    found: Any = SimpleNamespace(flat=SimpleNamespace(size=10**9, shared_size=10**9),
                                 flop=4 * 10**12, muon_flop=0)
    rates = Rates(bf16=1e15, fp32=1e14, memory=1e12, bytes=8e10)
    fp32 = published(config, found, two, sent=4e9, name="it", rates=rates)
    assert fp32.step == pytest.approx(4e12 / 4e13 + 28e9 / 1e12)
    assert fp32.term == pytest.approx(40e9 / 1e12)
    assert fp32.wire == pytest.approx(4e9 / 50e9)
    bf16 = published(dataclasses.replace(config, dtype="bf16"), found, two, 4e9, "it", rates)
    assert bf16.step == pytest.approx(4e12 / 4e14 + 28e9 / 1e12)
    assert "NOT MEASURED" in bf16.how


@pytest.mark.parametrize(("wire", "round_", "waited", "last"), [
    (0.5, 8 + 1, 0, 0.5), (11.0, 11 + 1, 3, 8)])
def test_with_overlap_a_sum_takes_time_only_where_it_outlasts_the_training(
        wire: float, round_: float, waited: float, last: float) -> None:
    """Three rounds as they follow each other: a round trains for 8 s, and adds and updates for 1;
    its sum sets out behind that, and is there when the next one has trained, or later."""
    config = config_of("diloco", config="tiny", num_clients=4, local_updates=4, overlap=True)
    four = Layout(processes=5, machines=1, colocated=False, gpu=True)
    seconds = Seconds(step=2, term=1, wire=wire, evaluation=None, how="")
    assert seconds.of_round(config, four) == round_
    assert seconds.waited_for(config, four) == (waited, last)
    clock = 0.0
    for number in range(3):
        arrives = clock + wire if number else 0.0
        clock = max(clock + 8, arrives) + 1
    assert 3 * round_ + last == clock + wire


def test_a_plan_says_what_travels_beside_the_training(capsys: pytest.CaptureFixture[str]) -> None:
    flags = (*PLAN[1:], "--num_clients", "4", "--processes", "5", "--device_rates", "h100",
             "--rounds", "10")
    printed = []
    for overlap in ("false", "true"):
        assert cli.main(["plan", *flags, "--overlap", overlap]) == 0
        printed.append(capsys.readouterr().out)
    assert "travels" not in printed[0]
    assert "while the next round trains" in printed[1]
    assert cli.main(["plan", *PLAN[1:], "--processes", "5", "--overlap", "true"]) == 0
    assert ("besides what is sent between workers longer than the next round trains, and "
            "evaluations") in capsys.readouterr().out


@pytest.mark.parametrize(("argv", "message"), [
    (("plan", "fed_av"), "did you mean fed_avg?"),
    ((*PLAN, "--device_memory", "8 apples"), "--device_memory 8 apples: must be a size"),
    ((*PLAN, "--device_rates", "b3"), "--device_rates b3: must be a100, h100, h200"),
    ((*PLAN, "--processes", "2", "--machines", "3"), "--machines 3: must be at most --processes 2"),
    ((*PLAN, "--device", "cpu", "--device_rates", "h100"), "--device cpu: must be auto or cuda"),
    ((*PLAN, "--tokenizer", "some/one"), "--tokenizer some/one: its size is not known"),
    ((*PLAN, "--init_from", "x/y"), "--init_from x/y: must be a folder here"),
    ((*PLAN, "--site_data", "x"), "--site_data (or others of --site): must be given with --sites"),
    ((*PLAN, "--roundz", "3"), "unknown flag --roundz")])
def test_what_cannot_be_planned_is_one_line(argv: tuple[str, ...], message: str,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_flags_may_be_spelled_with_dashes() -> None:
    found = parse(["fed-avg", "--config", "tiny", "--processes", "5"])
    assert found is not None
    assert (found.config.method, found.machine.processes) == ("fed_avg", 5)

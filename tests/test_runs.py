"""Whole runs: the same experiment whatever the launch, and nothing hangs when something fails."""

from __future__ import annotations

import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from fedrun.model.precision import bf16_in_hardware
from tests.support.runs import (
    FAULTY,
    SMALL,
    Outcome,
    Run,
    execute,
    free_port,
    read_json,
    without_clocks,
)


def test_same_bits_in_1_2_3_and_5_processes(run: Run) -> None:
    flags = ("--num_clients", 4, "--rounds", 4)
    runs = [run("fed_avg", *flags, processes=n, name=f"p{n}", launcher=n == 3)
            for n in (1, 2, 3, 5)]
    assert [r.code for r in runs] == [0] * 4, runs[-1].output
    assert len({r.bits for r in runs}) == 1
    histories = [without_clocks(r) for r in runs]
    assert all(h == histories[0] for h in histories)
    assert [r["global_step"] for r in histories[0]] == [1, 3, 4]
    assert histories[0][-1]["server_val_ppl"] < histories[0][0]["server_val_ppl"]


@pytest.mark.slow
def test_seven_clients_on_three_workers_and_a_colocated_server(run: Run) -> None:
    flags = ("--num_clients", 7, "--rounds", 3, "--local_updates", 2)
    alone = run("fed_avg", *flags, name="alone")
    three = run("fed_avg", *flags, processes=4, name="three")
    colocated = run("fed_avg", *flags, "--server", "colocated", processes=3, name="colocated")
    assert [alone.code, three.code, colocated.code] == [0, 0, 0], three.output + colocated.output
    assert alone.bits == three.bits == colocated.bits
    assert without_clocks(alone) == without_clocks(three) == without_clocks(colocated)


@pytest.mark.slow
def test_float_sums_agree_to_rounding(run: Run) -> None:
    flags = ("--num_clients", 4, "--rounds", 4)
    exact = run("fed_avg", *flags, name="exact").model
    for processes in (1, 3):
        outcome = run("fed_avg", *flags, "--aggregation", "float", processes=processes,
                      name=f"float{processes}")
        assert outcome.code == 0, outcome.output
        for name, value in outcome.model.items():
            torch.testing.assert_close(value, exact[name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_more_workers_than_clients_warns_and_helps_to_evaluate(run: Run) -> None:
    alone = run("fed_avg", "--num_clients", 2, "--rounds", 2, name="alone")
    many = run("fed_avg", "--num_clients", 2, "--rounds", 2, processes=5, name="many")
    assert many.code == 0, many.output
    assert "4 workers for 2 clients" in many.output
    assert many.bits == alone.bits
    assert without_clocks(many) == without_clocks(alone)


@pytest.mark.slow
def test_the_flag_deterministic_changes_no_bit_on_a_cpu(run: Run) -> None:
    runs = [run("fed_fisher", "--num_clients", 2, "--rounds", 2, "--deterministic", value,
                name=value) for value in ("false", "true")]
    assert [r.code for r in runs] == [0, 0], runs[1].output
    assert runs[0].bits == runs[1].bits


@pytest.mark.slow
def test_one_client_equals_central_on_the_same_batches(run: Run) -> None:
    central = run("central", "--rounds", 5, "--dtype", "fp64", name="central")
    federated = run("fed_avg", "--num_clients", 1, "--rounds", 5, "--dtype", "fp64", name="fed")
    assert central.code == federated.code == 0, central.output + federated.output
    for name, value in federated.model.items():
        torch.testing.assert_close(value, central.model[name], rtol=0, atol=1e-12)
    for ours, theirs in zip(federated.history, central.history, strict=True):
        assert math.isclose(ours["server_val_loss"], theirs["val_loss"], abs_tol=1e-9)


@pytest.mark.slow
def test_sync_epoch_lets_clients_drift(run: Run) -> None:
    flags = ("--num_clients", 2, "--batch_size", 64, "--rounds", 8)
    every_round = run("fed_avg", *flags, name="round")
    epoch = run("fed_avg", *flags, "--sync", "epoch", name="epoch")
    epoch3 = run("fed_avg", *flags, "--sync", "epoch", processes=3, name="epoch3")
    assert every_round.code == epoch.code == 0, epoch.output
    assert epoch.bits == epoch3.bits
    # The first round begins from the same model in both; from the second on they part.
    first, drifting = every_round.history[0], epoch.history[0]
    assert math.isclose(first["server_val_loss"], drifting["server_val_loss"], rel_tol=1e-6)
    assert every_round.bits != epoch.bits
    assert epoch.history[-1]["server_val_ppl"] > every_round.history[-1]["server_val_ppl"]


@pytest.mark.slow
def test_resetting_moments_changes_the_run(run: Run) -> None:
    flags = ("--num_clients", 2, "--rounds", 3)
    keep, reset = (run("fed_avg", *flags, "--client_moments", s, name=s) for s in ("keep", "reset"))
    assert keep.code == reset.code == 0
    assert keep.bits != reset.bits


def test_what_a_federated_run_writes(run: Run) -> None:
    outcome = run("fed_avg", "--num_clients", 3, "--rounds", 4, "--eval_clients",
                  "--save_client_deltas", processes=3)
    assert outcome.code == 0, outcome.output
    record = outcome.history[-1]
    assert {"global_step", "train_ppl", "server_val_ppl", "client_val_ppls", "generated", "tokens",
            "seconds", "local_training_seconds", "aggregation_seconds",
            "evaluation_seconds"} <= set(record)
    assert record["tokens"] == 4 * 3 * 2 * 32
    assert len(record["client_val_ppls"]) == 3
    assert len(record["generated"]) >= 100  # tokens, each a character or more
    assert record["prompt"] == "Once upon a time,"
    assert min(r["server_val_ppl"] for r in outcome.history) == record["server_val_ppl"]
    config = outcome.config
    assert config["num_clients"] == 3
    assert config["model"]["n_layer"] == 2
    environment = read_json(outcome.run_dir / "environment.json")
    assert environment["corpus"]
    assert "torch" in environment["versions"]
    for owner in ("server", "client_0", "client_1", "client_2"):
        params = np.load(outcome.run_dir / owner / "params" / "step_000004.npz")
        deltas = np.load(outcome.run_dir / owner / "deltas" / "step_000004.npz")
        names = {f"layers.{i}.{p}" for i in (0, 1) for p in ("in_proj", "A_log", "D", "dt_bias")}
        assert set(params) == names
        assert set(deltas) == {f"delta_{n}" for n in names}
        assert np.abs(deltas["delta_layers.0.in_proj"]).max() > 0
    model = outcome.model["backbone.layers.1.mixer.in_proj.weight"].numpy()
    server = np.load(outcome.run_dir / "server" / "params" / "step_000004.npz")
    assert np.array_equal(server["layers.1.in_proj"], model)
    events = outcome.events
    assert [e["round"] for e in events if e["event"] == "round"] == [1, 2, 3, 4]


def test_what_a_central_run_writes(run: Run) -> None:
    outcome = run("central", "--rounds", 4)
    assert outcome.code == 0, outcome.output
    assert [r["step"] for r in outcome.history] == [1, 3, 4]
    record = outcome.history[-1]
    assert {"val_loss", "val_ppl", "train_loss", "generated", "grad_cosine",
            "grad_cosine_mean10", "delta_norms", "tokens", "seconds"} <= set(record)
    assert record["prompt"] == "Once upon a time,"
    assert 0 < record["grad_cosine"] < 1  # early in training gradients point alike
    deltas = np.load(outcome.run_dir / "deltas" / "step_000004.npz")
    for name, norm in record["delta_norms"].items():
        assert math.isclose(norm, np.linalg.norm(deltas[f"delta_{name}"]), rel_tol=1e-4)
    assert record["val_ppl"] < outcome.history[0]["val_ppl"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_a_client_that_raises_ends_every_rank(run: Run, processes: int) -> None:
    """In the middle of local training: the others break off theirs, which would take minutes."""
    outcome = run("fed_avg", "--num_clients", 3, "--rounds", 3, "--local_updates", 400,
                  "--lr", "1e-4", processes=processes, script=FAULTY,
                  env={"FAULT": "raise", "FAULT_CLIENT": "1", "FAULT_STEP": "3"}, limit=60)
    assert outcome.code == 1
    assert "ZeroDivisionError" in outcome.output
    assert outcome.output.count("Traceback (most recent call last)") == 1
    assert re.search(r"round 1: rank [123] failed" if processes > 1 else "rank 0 failed",
                     outcome.output)


@pytest.mark.slow
def test_the_outcome_names_a_worker_that_fails_after_the_decision(run: Run, tmp_path: Path) -> None:
    """When the others wait for it in a collective, and learn only that it is gone."""
    outcome = run("fed_avg", "--num_clients", 3, "--rounds", 9, processes=4, script=FAULTY,
                  env={"FAULT": "disk", "FAULT_AT": "reduce:2", "FAULT_RANK": "2",
                       "FAULT_ONCE": str(tmp_path / "once")}, limit=60)
    assert outcome.code == 1
    reported = outcome.outcome
    assert (reported["outcome"], reported["kind"]) == ("failed", "error")
    assert "rank 2 failed with OSError: [Errno 28] No space left" in reported["reason"]


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "why"), [
    ("nan", "delta not finite"), ("beyond", "delta exceeds its bound: 4")])
def test_an_update_that_cannot_be_used_is_left_out(run: Run, fault: str, why: str) -> None:
    env = {"FAULT": fault, "FAULT_CLIENT": "1", "FAULT_STEP": "1"}  # its second round
    runs = [run("fed_avg", "--num_clients", 3, "--rounds", 3, processes=n, script=FAULTY, env=env,
                name=f"p{n}") for n in (1, 3)]
    assert [r.code for r in runs] == [0, 0], runs[1].output
    assert runs[0].bits == runs[1].bits
    assert runs[0].history[-1]["left_out"] == [[2, 1]]
    assert all(f"client 1 is left out: {why}" in each.output for each in runs)
    assert runs[0].history[-1]["left_out_why"] == runs[1].history[-1]["left_out_why"]
    assert all(torch.isfinite(v).all() for v in runs[0].model.values())


@pytest.mark.slow
def test_when_no_client_is_left_the_last_good_model_is_kept(run: Run) -> None:
    good = run("fed_avg", "--num_clients", 2, "--rounds", 2, name="good")
    outcome = run("fed_avg", "--num_clients", 2, "--rounds", 5, processes=3, script=FAULTY,
                  env={"FAULT": "nan", "FAULT_CLIENT": "all", "FAULT_STEP": "2"}, name="bad")
    assert outcome.code == 1
    assert "round 3: 2 of 2 clients are left out, more than half (client 0: delta not finite" in (
        outcome.output)
    end = outcome.outcome
    assert (end["outcome"], end["kind"]) == ("failed", "diverged")
    assert outcome.bits == good.bits


@pytest.mark.slow
def test_two_uneven_nodes_with_static_rendezvous(run: Run, cache_dir: Path, tmp_path: Path) -> None:
    """Two torchrun agents, as on two machines: 3 processes (with the server) and 2."""
    flags = ("--num_clients", "5", "--rounds", "2")
    alone = run("fed_avg", *flags, name="alone")
    port = free_port()

    def node(number: int, processes: int) -> tuple[int, str]:
        return execute(
            [sys.executable, "-m", "fedrun.torchrun", "--nnodes", "2", "--node-rank",
             str(number), "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1",
             "--master-port", str(port), "-m", "fedrun", "fed_avg", *SMALL, *flags, "--data_dir",
             str(tmp_path), "--cache_dir", str(cache_dir), "--run_name", "nodes"],
            env={"GLOO_SOCKET_IFNAME": "lo"})  # both "machines" are this one

    with ThreadPoolExecutor(2) as pool:
        nodes = [f.result() for f in (pool.submit(node, 0, 3), pool.submit(node, 1, 2))]
    assert [code for code, _ in nodes] == [0, 0], nodes
    assert Outcome(0, "", tmp_path / "nodes").bits == alone.bits


def test_bf16_has_the_same_bits_in_1_and_3_processes(run: Run) -> None:
    flags = ("--num_clients", 3, "--rounds", 2, "--dtype", "auto")
    alone, three = run("fed_avg", *flags, name="p1"), run("fed_avg", *flags, processes=3, name="p3")
    assert alone.code == three.code == 0, three.output
    assert alone.bits == three.bits
    chosen = alone.config["dtype"]
    assert chosen == ("bf16" if bf16_in_hardware("cpu") else "fp32")
    fp32 = run("fed_avg", *flags[:-1], "fp32", name="fp32")
    assert (fp32.bits == alone.bits) == (chosen == "fp32")
    ours, theirs = alone.history[-1]["server_val_loss"], fp32.history[-1]["server_val_loss"]
    assert math.isclose(ours, theirs, rel_tol=2e-3)

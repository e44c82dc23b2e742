"""Whole runs of every method: the same bits in any world, and what the history says of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedrun.data.batches import DrawnBatches
from fedrun.data.partition import split_holdout
from fedrun.data.tokens import TokenData
from fedrun.experiment import shards_of
from fedrun.federation.client_measures import mean_entropy
from fedrun.federation.schedule import Schedule
from fedrun.flags import resolve
from fedrun.strategies import STRATEGIES
from tests.support.every_method import METHODS
from tests.support.runs import Outcome, Run, execute, torchrun, without_clocks


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("many", [pytest.param(3, marks=pytest.mark.soak), 5])
def test_every_method_has_the_same_bits_in_1_and_many_processes(
        little_text: tuple[str, ...], tmp_path: Path, many: int) -> None:
    flags = (*little_text, "--num_clients", "4", "--rounds", "3", "--local_updates", "2",
             "--dtype", "fp32")
    for processes in (1, many):
        code, output = execute(
            [*torchrun(processes), "-m", "tests.support.every_method",
             str(tmp_path / f"p{processes}"), *flags], limit=300)
        assert code == 0, output
    seen = set()
    for name in METHODS:
        alone, others = (Outcome(0, "", tmp_path / f"p{n}" / name) for n in (1, many))
        assert alone.bits == others.bits, name
        assert without_clocks(alone) == without_clocks(others), name
        assert alone.history[-1]["server_val_ppl"] < alone.history[0]["server_val_ppl"]
        seen.add(alone.bits)
    assert len(seen) == len(METHODS)  # and no method is another one
    assert {flags[0] for flags in METHODS.values()} == set(STRATEGIES)


@pytest.mark.parametrize(("dtype", "rounds", "tolerance"), [("fp64", 3, 1e-9), ("fp32", 1, 1e-5)])
def test_fed_sgd_is_central_on_the_clients_batches(run_here: Run, dtype: str, rounds: int,
                                                   tolerance: float) -> None:
    flags = ("--rounds", rounds, "--num_clients", 3, "--dtype", dtype, "--lr", 5e-4)
    federated = run_here("fed_sgd", *flags, name="fed")
    central = run_here("central", *flags, "--batches", "clients", "--batch_size", 6, name="central")
    assert federated.code == central.code == 0, federated.output + central.output
    for name, value in federated.model.items():
        torch.testing.assert_close(value, central.model[name], rtol=0, atol=tolerance)
    assert federated.history[-1]["server_val_loss"] == pytest.approx(
        central.history[-1]["val_loss"], abs=tolerance)


def test_central_on_one_client_sees_its_shard_alone(run_here: Run) -> None:
    one = run_here("central", "--rounds", 3, "--batches", "one_client", "--dtype", "fp64", name="1")
    alone = run_here("fed_avg", "--rounds", 3, "--num_clients", 1, "--dtype", "fp64", name="2")
    assert one.code == alone.code == 0, one.output
    assert one.bits != alone.bits  # one client of four, not the only one
    whole = run_here("central", "--rounds", 3, "--batches", "one_client", "--num_clients", 1,
                     "--dtype", "fp64", name="3")
    for name, value in whole.model.items():
        torch.testing.assert_close(value, alone.model[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("warmup", ["true", "false"])
def test_an_outer_optimizer_is_diloco_with_one_client(run_here: Run, warmup: str) -> None:
    flags = ("--num_clients", 1, "--dtype", "fp64", "--server_momentum_warmup", warmup)
    central = run_here("central", "--rounds", 6, "--batches", "one_client", "--outer_every", 2,
                       *flags, name="1")
    federated = run_here("diloco", "--rounds", 3, "--local_updates", 2, *flags, name="2")
    assert central.code == federated.code == 0, central.output + federated.output
    for name, value in central.model.items():
        torch.testing.assert_close(value, federated.model[name], rtol=0, atol=1e-9)


def test_history_of_weights_entropies_and_norms(run_here: Run) -> None:
    outcome = run_here("fed_entropy", "--num_clients", 3, "--rounds", 2, "--temperature", 0.05)
    assert outcome.code == 0, outcome.output
    record = outcome.history[-1]
    entropies = record["client_entropies"]
    assert all(0 < h < math.log(400) for h in entropies)
    assert record["avg_client_entropy"] == pytest.approx(sum(entropies) / 3)
    softmax = torch.softmax(-torch.tensor(entropies, dtype=torch.float64) / 0.05, 0)
    assert record["client_weights"] == pytest.approx(softmax.tolist())
    assert record["effective_clients"] == pytest.approx(1 / float((softmax**2).sum()))
    assert record["effective_clients"] < 3
    assert len(record["update_norms"]) == 3
    assert 0 < record["update_cosine"] < 1
    assert 0 < record["step_norm"] <= max(record["update_norms"])
    assert len(record["val_loss_halves"]) == 2


def test_mean_cosine_is_that_of_the_pairs() -> None:
    from fedrun.records.history import CohortSums
    vectors = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).double() + 0.3
    weights = [0.1, 0.2, 0.3, 0.4]
    norms = [float(v.norm()) for v in vectors]
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    scale = [weights[i] * weights[j] * norms[i] * norms[j] for i, j in pairs]
    cosines = [float(vectors[i] @ vectors[j]) / norms[i] / norms[j] for i, j in pairs]
    expected = sum(s * c for s, c in zip(scale, cosines, strict=True)) / sum(scale)
    mean_norm = float((torch.tensor(weights).double() @ vectors).norm())
    assert CohortSums.of(weights, norms).mean_cosine(mean_norm) == pytest.approx(expected)
    assert CohortSums.of([1.0], [2.0]).mean_cosine(2.0) is None


def test_noise_ratio_of_gradients(run_here: Run) -> None:
    record = run_here("fed_sgd", "--num_clients", 3, "--rounds", 1).history[-1]
    assert record["noise_ratio"] > 1
    assert 0 < record["gradient_cosine"] < 1  # early in training gradients point alike
    one = run_here("fed_sgd", "--num_clients", 1, "--rounds", 1, name="one").history[-1]
    assert one["noise_ratio"] == pytest.approx(1, abs=1e-5)


def test_entropy_is_measured_on_the_text_that_was_asked_for(
        run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the validation split every client measures the same sequences, and trains on its whole
    shard."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def spy(model: Any, sequences: np.ndarray, numbers: np.ndarray, *rest: int) -> float:
        seen.append((sequences, numbers))
        return mean_entropy(model, sequences, numbers, *rest)

    monkeypatch.setattr("fedrun.federation.client_measures.mean_entropy", spy)
    flags = ("--num_clients", 2, "--rounds", 1, "--entropy_holdout", 0.25)
    held, shared = (run_here("fed_entropy", *flags, "--entropy_on", text, name=text)
                    for text in ("holdout", "validation"))
    assert held.code == shared.code == 0, shared.output
    (train, first), (_, second), (validation, all_of_it), other = seen
    assert not set(first) & set(second)
    assert len(all_of_it) == len(validation) < len(train)
    assert np.array_equal(validation, other[0])
    assert np.array_equal(all_of_it, other[1])
    assert "--entropy_holdout 0.25 has no effect with --entropy_on validation" in shared.output
    config: Any = resolve("fed_entropy", {"entropy_on": "validation"})
    assert config.strategy.holdout == 0
    assert len(set(shared.history[-1]["client_entropies"])) == 2, "of two models"


def test_prox_pulls_clients_back_and_does_nothing_at_one_step(run_here: Run) -> None:
    free, pulled = (run_here("fed_avg", "--num_clients", 2, "--rounds", 1, "--local_updates", 4,
                             "--prox_mu", mu, "--beta1", 0, name=f"mu{mu}") for mu in (0, 30))
    norms = [sum(r.history[-1]["update_norms"]) for r in (free, pulled)]
    assert norms[1] < 0.9 * norms[0]
    one, same = (run_here("fed_avg", "--num_clients", 2, "--rounds", 2, "--prox_mu", mu,
                          name=f"one{mu}") for mu in (0, 5))
    assert one.bits == same.bits
    assert "--prox_mu 5 has no effect" in same.output


def test_averaged_moments_with_one_client_are_its_own(run_here: Run) -> None:
    kept, averaged = (run_here("fed_avg", "--num_clients", 1, "--rounds", 4, "--client_moments", s,
                               "--dtype", "fp64", name=s) for s in ("keep", "average"))
    for name, value in averaged.model.items():
        torch.testing.assert_close(value, kept.model[name], rtol=0, atol=1e-5)  # the grid


def test_schedule_and_clipping_by_hand(run_here: Run) -> None:
    """AdamW's first step is lr times the sign: its length shows the learning rate of each step."""
    flags = ("--num_clients", 1, "--client_moments", "reset", "--val_freq", 1, "--rounds", 6,
             "--weight_decay", 0, "--beta1", 0, "--beta2", 0.5)
    outcome = run_here("fed_avg", *flags, "--warmup", 2, "--lr_schedule", "cosine")
    steps = [r["step_norm"] for r in outcome.history]
    expected = [0.5, 1, 1, *(0.5 * (1 + math.cos(math.pi * k / 4)) for k in (1, 2, 3))]
    assert [s / steps[1] for s in steps] == pytest.approx(expected, rel=0.03)
    # Shortened to 1e-12, gradients vanish beside AdamW's epsilon.
    clipped = run_here("fed_avg", *flags, "--grad_clip", 1e-12, name="clipped")
    assert clipped.history[0]["step_norm"] < 1e-3 * steps[1]


@pytest.mark.slow
def test_moments_can_be_reset_at_each_epoch_alone(run_here: Run) -> None:
    """Without a first moment, AdamW's first step is lr times the sign; later ones are shorter."""
    flags = ("--num_clients", 2, "--batch_size", 16, "--val_freq", 1, "--n_epochs", 3,
             "--epoch_passes", 0.1, "--weight_decay", 0, "--beta1", 0, "--beta2", 0.9)
    kept, renewed = (run_here("fed_avg", *flags, "--client_moments", s, name=s)
                     for s in ("keep", "reset_epoch"))
    assert kept.code == renewed.code == 0, renewed.output
    norms = [r["update_norms"][0] for r in renewed.history]
    rounds = len(norms) // 3
    assert rounds > 1
    firsts = norms[::rounds]
    assert firsts == pytest.approx([firsts[0]] * 3, rel=1e-2)
    assert [r["update_norms"][0] for r in kept.history[:rounds]] == norms[:rounds]
    assert kept.history[rounds]["update_norms"][0] < 0.97 * norms[rounds]


def test_padded_vocabulary(run_here: Run, tmp_path: Path) -> None:
    preset = tmp_path / "padded.yaml"
    preset.write_text("model: {n_layer: 1, d_model: 16, d_state: 8, headdim: 8, "
                      "pad_vocab_multiple: 64}\n")
    outcome = run_here("fed_fisher", "--config", preset, "--rounds", 2, "--fisher_scope", "mixers")
    assert outcome.code == 0, outcome.output
    assert outcome.model["backbone.embedding.weight"].shape == (448, 16)


# ---- shards, epochs, folders --------------------------------------------------------------------

def test_the_holdout_is_never_trained_on() -> None:
    config: Any = resolve("fed_entropy", {"entropy_holdout": 0.25, "num_clients": 3})
    shards = shards_of(config, of_sequences(100))
    for train, held in zip(shards.train, shards.holdout, strict=True):
        assert len(held) == (len(train) + len(held)) // 4
        assert not set(train) & set(held)
    assert sorted(i for part in (*shards.train, *shards.holdout) for i in part) == list(range(100))
    assert [part.tolist() for part in split_holdout(np.arange(5, 9), 0.0)] == [[5, 6, 7, 8], []]
    with pytest.raises(ValueError, match=r"--entropy_holdout 0\.25: must be .* client 0"):
        shards_of(config, of_sequences(9))


def of_sequences(count: int) -> TokenData:
    """As many sequences of two tokens, for what asks nothing else of the data."""
    return TokenData(np.zeros((count, 2), np.uint16), np.zeros((1, 2), np.uint16), 1, {}, Path())


def test_drawn_batches_repeat_and_depend_on_the_step_alone() -> None:
    draws = DrawnBatches(20, 8, seed=1, client=2)
    first = draws.indices(3)
    assert np.array_equal(first, DrawnBatches(20, 8, seed=1, client=2).indices(3))
    everything = np.concatenate([draws.indices(k) for k in range(200)])
    assert everything.min() == 0
    assert everything.max() == 19
    assert any(len(set(draws.indices(k))) < 8 for k in range(10))
    assert not np.array_equal(first, DrawnBatches(20, 8, seed=1, client=3).indices(3))


@pytest.mark.parametrize("local_updates", [1, 8])
@pytest.mark.parametrize("n", [2335, 101])
def test_rounds_of_the_original_study(local_updates: int, n: int) -> None:
    config: Any = resolve("fed_avg", {"epoch_passes": 2.5, "batch_size": 4,
                                      "local_updates": local_updates})
    assert Schedule(config, [n, n + 1]).rounds == math.ceil(10 * n / 4) // 4 // local_updates


@pytest.mark.parametrize("method", sorted(STRATEGIES))
def test_a_run_is_named_after_method_config_and_seed(method: str) -> None:
    prefix = "federated" if method == "fed_avg" else method
    assert resolve(method, {}).name == f"{prefix}_config_pure_ssm_1_layer_lu_1_seed_0"


# ---- combinations that cannot work, or hardly do ------------------------------------------------

@pytest.mark.parametrize(("method", "flags", "message"), [
    ("fed_sgd", {"local_updates": 2}, "--local_updates 2: must be 1 for fed_sgd"),
    ("fed_sgd", {"client_moments": "average"}, "--client_moments average: must be keep"),
    ("fed_sgd", {"grad_clip": 1}, "--grad_clip"),
    ("fed_sgd", {"eval_clients": True}, "--eval_clients True: must be false for fed_sgd"),
    ("fed_sgd", {"save_client_deltas": True}, "--save_client_deltas True: must be false"),
    ("fed_avg", {"sync": "epoch", "client_moments": "average"}, "--client_moments average"),
    ("fed_avg", {"client_moments": "reset_epoch", "cohort": 2}, "with --cohort, where a client"),
    ("fed_avg", {"sync": "epoch", "prox_mu": 1}, "--prox_mu"),
    ("fed_avg", {"beta1": 0.99, "beta2": 0.98}, "--beta2 0.98"),
    ("fed_avg", {"prox_mu": -1}, "--prox_mu -1"),
    ("fed_avg", {"grad_clip": 0}, "--grad_clip 0"),
    ("fed_fisher", {"fisher": "corrected", "fisher_microbatches": 1}, "--fisher_microbatches 1"),
    ("fed_fisher", {"fisher": "corrected", "batch_size": 3}, "divisor of --batch_size 3"),
    ("fed_fisher", {"fisher_floor": 0}, "--fisher_floor 0"),
    ("fed_entropy", {"temperature": 0}, "--temperature 0"),
    ("fed_entropy", {"entropy_holdout": 1}, "--entropy_holdout 1"),
    ("fed_entropy", {"entropy_batches": 0}, "--entropy_batches 0"),
    ("fed_momentum", {"server_momentum": 1}, "--server_momentum 1"),
    ("fed_adam", {"server_beta2": 1}, "--server_beta2 1"),
    ("fed_adam", {"tau": 0}, "--tau 0"),
    ("central", {"batches": "clients", "batch_size": 6}, "--batch_size 6: must be a multiple"),
])
def test_wrong_combinations_name_the_flag(method: str, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(method, flags)


@pytest.mark.parametrize(("method", "flags", "message"), [
    ("diloco", {"local_updates": 7}, "steady steps 7 times as long"),
    ("fed_momentum", {"momentum_form": "heavy_ball"}, "steady steps 10 times as long"),
    ("fed_avg", {"client_moments": "reset"}, "sign descent"),
])
def test_questionable_settings_warn(method: str, flags: dict[str, Any], message: str) -> None:
    config: Any = resolve(method, flags)
    (warning,) = config.warnings()
    assert message in warning
    usual: Any = resolve(method, flags | {"local_updates": 8, "client_moments": "keep"})
    assert usual.warnings() == []

"""The benchmark of what an update shows: its measures, and that it sees what it should."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from itertools import permutations, product

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from fedrun.federation.client import Client
from tests.benchmarks import leak, leak_rows
from tests.benchmarks.leak import HEADER, Found, Row, auc, measure, precision, scores, telling_end
from tests.support.made_data import made
from tests.support.runs import ROOT

VOCABULARY, ONE_FORM = 1000, {"num_clients": 6, "batch_size": 2}
DATA = made([600] * 6, sequence_length=8, vocab_size=VOCABULARY)


@pytest.mark.parametrize("values", [3, 10**6], ids=["ties", "no ties"])
def test_the_area_is_that_of_sklearn(values: int) -> None:
    random = np.random.default_rng(values)
    for size in (5, 50, 500):
        score = random.integers(values, size=size).astype(float)
        tokens = np.sort(random.choice(size, size // 3, replace=False))
        inside = np.isin(np.arange(size), tokens)
        assert auc(score, tokens) == pytest.approx(roc_auc_score(inside, score), abs=1e-12)


def test_precision_is_the_mean_over_all_orders_of_equal_rows() -> None:
    score, tokens = np.array([1.0, 2.0, 2.0, 3.0, 2.0, 0.0]), np.array([0, 2, 3])
    found = [np.isin(sorted(order, key=lambda i: -score[i])[:3], tokens).mean()
             for order in permutations(range(6))]
    assert len(set(found)) > 1
    assert precision(score, tokens) == pytest.approx(np.mean(found))
    assert precision(np.arange(6.0), np.array([4, 5])) == 1.0
    assert precision(np.arange(6.0), np.array([0, 1])) == 0.0


def test_rows_that_move_otherwise_are_found_by_their_distance() -> None:
    """All rows are as long, but those of two tokens point another way."""
    rows = np.tile([3.0, 4.0], (9, 1))
    rows[[2, 7]] = [[-3.0, 4.0], [4.0, -3.0]]
    both = scores(rows)
    assert set(both["norm"]) == {5.0}
    assert precision(both["distance"], np.array([2, 7])) == 1.0
    assert auc(both["distance"], np.array([2, 7])) == 1.0
    assert auc(both["norm"], np.array([2, 7])) == 0.5


def test_a_ranking_is_read_from_the_end_that_shows_more() -> None:
    """Short rows tell as much as long ones."""
    rows = np.array([[5.0], [1.0], [6.0], [7.0]])
    for tokens, upper in (([1], 0.0), ([3], 1.0)):
        samples = [measure(rows, np.array(tokens))] * 2
        assert samples[0]["AUC norm"] == upper
        assert telling_end("norm", samples) == ([1.0, 1.0], [1.0, 1.0])


def test_terms_are_those_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tokens that are trained on, and their sum is what a cohort leaves in the buffer."""
    read: dict[int, list[np.ndarray]] = defaultdict(list)
    original = Client.next_batch

    def next_batch(client: Client) -> Tensor:
        batch = original(client)
        read[client.index].append(batch.numpy().copy())
        return batch

    monkeypatch.setattr(Client, "next_batch", next_batch)
    worker = leak.make_worker(DATA, 2, seed=1, **ONE_FORM)
    made_terms = list(leak.terms(worker, 1))
    assert [len(batches) for batches in read.values()] == [2] * 6
    for client, term in enumerate(made_terms):
        assert np.array_equal(term.tokens, np.unique(read[client]))
    together = leak.make_worker(DATA, 2, seed=1, **ONE_FORM)
    plan = dataclasses.replace(together.schedule.plan(1, 0.0), evaluate=False)
    together.train(plan)
    total = np.sum([term.integers for term in made_terms], 0, np.int32)
    assert plan.weights == [1 / 6] * 6
    assert np.array_equal(together.aggregator.buffer.numpy(), total)
    assert torch.equal(worker.global_model, together.global_model)


@pytest.mark.parametrize("number", [1, 3])
def test_the_short_form_finds_what_is_there_and_nothing_behind_masks(number: int) -> None:
    found: Found = leak.attacked(DATA, 1, number, [0], sums=(3,), **ONE_FORM)

    def mean(row: Row, name: str) -> float:
        return float(np.mean([one[name] for one in found[row]]))

    own, masked = Row("a client's term", "its own"), Row("a masked term", "its own")
    assert mean(own, "AUC distance") > 0.9
    assert mean(own, "precision distance") > 0.7
    for way in ("norm", "distance"):
        assert mean(masked, f"AUC {way}") == pytest.approx(0.5, abs=0.15)
        assert mean(masked, f"precision {way}") < 0.15
    assert len(found[own]) == len(found[Row("the sum of 3", "one client's")]) == 6
    assert len(found[Row("the sum of 3", "all of theirs")]) == len(found[masked]) == 2
    lines = leak.table(number, 1, found).splitlines()
    assert [line.count("|") for line in lines] == [HEADER.splitlines()[0].count("|")] * len(found)


def test_the_tracked_table_says_what_the_page_does() -> None:
    """All in a client's term, less of one client the more are summed, and nothing behind masks or
    noise of what one client can move a sum by; the clip alone hides nothing."""
    lines = (ROOT / "results" / "leak" / "table.md").read_text(encoding="utf-8").splitlines()
    assert "\n".join(lines[2:4]) == HEADER
    found = {}
    for line in lines[4:]:
        number, updates, seen, against, _, *cells, guess = line.strip("|").split(" | ")
        numbers = [float(cell.split()[0]) for cell in cells]
        found[number.strip(), updates, seen, against] = numbers
        if seen == "a masked term" or seen.endswith("noise 1"):
            guess = guess.strip()
            assert numbers == pytest.approx([float(guess), 0.5, float(guess), 0.5], abs=0.025)
        if seen.endswith("noise 0"):
            without = found[number.strip(), updates, seen.partition(",")[0], against]
            assert numbers == pytest.approx(without, abs=0.015)
    assert len(found) == len(lines) - 4
    for number, updates in {key[:2] for key in found}:
        more = []
        for seen, against in (("a client's term", "its own"),
                              *((f"the sum of {n}", "one client's") for n in leak.SUMS)):
            stranger = found[number, updates, seen, "a stranger's"]
            more.append(found[number, updates, seen, against][2] - stranger[2])
        assert more == sorted(more, reverse=True)
        assert more[0] > 0.4
        assert more[-1] < 0.05


def test_noise_drives_what_is_found_to_chance() -> None:
    """The clip alone hides nothing: rows keep their order. Noise of half of what one client can
    move a sum by hides all, of a term and of a client in a sum."""
    found = leak.attacked_private(DATA, 1, [0, 1], multipliers=(0.0, 1e-3, 0.5), sums=(3,),
                                  **ONE_FORM)

    def mean(seen: str, against: str, noise: str, name: str) -> float:
        return float(np.mean([one[f"{name} distance"] for one in
                              found[Row(f"{seen}, clip 1, noise {noise}", against)]]))

    for seen, against in (("a client's term", "its own"), ("the sum of 3", "one client's")):
        areas = [mean(seen, against, noise, "AUC") for noise in ("0", "0.001", "0.5")]
        assert areas[0] > 0.85
        assert areas[0] + 0.01 > areas[1] > areas[2] + 0.1
        assert areas[2] == pytest.approx(0.5, abs=0.1)
        assert mean(seen, against, "0.5", "precision") < 0.1
    assert mean("a client's term", "its own", "0", "precision") > 0.7
    assert [len(samples) for samples in found.values()] == 3 * [12, 12, 12, 4]


def test_a_clipped_term_is_as_long_as_the_clip() -> None:
    worker, level = leak.make_private(DATA, 1, 0, 1.0, **ONE_FORM)
    scale = level.scale / 6
    for term in leak.terms(worker, 1):
        assert np.linalg.norm(term.integers[:-1].astype(float)) / scale == pytest.approx(
            leak.CLIP, rel=1e-3)


def test_sizes_of_rows_show_all_that_a_client_has_trained_on() -> None:
    """Rows of tokens that it never had have the size 0; the others' say how often."""
    few = made([600] * 6, sequence_length=8, vocab_size=100)  # so that some occur several times
    worker = leak.make_worker(few, 2, 0, **leak_rows.ROWS, **ONE_FORM)
    plan = dataclasses.replace(worker.schedule.plan(1, 0.0), evaluate=False)
    worker.train(plan)
    worker.aggregate(plan)
    for one in leak_rows.shown(worker, 2):
        assert one.sizes.shape == (100, 1)
        assert one.now.sum() == 2 * 2 * 8  # steps of batches of sequences
        assert one.so_far.sum() == 2 * one.now.sum()
        assert np.all(one.so_far >= one.now)
    found = leak_rows.attacked(few, 2, 2, [0], sums=(3,), **ONE_FORM)

    def mean(seen: str, against: str, name: str) -> float:
        return float(np.mean([one[name] for one in found[leak_rows.Row(seen, against)]]))

    own = ("a client's term", "one client's, all rounds")
    assert mean(*own, "AUC sizes") > 0.95
    assert mean(*own, "AUC sizes") > mean(*own, "AUC update")
    assert mean(*own, "often sizes") > 0.5
    assert mean("a client's term", "a stranger's, all rounds", "AUC sizes") < 0.7
    assert [len(samples) for samples in found.values()] == 4 * [6] + [6, 6, 2, 2]
    lines = leak_rows.table(2, 2, found).splitlines()
    assert [line.count("|") for line in lines] == \
        [leak_rows.HEADER.splitlines()[0].count("|")] * len(found)


@pytest.mark.parametrize(("local_updates", "decodes"), [(1, True), (2, False)])
def test_a_sum_after_one_local_update_gives_single_gradients_away(
        local_updates: int, decodes: bool) -> None:
    """Why --secure_sum wants two: the first step of AdamW has one length in every element, so that
    a sum with known weights is one of eight numbers, each of them other signs of three clients."""
    weights = np.array([0.62, 0.28, 0.1])
    worker = leak.make_worker(DATA, local_updates, 0, num_clients=3, batch_size=2)
    plan, config = dataclasses.replace(worker.schedule.plan(1, 0.0), evaluate=False), worker.config
    steps = []
    for client, weight in enumerate(weights):
        alone = dataclasses.replace(plan, cohort=[client], weights=[float(weight)])
        assert not worker.train(alone).clients[0].left_out
        (scale,) = worker.aggregator._scales  # type: ignore[attr-defined]
        term = worker.aggregator.buffer[:worker.flat.size].double().numpy() / scale
        # In learning rates, without what weight decay does, which all know.
        decayed = config.weight_decay * worker.global_model.double().numpy()
        steps.append(-term / (weight * config.lr) - decayed)
    signs = np.array(list(product((-1, 1), repeat=3)))
    seen = weights @ np.array(steps)
    found = signs[np.abs(seen[:, None] - signs @ weights).argmin(1)].T
    right = [float(np.mean(np.sign(own) == guess)) for own, guess in zip(steps, found, strict=True)]
    assert (min(right[1:]) > 0.99) == decodes, right
    assert (max(right[1:]) < 0.9) != decodes, right

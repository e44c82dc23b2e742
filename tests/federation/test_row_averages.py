"""Averaged rows of second moments in rounds of a worker: against AdamW by hand, the bytes that are
sent, and the same bits in any world."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fedrun.common.errors import InputError
from fedrun.config import FederatedConfig
from fedrun.distributed.data_plane import DataPlane
from fedrun.federation.client import Client
from fedrun.federation.row_averages import RowAverages
from fedrun.federation.worker import Worker
from fedrun.flags import resolve
from fedrun.strategies.base import adamw_ratio
from fedrun.training.params import FlatParams
from fedrun.training.row_moments import row_roots
from tests.support.given_gradients import (
    BETA1,
    BETA2,
    CLIP,
    DECAY,
    EPS,
    LR,
    MUON,
    STEPS,
    go,
    gradient,
    of_muon,
    worker_of,
)
from tests.support.naive_muon import by_svd
from tests.support.runs import FAULTY, Run, fault, without_clocks


def rows_worker(every: int, plane: DataPlane | None = None, **flags: Any) -> Worker:
    return worker_of(plane, client_moments="average_rows", moments_every=str(every), **flags)


def by_hand(worker: Worker, start: Tensor, rounds: list[tuple[list[int], list[float], int]],
            every: int) -> tuple[Tensor, Tensor, int]:
    """The same in float64 from the formulas: the model, the means by element, and how many times a
    client's moments were scaled."""
    flat, muon = worker.flat, of_muon(worker)
    w, size = start.double(), len(start)
    by_adamw, beta = torch.ones(size, dtype=torch.bool), torch.full(
        (size,), BETA1, dtype=torch.float64)
    for part in muon:
        by_adamw[part.start:part.stop], beta[part.start:part.stop] = False, MUON
    rows = [(a, a + part.shape[-1]) for part in flat.slices if part not in muon
            for a in range(part.start, part.stop, part.shape[-1])]
    means = torch.zeros(size).double()
    own: dict[int, tuple[int, int, Tensor, Tensor]] = {}  # client: last round, steps, m, v
    scaled = 0
    for number, (cohort, weights, _) in enumerate(rounds, 1):
        deltas, roots = [], []
        for k in cohort:
            last, t, m, v = own.get(k, (0, 0, torch.zeros(size).double(),
                                        torch.zeros(size).double()))
            renewed = number >= 3 and (number - 3) % every == 0
            if t and means.any() and (renewed or last < number - 1):
                scaled += 1
                for a, b in rows:
                    v[a:b] *= means[a]**2 / (v[a:b].mean() / (1 - BETA2**t))
                largest = adamw_ratio(BETA1, BETA2, t) * v.sqrt()
                largest[~by_adamw] = math.inf
                m = torch.sign(m) * torch.minimum(m.abs(), largest)
            x = w
            for step in range((number - 1) * STEPS, number * STEPS):
                g = gradient(size, k, step)
                g = g * min(1.0, CLIP / (g.norm().item() + 1e-6))
                x, t = x * (1 - LR * DECAY), t + 1
                m, v = beta * m + (1 - beta) * g, BETA2 * v + (1 - BETA2) * g * g * by_adamw
                moved = (m / (1 - BETA1**t)) / ((v / (1 - BETA2**t)).sqrt() + EPS)
                for part in muon:
                    it = slice(part.start, part.stop)
                    mixed = by_svd(((1 - MUON) * g + MUON * m)[it].view(part.shape).numpy())
                    moved[it] = torch.from_numpy(mixed.ravel()) * 0.2 * math.sqrt(max(part.shape))
                x = x - LR * moved
            deltas.append(x - w)
            squares = v / (1 - BETA2**t)
            found = torch.zeros(size).double()
            for a, b in rows:
                found[a:b] = squares[a:b].mean().sqrt()
            roots.append(found)
            own[k] = number, t, m, v
        shares = torch.tensor(weights).double() / math.fsum(weights)
        w = w + sum(p * d for p, d in zip(shares, deltas, strict=True))
        if number >= 2 and (number - 2) % every == 0:
            means = sum((p * s for p, s in zip(shares, roots, strict=True)), torch.zeros(size))
    return w, torch.stack([means[a] for a, _ in rows]), scaled


@pytest.mark.parametrize(("every", "flags", "rounds", "scaled"), [
    (1, {"num_clients": 2}, 4, 4), (2, {"num_clients": 2}, 6, 4),
    (3, {"num_clients": 3, "cohort": 2}, 8, 6),
    (2, {"num_clients": 2, "local_optimizer": "muon"}, 5, 4),
    (2, {"num_clients": 2, "aggregation": "float"}, 4, 2)])
def test_rounds_by_hand(every: int, flags: dict[str, Any], rounds: int, scaled: int) -> None:
    """scaled: turns of clients that began with it. One that missed a round does, too."""
    worker = rows_worker(every, dtype="fp64", **flags)
    start = worker.global_model.clone()
    model, means, times = by_hand(worker, start, go(worker, rounds), every)
    assert times == scaled
    assert worker.rows is not None
    torch.testing.assert_close(worker.rows.means, means, rtol=1e-9, atol=2.0**-60)
    assert (worker.global_model - model).abs().max() < 1e-9 * LR
    assert (worker.global_model - start).abs().max() > LR


def test_scaling_changes_the_model() -> None:
    """By more than what the comparison by hand allows."""
    ends = []
    for every in (1, 100):
        worker = rows_worker(every, dtype="fp64", num_clients=2)
        go(worker, 4)
        ends.append(worker.global_model)
    assert (ends[0] - ends[1]).abs().max() > 0.01 * LR


@pytest.mark.parametrize("flags", [{}, {"aggregation": "int8"}, {"local_optimizer": "muon"}])
def test_what_is_sent_over_a_schedule(flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch
                                      ) -> None:
    """At one client a worker: what the collectives are given in each round, four bytes a row."""
    sent: list[int] = []
    monkeypatch.setattr(dist, "get_world_size", lambda group: 5)
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(dist, "all_reduce", lambda vector, **_: sent.append(vector.nbytes))
    group: Any = object()
    worker = rows_worker(3, DataPlane(group), num_clients=1, dtype="fp32", **flags)
    muon = of_muon(worker)
    rows = sum(part.shape[:-1].numel() for part in worker.flat.slices if part not in muon)
    reported = [number for _, _, number in go(worker, 6)]
    update = worker.aggregator.bytes_sent
    assert sent == [update, update, 4 * rows, update, update, update, 4 * rows, update]
    assert reported == [2 * (update + besides) for besides in (0, 4 * rows, 0, 0, 4 * rows, 0)]


def test_a_client_whose_second_moment_is_none_is_left_out() -> None:
    """The means are those of the other two clients, and its own moments become zeros."""
    worker = rows_worker(1, dtype="fp64", num_clients=3)
    go(worker, 1)
    state = worker.store.checkout(2)
    state["adamw.exp_avg_sq"][7] = math.inf  # its step is zero, and its update finite
    worker.store.checkin(2, state)
    plan, found, taken = worker.schedule.plan(2, 0.0), dict[int, Tensor](), RowAverages.take

    def take(rows: RowAverages, client: Client) -> str:
        found[client.index] = row_roots(client.optimizer)
        return taken(rows, client)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowAverages, "take", take)
        report = worker.train(plan)
    assert [one.left_out for one in report.clients] == ["", "", "second moment not finite"]
    worker.aggregate(plan)
    assert worker.rows is not None
    a, b = plan.weights[:2]
    torch.testing.assert_close(worker.rows.means, (a * found[0] + b * found[1]) / (a + b),
                               rtol=1e-9, atol=2.0**-60)
    assert not worker.store.checkout(2)["adamw.exp_avg_sq"].any()


@pytest.mark.parametrize(("clients", "eps", "clip", "bits"), [
    (8, 1e-8, 1, 32), (12, 1e-8, 1, 64), (12, 1e-5, 1, 32), (8, 1e-8, 8, 64), (300, 1e-6, 1, 32)])
def test_what_rounding_loses_is_at_most_half_of_eps(clients: int, eps: float, clip: float, bits: int
                                                    ) -> None:
    """Where all clients' shares are rounded the same way."""
    config = resolve("fed_avg", {"config": "tiny", "num_clients": clients, "grad_clip": clip,
                                 "client_moments": "average_rows", "eps": eps})
    assert isinstance(config, FederatedConfig)
    flat = FlatParams(nn.Linear(4, 30, bias=False))
    for root in (0.49 * eps, 0.7 * eps, 4.5 * eps, 1e3 * eps, clip):
        rows = RowAverages(config, flat, DataPlane())
        rows.begin(averages=True)
        assert rows.bytes_sent == 30 * bits // 8
        rows._roots = torch.full((30,), root)
        for _ in range(clients):
            rows.add(1 / clients)
        rows.reduce(None)
        rows.renew(1.0)
        assert (rows.means - root).abs().max() <= 0.5 * eps + 1e-6 * root


def test_a_run_without_rows_is_refused() -> None:
    with pytest.raises(InputError, match=r"--personal \*embedding\*,.*: must be fewer names"):
        rows_worker(1, num_clients=2, dtype="fp32", local_optimizer="muon",
                    personal="*embedding*,*norm*,*conv1d*,*A_log,*D,*dt_bias")


FLAGS = ("--num_clients", 5, "--cohort", 4, "--rounds", 6, "--local_updates", 2, "--grad_clip", 1,
         "--client_moments", "average_rows", "--moments_every", 2, "--checkpoint_freq", 1)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "aggregation", "optimizer"), [
    ("fed_avg", "int4", "muon"), ("fed_entropy", "exact", "adamw")])
def test_the_same_bits_in_any_world_and_after_a_kill(
        run: Run, tmp_path: Path, method: str, aggregation: str, optimizer: str) -> None:
    flags = (*FLAGS, "--aggregation", aggregation, "--local_optimizer", optimizer)
    alone = run(method, *flags, name="alone")
    three = run(method, *flags, processes=3, name="three")
    five = run(method, *flags, "--client_store", "disk", processes=5, name="five")
    assert alone.code == three.code == five.code == 0, three.output + five.output
    assert alone.bits == three.bits == five.bits
    assert without_clocks(alone) == without_clocks(three)
    run(method, *flags, "--client_store", "disk", script=FAULTY,
        env=fault(tmp_path, "kill", "record:3"))
    resumed = run(method, *flags, "--client_store", "disk", processes=2)
    assert "resuming from step" in resumed.output
    assert resumed.bits == alone.bits


@pytest.mark.parametrize(("method", "flags", "message"), [
    ("fed_avg", {"grad_clip": None}, "--grad_clip none: must be a number > 0 with --client_mom"),
    ("fed_avg", {"sync": "epoch"}, "--client_moments average_rows: must be keep, reset or reset_e"),
    ("fed_avg", {"moments_every": "3,6"}, "--moments_every 3,6: must be an integer >= 1 with"),
    ("fed_avg", {"moments_every": "0"}, "--moments_every 0: must be an integer >= 1"),
    ("fed_avg", {"moments_dtype": "bf16"}, "--moments_dtype bf16: must be fp32"),
    ("fed_avg", {"overlap": True}, "--client_moments average_rows: must be keep, reset"),
    ("fed_avg", {"client_clip": "1"}, "--client_moments average_rows: must be keep, reset"),
    ("fed_median", {}, "--client_moments average_rows: must be keep, reset"),
    ("fed_avg", {"dp": "client", "dp_clip": 1, "dp_noise": 1, "dp_delta": 1e-5},
     "--client_moments average_rows: must be keep, reset or reset_epoch with --dp client"),
    ("fed_sgd", {}, "--client_moments average_rows: must be keep for fed_sgd"),
])
def test_what_cannot_be_averaged_is_refused(method: str, flags: dict[str, Any], message: str
                                            ) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(method, {"client_moments": "average_rows", "grad_clip": 1} | flags)

"""Averaged moments in rounds of a worker: against AdamW by hand, and the bytes that are sent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fedrun.distributed.data_plane import DataPlane
from fedrun.flags import resolve
from fedrun.training.params import ParamSlice
from tests.support import naive_int4, naive_int8
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


class Exactly:
    """Means over a cohort, as they are."""

    def __init__(self, size: int) -> None:
        self.averages = {name: np.zeros(size) for name in "ms"}
        self.first = 1  # round whose moments may be averaged

    def round(self, weights: list[float], deltas: list[np.ndarray],
              moments: dict[str, list[np.ndarray]], moving: list[str]) -> np.ndarray:
        for name in moving:
            self.averages[name] = np.average(moments[name], 0, weights)
        mean: np.ndarray = np.average(deltas, 0, weights)
        return mean


class InFewBits:
    """The same with updates in eight bits or in four and moments in eight, for a cohort that stays
    the same."""

    def __init__(self, aggregation: str, size: int, weights: list[float], bound: float) -> None:
        of_updates = {"int8": naive_int8.Naive, "int4": naive_int4.Naive}[aggregation]
        self.deltas = of_updates(weights, size)
        self.moments = naive_int8.NaiveMoments(weights, size, CLIP)
        self.averages, self.bound, self.first = self.moments.averages, bound, 2

    def round(self, _: list[float], deltas: list[np.ndarray],
              moments: dict[str, list[np.ndarray]], moving: list[str]) -> np.ndarray:
        self.moments.round(moments, moving)
        mean: np.ndarray = self.deltas.round(deltas, self.bound)
        return mean


def by_hand(start: Tensor, rounds: list[tuple[list[int], list[float], int]],
            every: tuple[int, int], means: Exactly | InFewBits, matrices: Sequence[ParamSlice]
            ) -> tuple[dict[str, Tensor], int]:
    """The same in float64 from the formulas: the model, both averages, and how many elements of the
    first moment were cut. matrices: what Muon updates."""
    w, size = start.double(), len(start)
    ratio = BETA1**2 / BETA2
    limit = (1 - BETA1) / math.sqrt((1 - BETA2) * (1 - ratio))
    averages = {name: torch.from_numpy(a.copy()) for name, a in means.averages.items()}
    made_in = {"m": 0, "s": 0}  # rounds
    own: dict[int, tuple[int, Tensor, Tensor]] = {}  # client -> its last round, m, v
    cut, by_adamw = 0, torch.ones(size, dtype=torch.bool)
    for part in matrices:
        by_adamw[part.start:part.stop] = False
    beta = torch.where(by_adamw, torch.tensor(BETA1, dtype=torch.float64), MUON)
    for number, (cohort, weights, _) in enumerate(rounds, 1):
        t = (number - 1) * STEPS
        deltas, ms, ss, sizes = [], [], [], []
        for k in cohort:
            last, m, v = own.get(k, (0, averages["m"], averages["s"]))
            missed = last < number - 1 or number == 1
            loaded = {name for name in ("m", "s") if missed or made_in[name] == number - 1}
            if "m" in loaded:
                m = averages["m"] * (1 - BETA1**t)
            if "s" in loaded:
                v = averages["s"]**2 * (1 - BETA2**t)
            if loaded:
                largest = limit * math.sqrt(1 - ratio**t) * v.sqrt()
                largest[~by_adamw] = math.inf
                cut += int((m.abs() > largest * (1 + 1e-6)).sum())
                m = torch.sign(m) * torch.minimum(m.abs(), largest)
            x = w
            for step in range(t, t + STEPS):
                g = gradient(size, k, step)
                g = g * min(1.0, CLIP / (g.norm().item() + 1e-6))
                x = x * (1 - LR * DECAY)
                m, v = beta * m + (1 - beta) * g, BETA2 * v + (1 - BETA2) * g * g * by_adamw
                moved = (m / (1 - BETA1**(step + 1))) / (
                    (v / (1 - BETA2**(step + 1))).sqrt() + EPS)
                for part in matrices:
                    it = slice(part.start, part.stop)
                    mixed = by_svd(((1 - MUON) * g + MUON * m)[it].view(part.shape).numpy())
                    moved[it] = torch.from_numpy(mixed.ravel()) * 0.2 * math.sqrt(max(part.shape))
                x = x - LR * moved
            deltas.append(x - w)
            ms.append(m / (1 - BETA1**(t + STEPS)))
            ss.append((v / (1 - BETA2**(t + STEPS))).sqrt())
            sizes.append(torch.where(by_adamw, ss[-1], ms[-1].abs()))
            own[k] = number, m, v
        moving = [name for name, period in zip("ms", every, strict=True)
                  if number >= means.first and (number - 2) % period == 0]
        w = w + torch.from_numpy(means.round(weights, [d.numpy() for d in deltas], {
            "m": [one.numpy() for one in ms], "s": [one.numpy() for one in ss],
            "sizes": [one.numpy() for one in sizes]}, moving))
        averages = {name: torch.from_numpy(a.copy()) for name, a in means.averages.items()}
        made_in |= dict.fromkeys(moving, number)
    return {"model": w, "momentum": averages["m"], "rms": averages["s"]}, cut


@pytest.mark.parametrize(("every", "flags", "rounds"), [
    ((1, 1), {"num_clients": 2}, 3), ((2, 3), {"num_clients": 2}, 5),
    ((3, 2), {"num_clients": 3, "cohort": 2}, 7), ((3, 6), {"num_clients": 2}, 3),
    ((2, 3), {"num_clients": 2, "aggregation": "float"}, 5),
    ((3, 2), {"num_clients": 3, "cohort": 2, "local_optimizer": "muon"}, 7)])
def test_rounds_by_hand(every: tuple[int, int], flags: dict[str, Any], rounds: int) -> None:
    """In float64, where the grid is fine; and in float32, within the grid's steps."""
    for dtype, tolerance in (("fp64", 1e-9), ("fp32", 3e-2)):
        worker = worker_of(moments_every=f"{every[0]},{every[1]}", dtype=dtype, **flags)
        start = worker.global_model.clone()
        expected, cut = by_hand(start, go(worker, rounds), every, Exactly(len(start)),
                                of_muon(worker))
        assert (cut > 0) == (max(every) > 1 and rounds > 3)
        moved = worker.global_model.double() - start.double()
        assert moved.abs().max() > LR
        wrong = (moved - (expected["model"] - start.double())).abs()
        assert wrong.max() < tolerance * LR
        assert wrong.median() < 1e-3 * tolerance * LR or dtype == "fp64"
        assert worker.global_state.moments is not None
        for name, average in worker.global_state.moments.items():
            grid = 2.0 ** (-28 if dtype == "fp32" else -60)
            wrong = (average.double() - expected[name]).abs()
            assert bool((wrong <= 4 * grid + 1e-5 * expected[name].abs()).all()), name


@pytest.mark.parametrize(("every", "rounds", "optimizer", "aggregation"), [
    ((1, 1), 3, "adamw", "int8"), ((2, 3), 6, "adamw", "int8"), ((2, 3), 6, "muon", "int8"),
    ((1, 1), 3, "muon", "int4"), ((2, 3), 6, "muon", "int4")])
def test_rounds_in_few_bits_by_hand(every: tuple[int, int], rounds: int, optimizer: str,
                                    aggregation: str) -> None:
    worker = worker_of(moments_every=f"{every[0]},{every[1]}", dtype="fp64", num_clients=2,
                       aggregation=aggregation, local_optimizer=optimizer)
    start, ratio = worker.global_model.clone(), BETA1**2 / BETA2
    farthest = max([(1 - BETA1) / math.sqrt((1 - BETA2) * (1 - ratio))] + [
        1.21 * 0.2 * math.sqrt(max(part.shape)) for part in of_muon(worker)])
    step = LR * (farthest + 64 * DECAY)
    made = go(worker, rounds)
    means = InFewBits(aggregation, len(start), made[0][1], STEPS * step)
    expected, cut = by_hand(start, made, every, means, of_muon(worker))
    assert (cut > 0) == (rounds > 3)
    assert worker.global_state.moments is not None
    found = {"model": worker.global_model, **worker.global_state.moments}
    for name, vector in found.items():
        origin = start if name == "model" else torch.zeros(())
        wrong = (vector - expected[name]).abs()
        if name == "rms":  # that of a matrix is nothing but ties
            for part in of_muon(worker):
                wrong[part.start:part.stop] = 0
        # A quotient that lies on a tie may be rounded either way.
        apart = wrong > 1e-6 * (expected[name] - origin).abs() + 1e-9 * LR
        assert apart.double().mean() < 1e-3, name
        assert wrong.sum() <= 1e-3 * (expected[name] - origin).abs().sum(), name


@pytest.mark.parametrize(("flags", "average"), [({}, 6), ({"aggregation": "int8"}, 1.53)])
def test_what_is_sent_over_a_schedule(flags: dict[str, Any], average: float,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """At one client a worker: what the collective is given, each round. average: bytes a parameter
    and round."""
    sent: list[int] = []
    monkeypatch.setattr(dist, "get_world_size", lambda group: 5)
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(dist, "all_reduce", lambda vector, **_: sent.append(vector.nbytes))
    group: Any = object()
    worker = worker_of(DataPlane(group), num_clients=1, moments_every="3,6", dtype="fp32", **flags)
    size = worker.flat.size
    reported = [number for _, _, number in go(worker, 12)]
    if flags:  # with two counts of clients and a scale a block, two sums of weights
        blocks = -(-size // 256)
        assert sent == [each * (256 * blocks + 8 * -(-blocks // 4)) + 4 * blocks + 8
                        for each in [1, 3, 1, 1, 2, 1] * 2]
    else:
        assert sent == [4 * (size * each + 1) for each in [1, 3, 1, 1, 2, 1] * 2]
    assert reported == [2 * each for each in sent], "there and back"
    assert sum(sent) / (12 * size) == pytest.approx(average, rel=0.01)
    assert worker.runtime.data_plane.bytes_sent == sum(sent)


FLAGS = ("--num_clients", 5, "--cohort", 4, "--rounds", 6, "--local_updates", 2, "--grad_clip", 1,
         "--client_moments", "average_sqrt", "--moments_every", "2,3", "--checkpoint_freq", 1)


@pytest.mark.slow
@pytest.mark.parametrize(("aggregation", "optimizer", "kind", "at"), [
    pytest.param("exact", "adamw", "term", "record:4", marks=pytest.mark.soak),
    ("exact", "adamw", "kill", "reduce:6"), ("int8", "muon", "kill", "reduce:5")])
def test_the_same_bits_in_1_and_3_processes_and_after_a_stop(
        run: Run, tmp_path: Path, aggregation: str, optimizer: str, kind: str, at: str) -> None:
    """Stopped or killed where the clients have moments of their own and there is an average of an
    earlier round, and resumed in another world."""
    flags = (*FLAGS, "--aggregation", aggregation, "--local_optimizer", optimizer)
    alone = run("fed_avg", *flags, name="alone")
    three = run("fed_avg", *flags, processes=3, name="three")
    assert alone.code == three.code == 0, three.output
    assert alone.bits == three.bits
    assert without_clocks(alone) == without_clocks(three)
    run("fed_avg", *flags, script=FAULTY, env=fault(tmp_path, kind, at))
    resumed = run("fed_avg", *flags, processes=2)
    assert "resuming from step" in resumed.output
    assert resumed.bits == alone.bits


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", [pytest.param("exact", marks=pytest.mark.soak), "int8",
                                         "int4"])
def test_the_same_bits_in_5_processes_and_from_a_disk(run: Run, aggregation: str) -> None:
    alone, five, disk = (run("fed_avg", *FLAGS, "--aggregation", aggregation, *more, processes=n,
                             name=f"in_{n}_{len(more)}")
                         for n, more in ((1, ()), (5, ()), (2, ("--client_store", "disk"))))
    assert alone.code == five.code == disk.code == 0, five.output + disk.output
    assert alone.bits == five.bits == disk.bits


@pytest.mark.parametrize(("method", "flags", "message"), [
    ("fed_avg", {"grad_clip": None}, "--grad_clip none: must be a number > 0 with --client_mom"),
    ("fed_avg", {"sync": "epoch"}, "--client_moments average_sqrt: must be keep, reset or reset_e"),
    ("fed_avg", {"moments_every": "3,"}, "--moments_every 3,: must be one or two integers"),
    ("fed_avg", {"moments_every": "0,1"}, "--moments_every 0,1: must be one or two integers"),
    ("fed_avg", {"dp": "client", "dp_clip": 1, "dp_noise": 1, "dp_delta": 1e-5},
     "--client_moments average_sqrt: must be keep, reset or reset_epoch with --dp client"),
    ("fed_sgd", {}, "--client_moments average_sqrt: must be keep for fed_sgd"),
])
def test_what_cannot_be_averaged_is_refused(method: str, flags: dict[str, Any], message: str
                                            ) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(method, {"client_moments": "average_sqrt", "grad_clip": 1} | flags)

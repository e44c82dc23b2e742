"""The mean cosine of consecutive gradients, against NumPy in double precision."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fedrun.federation.client import Client
from fedrun.training import cosines
from fedrun.training.cosines import StepCosines
from tests.support.runs import Run

STEPS = 65
# Each is like the one before it, and the more so the later it is.
_noise = np.random.default_rng(0).normal(size=(STEPS + 1, 40))
GRADIENTS = np.array(list(itertools.accumulate(
    _noise, lambda before, new: 0.5 * before + new))).astype(np.float32)


def next_evaluated(every: int) -> Callable[[int], int]:
    """After the first step, every so many, and the last."""
    due = [1, *range(every, STEPS, every), STEPS]
    return lambda step: next((each for each in due if each >= step), STEPS)


def mean_of_ten(gradients: np.ndarray, step: int) -> float:
    """The original study's, from the second step on. gradients: (steps, size)."""
    pairs = [(gradients[k - 1].astype(float), gradients[k - 2].astype(float))
             for k in range(2, step + 1)][-10:]
    found = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in pairs]
    return float(np.mean(found))


@pytest.mark.parametrize("every", [1, 3, 10, 11, 30, 100])
def test_the_mean_is_that_of_the_last_ten(every: int) -> None:
    due, measured = next_evaluated(every), StepCosines(next_evaluated(every))
    for step in range(1, STEPS + 1):
        measured.add(step, torch.from_numpy(GRADIENTS[step - 1]))
        if due(step) == step:
            assert measured.mean(step) == (None if step == 1 else pytest.approx(
                mean_of_ten(GRADIENTS, step), rel=1e-6))


@pytest.mark.parametrize("every", [3, 30])
@pytest.mark.parametrize("at", [1, 2, 7, 25, 30, 64])
def test_a_resumed_run_has_the_same_values(every: int, at: int) -> None:
    measured, means = StepCosines(next_evaluated(every)), []
    resumed, means_after = measured, []
    for step in range(1, STEPS + 1):
        gradient = torch.from_numpy(GRADIENTS[step - 1])
        measured.add(step, gradient)
        means.append(measured.mean(step))
        if step > at:
            resumed.add(step, gradient)
            means_after.append(resumed.mean(step))
        elif step == at:
            resumed = StepCosines(next_evaluated(every))
            kept = measured.previous
            resumed.load_state(json.loads(json.dumps(measured.state())),
                               None if kept is None else kept.clone())
    assert means_after == means[at:]


def test_without_all_ten_there_is_no_mean() -> None:
    """As after a resume that evaluates at steps that were not to be."""
    measured, known = StepCosines(next_evaluated(1)), []
    for step in range(30, 60):
        measured.add(step, torch.from_numpy(GRADIENTS[step]))
        known.append(measured.mean(step) is not None)
    assert known == [False] * 10 + [True] * 20


def test_only_gradients_before_an_evaluation_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []

    def spy(a: Tensor, b: Tensor) -> Tensor:
        compared.append(step)
        return torch.zeros(())

    monkeypatch.setattr(cosines, "cosine", spy)
    measured, kept = StepCosines(next_evaluated(30)), []
    for step in range(1, STEPS + 1):
        measured.add(step, torch.from_numpy(GRADIENTS[step - 1]))
        kept += [step] if measured.previous is not None else []
    assert compared == [*range(21, 31), *range(51, 61), *range(61, 66)]
    assert kept == [*range(20, 30), *range(50, 66)]


def test_the_cosine_of_long_vectors_is_exact_enough() -> None:
    a, b = (torch.randn(30 * cosines.SLICE["cpu"] + 5, generator=torch.Generator().manual_seed(k))
            for k in (1, 2))
    a += 0.3 * b + 0.1
    x, y = a.double().numpy(), b.double().numpy()
    assert float(cosines.cosine(a, b)) == pytest.approx(
        x @ y / np.sqrt((x @ x) * (y @ y)), rel=1e-5)
    assert float(cosines.cosine(a, torch.zeros_like(a))) == 0


def test_a_central_run_records_it(run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: list[np.ndarray] = []
    train = Client.train

    def spy(self: Client, *args: object) -> object:
        losses = train(self, *args)  # type: ignore[arg-type]
        gradients.append(self.flat.grad.numpy().copy())
        return losses

    monkeypatch.setattr(Client, "train", spy)
    outcome = run_here("central", "--rounds", 14, "--val_freq", 6)
    assert outcome.code == 0, outcome.output
    assert [r["step"] for r in outcome.history] == [1, 6, 12, 14]
    found = [r["grad_cosine_mean10"] for r in outcome.history]
    assert found[0] is None
    assert found[1:] == pytest.approx([mean_of_ten(np.array(gradients), step)
                                       for step in (6, 12, 14)], rel=1e-5)
    a, b = (gradients[step - 1].astype(float) for step in (12, 14))
    assert outcome.history[-1]["grad_cosine"] == pytest.approx(
        a @ b / np.sqrt((a @ a) * (b @ b)), rel=1e-4), "of the records, as before"

"""Gradients of single sequences, clipped, summed in integers, with noise: against loops by hand,
and how far one sequence can move them."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from fedrun.config import FederatedConfig
from fedrun.federation.client import Client
from fedrun.federation.private_gradient import PrivateGradient, poisson_sample
from fedrun.model.base import Model
from fedrun.model.config import ModelConfig, TransformersShape
from fedrun.model.mamba2 import Mamba2LM
from fedrun.model.transformers_lm import TransformersLM, build
from fedrun.privacy.discrete_gaussian import DiscreteGaussian
from fedrun.privacy.example_level import ExampleLevel
from fedrun.secure.noise import Keystream, NoiseKey, stream
from fedrun.training.optimizer import LocalOptimizer
from fedrun.training.params import FlatParams
from tests.support.private import EXAMPLE, private_config

LAYERS = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32,
          "num_attention_heads": 2, "max_position_embeddings": 24}
MODELS: dict[str, ModelConfig | dict[str, Any]] = {
    "mamba2 tied": ModelConfig(n_layer=2, d_model=32, d_state=16, headdim=16),
    "mamba2 untied": ModelConfig(n_layer=1, d_model=32, d_state=16, headdim=16, ngroups=2,
                                 tie_embeddings=False),
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 24},
    "llama": LAYERS | {"model_type": "llama"},
    "gemma2": LAYERS | {"model_type": "gemma2", "head_dim": 8, "num_key_value_heads": 1,
                        "final_logit_softcapping": 30.0}}
KEY = bytes(range(32))
SHARD = np.arange(3, 40, 3)  # 13 sequences of 40
BATCH = 4


def new_model(name: str) -> Model:
    """A small model whose predictions are no longer all alike."""
    shape = MODELS[name]
    model: Any
    if isinstance(shape, ModelConfig):
        model = Mamba2LM(shape, 50)
        model.init_weights(0)
    else:
        model = TransformersLM(build(TransformersShape(shape), 50, 0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2)
    found: Model = model
    return found


class Setting:
    """A client of a model, and what makes its gradients."""

    def __init__(self, name: str = "mamba2 tied", clip: float = 0.5, noise: float = 1.5) -> None:
        self.model: Model = new_model(name)
        self.flat = FlatParams(self.model)
        config = private_config(**(EXAMPLE | {"batch_size": BATCH}))
        assert isinstance(config, FederatedConfig)
        random = np.random.default_rng(5)
        self.sequences = random.integers(0, 50, (40, 12)).astype(np.uint16)
        self.level = ExampleLevel(clip, noise, self.flat.size, BATCH, 1, (BATCH / len(SHARD),))
        self.client = Client(0, SHARD, self.sequences, self.flat, config,
                             LocalOptimizer(self.flat, config, 9))
        self.gradients = PrivateGradient(self.level, self.flat)

    def gradient(self, key: bytes = KEY) -> np.ndarray:
        self.gradients.begin(key)
        self.gradients.write(self.model, self.client)
        return self.flat.grad.numpy().copy()

    def alone(self, number: int) -> np.ndarray:
        """The gradient of one sequence's mean loss, by autograd through the logits."""
        ids = torch.from_numpy(self.sequences[number:number + 1].astype(np.int64))
        logits = self.model(ids)[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        named = dict(self.model.named_parameters())
        grads = torch.autograd.grad(loss, list(named.values()))
        by_name = dict(zip(named, grads, strict=True))
        return torch.cat([by_name[name].flatten() for name in sorted(by_name)]).numpy()

    def integers(self, *numbers: int) -> list[int]:
        """The sum of these of all sequences, in grid steps."""
        positions = np.array([SHARD.tolist().index(number) for number in numbers], np.int64)
        self.gradients._add_up(self.model, self.client, positions)
        return self.gradients._sum.tolist()


def in_step(setting: Setting, key: bytes = KEY) -> list[int]:
    """Which sequences, by comparing every word of the stream with a fraction."""
    words = np.frombuffer(stream(NoiseKey(key).round_key({"of": "sample"}), 0).read(
        8 * len(SHARD)), "<u8")
    return [number for number, word in zip(SHARD.tolist(), map(int, words), strict=True)
            if Fraction(word, 2**64) < Fraction(math.floor(Fraction(
                BATCH * 2**64, len(SHARD))), 2**64)]


@pytest.mark.parametrize("name", ["mamba2 tied", "llama", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("mamba2 untied", "gpt2", "gemma2"))])
def test_a_gradient_by_hand_equals_the_one_that_is_made(name: str) -> None:
    """Of sequences one by one through autograd: to rounding; then, from the clipped gradients that
    fedrun has, with Python's integers: to the bit."""
    setting = Setting(name, clip=0.3)
    made, chosen = setting.gradient(), in_step(setting)
    assert len(chosen) > 1
    clipped, by_hand = [], np.zeros(setting.flat.size)
    for number in chosen:
        setting.model.compute_grad(torch.from_numpy(
            setting.sequences[number:number + 1].astype(np.int64)))
        own, exact = setting.flat.grad.numpy().copy(), setting.alone(number).astype(np.float64)
        np.testing.assert_allclose(own, exact, atol=2e-5 * np.abs(exact).max())
        length = math.sqrt(math.fsum(x * x for x in map(float, own)))
        assert length == pytest.approx(float(np.linalg.norm(exact)), rel=1e-4)
        assert length > 0.3, "it is clipped"
        clipped.append(own * np.float32(0.3 / length))
        by_hand += exact * (0.3 / np.linalg.norm(exact))
    scale = 2 ** (26 - math.ceil(math.log2(0.3 * 1.5)))
    total = [0] * setting.flat.size
    for own in clipped:
        total = [a + round(x * scale) for a, x in zip(total, map(float, own), strict=True)]
    assert setting.integers(*chosen) == total
    np.testing.assert_allclose(np.array(total) / scale, by_hand, atol=1e-4)
    digest = hashlib.sha256(np.array(total, "<i8").tobytes()).hexdigest()
    key = NoiseKey(KEY).round_key({"of": "noise", "sum": digest})
    sigma = 1.5 * (0.3 * scale * (1 + 2**-20) + math.sqrt(setting.flat.size) / 2)
    sampler = DiscreteGaussian(Fraction(math.ceil(sigma**2 + 4)))
    noise = np.concatenate([sampler.sample(stream(key, block), min(65536, len(total) - start))
                            for block, start in enumerate(range(0, len(total), 65536))])
    noised = np.array([a + b for a, b in zip(total, map(int, noise), strict=True)])
    expected = noised.astype(np.float32) * np.float32(1 / (scale * BATCH))
    assert np.array_equal(made, expected)
    assert setting.gradients.norm == pytest.approx(float(np.linalg.norm(made)))


def test_a_sequence_that_is_left_out_moves_the_integers_by_no_more_than_the_claim() -> None:
    setting = Setting(clip=0.2, noise=0.4)
    moved = []
    for number in SHARD[:2].tolist():
        others = [other for other in SHARD.tolist() if other != number]
        with_it = np.array(setting.integers(*others, number))
        moved.append(float(np.linalg.norm(with_it - np.array(setting.integers(*others)))))
        assert with_it.tolist() == setting.integers(*SHARD.tolist()), "in whatever order"
    assert max(moved) <= setting.level.sensitivity
    assert max(moved) > 0.999 * setting.level.sensitivity, "the claim is no larger than it is"


def test_a_gradient_that_is_not_finite_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting()
    compute = type(setting.model).compute_grad

    def broken(self: Any, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
        found = compute(self, ids)
        if ids[0].tolist() == setting.sequences[9].tolist():
            setting.flat.grad[17] = math.nan
        return found

    without = setting.integers(3, 12)
    monkeypatch.setattr(type(setting.model), "compute_grad", broken)
    assert setting.integers(3, 9, 12) == without


def test_an_empty_step_is_noise_over_the_fixed_denominator(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting()
    key = next(bytes([n]) * 32 for n in range(256) if not in_step(setting, bytes([n]) * 32))
    gradient = setting.gradient(key)
    spread = float(gradient.std())
    assert spread == pytest.approx(1.5 * 0.5 / BATCH, rel=0.02)
    assert setting.level.element == pytest.approx(spread, rel=0.02)
    assert setting.level.snr(setting.gradients.norm) < 0.1


def test_keys_go_on_from_step_to_step_and_from_what_was_summed() -> None:
    setting = Setting()
    first = setting.gradient()
    after = setting.gradients.key
    second = setting.gradient(after)
    assert not np.array_equal(first, second)
    assert np.array_equal(setting.gradient(), first), "the same again"
    assert setting.gradients.key == after
    setting.sequences[in_step(setting)[0], 3] += 1
    assert not np.array_equal(setting.gradient(), first)
    other = setting.gradients.key
    assert other != after, "other integers: another noise, and another key of the next step"


def test_samples_are_binomial_and_independent_of_one_another() -> None:
    """4,000 steps on 60 sequences at rate 1/6: sizes by chi-square, each sequence's count, and
    each pair's."""
    draws = 4000
    taken = np.zeros((draws, 60), np.int64)
    for step in range(draws):
        key = NoiseKey(KEY).round_key({"step": step})
        taken[step, poisson_sample(stream(key, 0), 10, 60)] = 1
    sizes = np.bincount(taken.sum(1), minlength=61)
    expected = [draws * math.comb(60, n) * (1 / 6)**n * (5 / 6)**(60 - n)
                for n in range(61)]
    low, high = 4, 17
    cells = [(sizes[:low].sum(), sum(expected[:low])), (sizes[high:].sum(), sum(expected[high:])),
             *zip(sizes[low:high], expected[low:high], strict=True)]
    chi_square = sum((found - count)**2 / count for found, count in cells)
    assert chi_square < 36, "14 degrees of freedom: once in a thousand"
    sigma = math.sqrt(draws * 5 / 36)
    assert np.abs(taken.sum(0) - draws / 6).max() < 4 * sigma
    together = taken.T @ taken - np.diag(taken.sum(0))
    assert np.abs(together[~np.eye(60, dtype=bool)] - draws / 36).max() < 4.7 * math.sqrt(
        draws * 35) / 36
    assert (sizes > 0).sum() > 10, "not one size"


def test_at_a_rate_of_one_all_are_taken() -> None:
    assert poisson_sample(Keystream(KEY, bytes(12)), 7, 7).tolist() == list(range(7))


def test_the_threshold_is_exact() -> None:
    """A word below floor(q 2^64) is in, the one at it is not."""
    edge = 2**64 // 3
    assert poisson_sample(Words(edge - 1, edge, 0), 1, 3).tolist() == [0, 2]
    edge = 2 * 2**64 // 3
    assert poisson_sample(Words(edge, edge - 1, 2**64 - 1), 2, 3).tolist() == [1]


class Words:
    """A stream of these."""

    def __init__(self, *words: int) -> None:
        self._raw = np.array(words, "<u8").tobytes()

    def read(self, size: int) -> bytes:
        assert size == len(self._raw)
        return self._raw

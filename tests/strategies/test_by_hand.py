"""Rounds by hand, in plain torch and float64, equal rounds of fedrun."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedrun.data.tokens import TokenData, prepare
from fedrun.flags import resolve
from fedrun.model.config import ModelConfig
from fedrun.model.mamba2 import Mamba2LM
from tests.support.fed_avg_by_hand import (
    CLIENTS,
    LENGTH,
    LOCAL_UPDATES,
    ROUNDS,
    fed_avg_by_hand,
)
from tests.support.runs import CORPUS, OF_SMALL, Run


@pytest.fixture(scope="module")
def data(cache_dir: Path) -> TokenData:
    return prepare(str(CORPUS), "bpe:400", LENGTH, cache_dir, OF_SMALL)


def by_hand(data: TokenData) -> dict[str, torch.Tensor]:
    shape = ModelConfig(n_layer=2, d_model=64, d_state=16, headdim=16)
    assert resolve("fed_avg", {"config": "tiny"}).model == shape
    model = Mamba2LM(shape, data.vocab_size)
    model.init_weights(0)
    return fed_avg_by_hand(model.double(), lambda client, tokens: client(tokens), data.train)


def test_rounds_by_hand_equal_rounds_of_fedrun(run: Run, data: TokenData) -> None:
    expected = by_hand(data)
    flags = ("--rounds", ROUNDS, "--num_clients", CLIENTS, "--local_updates", LOCAL_UPDATES)
    for dtype, tolerance in (("fp64", 1e-9), ("fp32", 1e-4)):
        outcome = run("fed_avg", *flags, "--dtype", dtype, name=dtype)
        assert outcome.code == 0, outcome.output
        assert outcome.config["dtype"] == dtype
        for name, value in outcome.model.items():
            torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=tolerance)

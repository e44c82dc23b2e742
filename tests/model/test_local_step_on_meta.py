"""A whole local step on the meta device, where tensors have shapes but no values.

Without a GPU, this finds what would be slow or wrong on one: tensors created on another device
(mixing them with meta tensors is an error), and every place where the host waits for a value
(`.item()`, `bool()`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedrun.config import FederatedConfig
from fedrun.federation.client import Client
from fedrun.flags import resolve
from fedrun.model.config import ModelConfig
from fedrun.model.mamba2 import Mamba2LM
from fedrun.strategies.fed_fisher import FedFisher
from fedrun.training.fisher import FisherEstimate
from fedrun.training.optimizer import LocalOptimizer
from fedrun.training.params import FlatParams

SEQUENCES = np.zeros((12, 24), dtype=np.uint16)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fisher", [None, "batch", "sequence", "corrected"])
def test_training_fisher_and_entropy_touch_no_value(
        monkeypatch: pytest.MonkeyPatch, compute_dtype: torch.dtype, fisher: str | None) -> None:
    config = resolve("fed_fisher", {"config": "tiny", "grad_clip": "1.0", "prox_mu": "0.1"})
    assert isinstance(config, FederatedConfig)
    assert isinstance(config.model, ModelConfig)
    with torch.device("meta"):
        model = Mamba2LM(config.model, 50, compute_dtype=compute_dtype)
    flat = FlatParams(model)
    assert flat.vector.is_meta
    optimizer = LocalOptimizer(flat, config, 10)
    # torch's fused AdamW has no meta kernel. Its foreach implementation replaces it here; that one
    # keeps the step count on the CPU.
    monkeypatch.setattr("fedrun.training.optimizer.ADAMW_IMPLEMENTATION", {"foreach": True})
    moments = {name: torch.zeros_like(flat.vector) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state = {"step": torch.zeros(()), **moments}
    client = Client(0, np.arange(12), SEQUENCES, flat, config, optimizer)
    estimate = None
    if fisher:
        settings: dict[str, Any] = {"fisher": fisher}
        estimate = FisherEstimate(flat, FedFisher(**settings).fisher_settings)
    losses = client.train(model, 2, 0, anchor=torch.empty_like(flat.vector), prox_mu=0.1,
                          fisher=estimate)
    assert losses.loss_sum.is_meta
    assert losses.tokens == 2 * 4 * 23
    if estimate:
        assert estimate.finish().is_meta
    entropy, tokens = model.entropy(client.next_batch())
    assert entropy.is_meta
    assert tokens == 4 * 23
    with pytest.raises(RuntimeError, match="meta"):
        losses.loss_sum.item()  # what a wait for a value would raise

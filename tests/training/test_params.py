"""A model as one vector: views, sorted names, tied weights once."""

from __future__ import annotations

import torch
from torch import nn

from fedrun.flags import resolve
from fedrun.model.config import ModelConfig
from fedrun.model.mamba2 import Mamba2LM
from fedrun.training.optimizer import LocalOptimizer
from fedrun.training.params import FlatParams

CONFIG = ModelConfig(n_layer=2, d_model=32, d_state=8, headdim=8)


def model() -> Mamba2LM:
    made = Mamba2LM(CONFIG, 50)
    made.init_weights(0)
    return made


def test_the_vector_holds_every_parameter_once_in_sorted_order() -> None:
    plain = model()
    flat = FlatParams(model())
    expected = torch.cat([p.detach().flatten() for _, p in sorted(plain.named_parameters())])
    assert torch.equal(flat.vector, expected)
    assert flat.size == sum(p.numel() for p in plain.parameters())
    assert sum(s.name.endswith(("embedding.weight", "lm_head.weight")) for s in flat.slices) == 1


def test_gradients_and_an_optimizer_step_equal_those_of_the_plain_module() -> None:
    plain, ours = model(), model()
    flat = FlatParams(ours)
    tokens = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.01)
    config = resolve("fed_avg", {"lr": "1e-2", "weight_decay": "0.01"})
    optimizer = LocalOptimizer(flat, config, total_steps=3)
    for number in range(3):
        reference.zero_grad()
        loss, count = plain.loss(tokens)
        (loss / count).backward()
        reference.step()
        flat.grad.zero_()
        loss, count = ours.loss(tokens)
        (loss / count).backward()
        optimizer.step(number)
    for (name, p), (other, q) in zip(sorted(plain.named_parameters()),
                                     sorted(ours.named_parameters()), strict=True):
        assert name == other
        torch.testing.assert_close(q, p, rtol=0, atol=1e-6)
        assert q.grad is not None
        assert q.grad.untyped_storage().data_ptr() == flat.grad.untyped_storage().data_ptr()
        assert q.untyped_storage().data_ptr() == flat.vector.untyped_storage().data_ptr()


def test_views_of_any_vector_have_the_parameters_shapes() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1, bias=False))
    flat = FlatParams(module)
    numbers = torch.arange(flat.size, dtype=torch.float32)
    views = dict(flat.views(numbers))
    assert {name: tuple(v.shape) for name, v in views.items()} == {
        "0.bias": (2,), "0.weight": (2, 3), "1.weight": (1, 2)}
    assert torch.equal(torch.cat([v.flatten() for v in views.values()]), numbers)

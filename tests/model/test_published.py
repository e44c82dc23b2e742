"""The models that state-spaces has published: presets of their shapes, and a start from weights in
such a folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedrun import cli
from fedrun.flags import resolve
from fedrun.model.config import ModelConfig
from fedrun.model.convert import to_transformers, to_transformers_config
from fedrun.model.mamba2 import Mamba2LM
from fedrun.model.pretrained import from_mamba_ssm_config
from tests.support.runs import Run

transformers = pytest.importorskip("transformers")

# The only fields in which the config.json of the five differ, and their numbers of parameters.
SHAPES = {"130m": (768, 24, 128_989_632), "370m": (1024, 48, 368_346_624),
          "780m": (1536, 48, 780_161_280), "1_3b": (2048, 48, 1_343_757_312),
          "2_7b": (2560, 64, 2_702_599_680)}
TOKENS, ROWS = 50277, 50288  # of GPT-NeoX's tokenizer; of the embedding


def hub_config(d_model: int, n_layer: int, vocab_size: int = TOKENS) -> dict[str, Any]:
    """config.json of state-spaces/mamba2-130m, with these fields."""
    return {"d_model": d_model, "d_intermediate": 0, "n_layer": n_layer, "vocab_size": vocab_size,
            "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True,
            "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16,
            "tie_embeddings": True}


def preset(name: str) -> ModelConfig:
    config = resolve("fed_avg", {"config": f"mamba2_{name}"})
    assert config.tokenizer == "EleutherAI/gpt-neox-20b"
    assert isinstance(config.model, ModelConfig)
    return config.model


@pytest.mark.parametrize("name", SHAPES)
def test_a_preset_has_the_published_shape(name: str) -> None:
    """Counted by hand and in tensors without memory, ours and those of transformers."""
    d, layers, count = SHAPES[name]
    shape = preset(name)
    assert (replace(shape, pad_vocab_multiple=1), shape.rows(TOKENS)) == from_mamba_ssm_config(
        hub_config(d, layers))
    heads, conv = d // 32, 2 * d + 2 * 128
    block = (d * (2 * d + conv + heads) + 2 * d * d  # in_proj, out_proj
             + conv * (4 + 1) + 3 * heads + 2 * d + d)
    assert count == ROWS * d + layers * block + d == shape.parameters(ROWS)
    with torch.device("meta"):
        ours = Mamba2LM(shape, ROWS)
        theirs = transformers.Mamba2ForCausalLM(to_transformers_config(shape, ROWS))
    assert ours.lm_head.weight is ours.backbone.embedding.weight
    for model in (ours, theirs):
        assert sum(p.numel() for p in model.parameters()) == count
    assert {name: p.shape for name, p in to_transformers(dict(ours.named_parameters())).items()
            } == {name: p.shape for name, p in theirs.named_parameters()}


@pytest.mark.slow
def test_130m_computes_what_transformers_computes() -> None:
    """On random weights, which both models share: 0.5 GB."""
    shape = preset("130m")
    ours = Mamba2LM(shape, ROWS)
    ours.init_weights(0)
    with torch.device("meta"):
        theirs = transformers.Mamba2ForCausalLM(to_transformers_config(shape, ROWS)).eval()
    theirs.load_state_dict(to_transformers(ours.state_dict()), assign=True)
    ids = torch.randint(TOKENS, (1, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).logits
        assert expected.std() > 0.1, "logits that say something"
        torch.testing.assert_close(ours(ids), expected, rtol=0, atol=2e-5)
        loss, count = ours.loss(ids)
    cross_entropy = torch.nn.functional.cross_entropy(expected[0, :-1], ids[0, 1:])
    assert float(loss) / count == pytest.approx(float(cross_entropy), rel=1e-6)


@pytest.mark.slow
def test_continued_training_begins_at_the_published_weights(run_here: Run, tmp_path: Path) -> None:
    """With a folder such as the hub has, without a tokenizer and in half precision: a small
    learning rate with a warm-up begins at its perplexity and ends below it."""
    (tmp_path / "shape.yaml").write_text("model: {n_layer: 2, d_model: 64, pad_vocab_multiple: 16}")
    source = run_here("central", "--config", tmp_path / "shape.yaml", "--tokenizer", "bpe:390",
                      "--rounds", 60, "--lr", "4e-3", "--val_freq", 60, name="source")
    assert source.code == 0, source.output
    hub = tmp_path / "mamba2-tiny"
    assert cli.main(["export", str(source.run_dir), "--to", "mamba_ssm", str(hub)]) == 0
    for path in hub.iterdir():
        if path.name != "pytorch_model.bin":
            path.unlink()
    (hub / "config.json").write_text(json.dumps(hub_config(64, 2, 390)))
    weights = torch.load(hub / "pytorch_model.bin", weights_only=True)
    torch.save({name: t.half() for name, t in weights.items()}, hub / "pytorch_model.bin")

    recipe = ("fed_avg", "--init_from", hub, "--tokenizer", source.run_dir / "tokenizer",
              "--num_clients", 2, "--local_updates", 4, "--rounds", 8, "--lr", "4e-4", "--warmup",
              8, "--lr_schedule", "cosine", "--grad_clip", 1)
    done = run_here(*recipe)
    assert done.code == 0, done.output
    there, (first, *_, last) = source.history[-1]["val_ppl"], [
        record["server_val_ppl"] for record in done.history]
    assert first == pytest.approx(there, rel=0.01)
    assert last < 0.99 * there
    other = run_here(*recipe, "--tokenizer", "bpe:500", name="other")
    assert other.code == 2
    assert "bpe:500: has 500 tokens, more than the 400 of --init_from" in other.output

"""Folders of transformers models as a start: read, refused, trained further."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedrun import cli
from fedrun.common.errors import InputError
from fedrun.data.tokenizer import load_without_custom_code
from fedrun.data.tokens import prepare
from fedrun.flags import resolve
from fedrun.library.evaluation import evaluate
from fedrun.model.config import TransformersShape
from fedrun.model.pretrained import find_pretrained
from fedrun.model.transformers_config import library_config
from fedrun.model.transformers_lm import build
from fedrun.records.provenance import differing_settings
from tests.support.runs import CORPUS, Run, error_lines

GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}
LLAMA = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
MAMBA = {"model_type": "mamba", "num_hidden_layers": 1, "hidden_size": 32, "state_size": 4}
Make = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, cache_dir: Path) -> Make:
    """A model of the library in a folder as the library saves it, with a tokenizer."""
    data = prepare(str(CORPUS), "bpe:400", 32, cache_dir)

    def make(settings: dict[str, Any] = GPT2, name: str = "model", rows: int = 410,
             **save: Any) -> Path:
        lm = build(TransformersShape(settings), rows, 5)
        lm.save_pretrained(tmp_path / name, **save)
        shutil.copyfile(data.tokenizer_path / "tokenizer.json", tmp_path / name / "tokenizer.json")
        return tmp_path / name

    return make


def change(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("settings", [
    GPT2, pytest.param(LLAMA, marks=pytest.mark.slow), pytest.param(MAMBA, marks=pytest.mark.slow)],
    ids=["gpt2", "llama", "mamba"])
def test_a_run_starts_from_it(run_here: Run, folder: Make, settings: dict[str, Any]) -> None:
    """With a vanishing learning rate the first round leaves the model where it was; the run's own
    folder is a start as well."""
    start = folder(settings)
    before = {name: p.detach() for name, p in find_pretrained(str(start), "RUN").build(
        ).named_parameters()}
    done = run_here("fed_avg", "--init_from", start, "--num_clients", 2, "--rounds", 1, "--lr",
                    "1e-12", "--weight_decay", "0")
    assert done.code == 0, done.output
    assert done.model.keys() == before.keys()
    for name, tensor in done.model.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-9)
    recorded = done.config["model"]["transformers"]
    assert recorded["model_type"] == settings["model_type"]
    assert "vocab_size" not in recorded
    # A study compares runs with settings whose --init_from has not been looked at.
    asked = resolve("fed_avg", {"init_from": str(start)})
    assert not [name for name in differing_settings(asked, done.config) if "model" in name]
    again = run_here("central", "--init_from", done.run_dir, "--rounds", 1, name="again")
    assert again.code == 0, again.output
    assert again.config["model"] == done.config["model"]
    resumed = run_here("fed_avg", "--init_from", start, "--num_clients", 2, "--rounds", 2, "--lr",
                       "1e-12", "--weight_decay", "0", after=done)
    assert "resuming from step 1" in resumed.output, resumed.output


def test_it_is_evaluated_as_the_library_evaluates_it(folder: Make, cache_dir: Path) -> None:
    start = folder()
    found = evaluate(find_pretrained(str(start), "RUN"), str(CORPUS), "validation",
                     cache_dir=cache_dir)
    assert found["sequence_length"] == 64  # all its positions
    data = prepare(str(CORPUS), "bpe:400", 64, cache_dir)
    lm = build(TransformersShape(GPT2), 410, 5)
    total = count = 0.0
    with torch.no_grad():
        for first in range(0, len(data.validation), 16):
            ids = torch.from_numpy(data.validation[first:first + 16].astype("int64"))
            total += float(lm(input_ids=ids, labels=ids).loss) * ids[:, 1:].numel()
            count += ids[:, 1:].numel()
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("save", [{"max_shard_size": "20KB"}, {}], ids=["sharded", "whole"])
def test_sharded_weights_and_those_without_the_heads_prefix(folder: Make, tmp_path: Path,
                                                           save: dict[str, Any]) -> None:
    """As the first GPT-2 on the hub, whose names have no `transformer.`."""
    start = folder(**save)
    expected = {name: p.detach() for name, p in build(
        TransformersShape(GPT2), 410, 5).named_parameters()}
    if save:
        assert len(list(start.glob("*.safetensors"))) > 1
    else:
        weights = load_file(start / "model.safetensors")
        save_file({name.removeprefix("transformer."): t for name, t in weights.items()},
                  start / "model.safetensors", {"format": "pt"})
    found = dict(find_pretrained(str(start), "RUN").build().named_parameters())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert found.keys() == expected.keys()


def test_dropout_is_refused_for_training_alone(run_here: Run, folder: Make, cache_dir: Path,
                                               ) -> None:
    start = folder()
    model, text = str(start), (str(CORPUS), "validation")
    plain = evaluate(find_pretrained(model, "RUN"), *text, cache_dir=cache_dir)
    change(start, resid_pdrop=0.1)
    outcome = run_here("fed_avg", "--init_from", start, "--rounds", 1)
    assert outcome.code == 2
    assert error_lines(outcome.output)[-1].endswith(
        f"--init_from {start}: resid_pdrop 0.1: must be 0: training has no dropout")
    assert evaluate(find_pretrained(model, "RUN"), *text, cache_dir=cache_dir) == plain


def spoil_shape(start: Path) -> None:
    change(start, n_layer=3)


def spoil_width(start: Path) -> None:
    change(start, n_embd=64)


def leave_over(start: Path) -> None:
    change(start, n_layer=1)


def cut(start: Path) -> None:
    path = start / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def pickled(start: Path) -> None:
    torch.save(load_file(start / "model.safetensors"), start / "pytorch_model.bin")
    (start / "model.safetensors").unlink()


@pytest.mark.parametrize(("spoil", "message"), [
    (spoil_shape, "do not belong together: transformer.h.2."),
    (leave_over, "do not belong together: transformer.h.1."), (spoil_width, "weights"),
    (cut, "cannot read the weights"), (pickled, "cannot read the weights")])
def test_weights_that_cannot_be_used_are_a_line(folder: Make, spoil: Callable[[Path], None],
                                                message: str) -> None:
    start = folder()
    spoil(start)
    with pytest.raises(InputError) as raised:
        find_pretrained(str(start), "RUN").build()
    assert str(raised.value).startswith(f"{start}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["gpt2", "of_their_own"])
def test_no_code_of_a_folder_is_run(folder: Make, tmp_path: Path, kind: str) -> None:
    start, trace = folder(), tmp_path / "was_run"
    for module in ("modeling_x", "configuration_x"):
        (start / f"{module}.py").write_text(f"open({str(trace)!r}, 'w').close()\n"
                                            "class X: pass\nclass Y: pass\n")
    (start / "custom_generate").mkdir()
    (start / "custom_generate" / "generate.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    change(start, model_type=kind, auto_map={"AutoConfig": "configuration_x.X",
                                             "AutoModelForCausalLM": "modeling_x.Y"})
    if kind == "gpt2":
        find_pretrained(str(start), "RUN").build()
    else:
        with pytest.raises(InputError, match="no such architecture"):
            find_pretrained(str(start), "RUN")
    assert not trace.exists()


def test_buffers_that_a_run_would_not_keep_are_refused(folder: Make) -> None:
    """Deepseek's bias of its experts is one: it is kept, and is no parameter."""
    settings = {"model_type": "deepseek_v3", "num_hidden_layers": 2, "hidden_size": 32,
                "intermediate_size": 32, "moe_intermediate_size": 16, "num_attention_heads": 2,
                "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2,
                "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8,
                "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
                "max_position_embeddings": 64}
    start = folder(settings)
    find_pretrained(str(start), "RUN").build()
    weights = load_file(start / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("e_score_correction_bias")]
    weights[name] += 1
    save_file(weights, start / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="e_score_correction_bias is no parameter"):
        find_pretrained(str(start), "RUN").build()


def test_what_is_exported_is_a_start_again(run_here: Run, folder: Make, tmp_path: Path) -> None:
    start = folder(LLAMA)
    change(start, pad_token_id=399)  # which is there, but not in a vocabulary of a few rows
    done = run_here("fed_avg", "--init_from", start, "--num_clients", 2, "--rounds", 1)
    assert done.code == 0, done.output
    out = tmp_path / "out"
    assert cli.main(["export", str(done.run_dir), "--to", "hf", str(out)]) == 0
    ours, theirs = (dict(find_pretrained(str(path), "RUN").build().named_parameters())
                    for path in (done.run_dir, out))
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    assert load_without_custom_code(out).vocab_size == 400
    assert library_config(TransformersShape(LLAMA), 410).vocab_size == 410

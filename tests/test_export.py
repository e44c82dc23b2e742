"""Models that leave and come back: exported folders, --init_from, generate, evaluate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import test_official_kernels
import torch
from conftest import CORPUS, ROOT, SMALL, Outcome, execute, torchrun
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from fedrun import cli
from fedrun.model.config import ModelConfig
from fedrun.model.mamba2 import Mamba2LM
from fedrun.pretrained import find_pretrained, from_mamba_ssm_config
from fedrun.terminal import visible

official_python = test_official_kernels.official_python
IDS = torch.randint(0, 400, (2, 37), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Outcome:
    """A run of two rounds."""
    data_dir = tmp_path_factory.mktemp("trained")
    code, output = execute([*torchrun(1), "-m", "fedrun", "fed_avg", *SMALL, "--rounds", "2",
                            "--data_dir", str(data_dir), "--cache_dir", str(cache_dir),
                            "--run_name", "run"])
    assert code == 0, output
    return Outcome(code, output, data_dir / "run")


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return find_pretrained(str(folder), "RUN").build()(IDS)


def test_hf_folder_loads_with_equal_logits(trained: Outcome, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    out = tmp_path / "hf"
    assert cli.main(["export", str(trained.run_dir), "--to", "hf", str(out)]) == 0
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), "every weight found, none left over"
    assert type(model).__name__ == "Mamba2ForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits(trained.run_dir), rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = "def once(upon): a time,"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert torch.equal(logits(out), logits(trained.run_dir))


def test_mamba_ssm_folder_has_what_its_loader_reads(trained: Outcome, tmp_path: Path) -> None:
    """MambaLMHeadModel.from_pretrained passes config.json to MambaConfig as it is, and loads
    pytorch_model.bin strictly, the tied head included."""
    out = tmp_path / "original"
    assert cli.main(["export", str(trained.run_dir), "--to=mamba_ssm", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    assert set(config) <= {"d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg",
                           "attn_layer_idx", "attn_cfg", "rms_norm", "residual_in_fp32",
                           "fused_add_norm", "pad_vocab_size_multiple", "tie_embeddings"}
    state = torch.load(out / "pytorch_model.bin", weights_only=True)
    assert set(state) == set(Mamba2LM(ModelConfig(n_layer=2), 8).state_dict())
    assert torch.equal(state["lm_head.weight"], state["backbone.embedding.weight"])
    assert torch.equal(logits(out), logits(trained.run_dir))
    assert (out / "tokenizer.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_mamba_ssm_itself_loads_it_with_equal_logits(trained: Outcome, tmp_path: Path,
                                                     official_python: Path) -> None:
    out = tmp_path / "original"
    assert cli.main(["export", str(trained.run_dir), "--to", "mamba_ssm", str(out)]) == 0
    code, output = execute([str(official_python), str(ROOT / "tests/official/load_export.py"),
                            str(out)], limit=110)
    assert code == 0, output
    with torch.no_grad():
        ours = find_pretrained(str(trained.run_dir), "RUN").build()(torch.arange(24)[None])
    torch.testing.assert_close(torch.tensor(json.loads(output.splitlines()[-1])), ours, rtol=0,
                               atol=1e-5)


@pytest.mark.parametrize(("form", "library"), [("hf", "transformers"), ("mamba_ssm", "mamba-ssm")])
def test_model_card(trained: Outcome, tmp_path: Path, form: str, library: str) -> None:
    import yaml
    out = tmp_path / "out"
    assert cli.main(["export", str(trained.run_dir), "--to", form, str(out)]) == 0
    _, front, card = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == library
    last = trained.history[-1]
    for said in (f"{last['server_val_ppl']:.2f}", f"{last['tokens']:,}", CORPUS.name, "fed_avg",
                 "4 clients", f"{sum(t.numel() for t in trained.model.values()):,} parameters"):
        assert said in card


@pytest.mark.parametrize(("form", "processes"), [("run", 1), ("mamba_ssm", 2)])
def test_training_starts_from_a_model(trained: Outcome, tmp_path: Path, cache_dir: Path, form: str,
                                          processes: int) -> None:
    """With a vanishing learning rate the first round leaves the model where it was."""
    start = trained.run_dir
    if form != "run":
        start = tmp_path / "start"
        assert cli.main(["export", str(trained.run_dir), "--to", form, str(start)]) == 0
    data = [flag for flag in SMALL if flag not in ("--tokenizer", "bpe:400", "--config", "tiny")]
    code, output = execute(
        [*torchrun(processes), "-m", "fedrun", "fed_avg", *data, "--lr", "1e-12",
         "--rounds", "1", "--init_from", str(start), "--data_dir", str(tmp_path), "--cache_dir",
         str(cache_dir)])
    assert code == 0, output
    outcome = Outcome(code, output, tmp_path / f"federated_config_{start.name}_lu_1_seed_0")
    for name, tensor in trained.model.items():
        torch.testing.assert_close(outcome.model[name], tensor, rtol=0, atol=1e-9)
    assert outcome.history[0]["server_val_ppl"] == pytest.approx(
        trained.history[-1]["server_val_ppl"], rel=1e-6)
    held = json.loads((outcome.run_dir / "config.json").read_text())
    assert held["model"] == json.loads((trained.run_dir / "config.json").read_text())["model"]
    text = "def once(upon): a time,\n"
    new, old = (Tokenizer.from_file(str(o.run_dir / "tokenizer" / "tokenizer.json"))
                for o in (outcome, trained))
    assert new.encode(text).ids == old.encode(text).ids


def test_evaluate_finds_the_perplexity_of_the_history(
        trained: Outcome, tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
        ) -> None:
    out = tmp_path / "hf"
    assert cli.main(["export", str(trained.run_dir), str(out)]) == 0
    capsys.readouterr()
    on_corpus = ["--dataset", str(CORPUS), "--sequence_length", "32"]
    for argv in ([str(trained.run_dir)], [str(out), *on_corpus]):
        assert cli.main(["evaluate", *argv, "--cache-dir", str(cache_dir)]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["perplexity"] == pytest.approx(trained.history[-1]["server_val_ppl"])
        assert result["split"] == "validation"
    text = tmp_path / "text.txt"
    text.write_text("def function(a): return a\n" * 400)
    assert cli.main(["evaluate", str(trained.run_dir), "--dataset", str(text), "--split", "train",
                     "--cache_dir", str(cache_dir)]) == 0
    other = json.loads(capsys.readouterr().out)
    assert (other["split"], other["dataset"]) == ("train", str(text))


def test_generate(trained: Outcome, capsys: pytest.CaptureFixture[str]) -> None:
    def text(*flags: str) -> str:
        assert cli.main(["generate", str(trained.run_dir), "--max_new_tokens", "20", *flags]) == 0
        return capsys.readouterr().out

    greedy = text("--prompt", "Once upon a time,")
    generated = visible(trained.history[-1]["generated"], keep="\n\t")
    assert greedy.startswith("Once upon a time,")
    assert generated.startswith(greedy.removeprefix("Once upon a time,").rstrip("\n\ufffd"))
    assert text("--temperature", "0.9", "--top_k", "1") == greedy
    drawn = text("--temperature", "1", "--seed", "5")
    assert drawn == text("--temperature", "1", "--seed", "5")
    assert drawn != text("--temperature", "1", "--seed", "6")


def test_forms_of_the_hub(tmp_path: Path) -> None:
    """The config files of state-spaces/mamba2-130m and AntonV/mamba2-130m-hf, with fewer layers."""
    original = {"d_model": 768, "d_intermediate": 0, "n_layer": 1, "vocab_size": 50277,
                "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [], "attn_cfg": {},
                "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
                "pad_vocab_size_multiple": 16, "tie_embeddings": True}
    shape = ModelConfig(n_layer=1, d_model=768)
    assert from_mamba_ssm_config(original) == (shape, 50288)
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "bos_token_id": 0,
        "chunk_size": 256, "conv_kernel": 4, "eos_token_id": 0, "expand": 2, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 768, "initializer_range": 0.1,
        "layer_norm_epsilon": 1e-05, "n_groups": 1, "num_heads": 24, "num_hidden_layers": 1,
        "pad_token_id": 0, "rescale_prenorm_residual": False, "residual_in_fp32": True,
        "rms_norm": True, "state_size": 128, "tie_word_embeddings": True, "time_step_floor": 0.0001,
        "time_step_limit": [0.0, float("inf")], "time_step_max": 0.1, "time_step_min": 0.001,
        "time_step_rank": 48, "torch_dtype": "float32", "use_bias": False, "use_cache": True,
        "use_conv_bias": True, "vocab_size": 50288}))
    found = find_pretrained(str(tmp_path), "RUN")
    assert (found.model, found.vocab_size, found.tokenizer) == (shape, 50288, None)


@pytest.mark.parametrize(("change", "said"), [
    ({"ssm_cfg": {"layer": "Mamba1"}}, "ssm_cfg.layer Mamba1"), ({"ssm_cfg": {}}, "Mamba1"),
    ({"attn_layer_idx": [3]}, "attn_layer_idx"), ({"tie_embeddings": False}, "tie_embeddings"),
    ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim"),
    ({"d_intermediate": 64}, "d_intermediate")])
def test_other_models_are_refused(change: dict[str, object], said: str) -> None:
    config = {"d_model": 64, "n_layer": 1, "vocab_size": 10, "ssm_cfg": {"layer": "Mamba2"}}
    with pytest.raises(ValueError, match=said):
        from_mamba_ssm_config(config | change)


def test_what_cannot_be_loaded(trained: Outcome, tmp_path: Path,
                               capsys: pytest.CaptureFixture[str]) -> None:
    def error(*argv: str) -> str:
        assert cli.main(list(argv)) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1, "one line"
        return text

    assert "no such folder" in error("generate", "/no/run/here")
    (tmp_path / "empty").mkdir()
    assert "there is no" in error("generate", str(tmp_path / "empty"))
    run = Path(shutil.copytree(trained.run_dir, tmp_path / "run"))
    assert "--top_k -1" in error("generate", str(run), "--top_k", "-1")
    assert "--device tpu9" in error("evaluate", str(run), "--device", "tpu9")
    assert "it is there already" in error("export", str(run), str(run))
    assert "would replace it" in error("fed_avg", "--init_from", str(run), "--data_dir",
                                       str(tmp_path), "--run_name", "run")
    shutil.rmtree(run / "tokenizer")
    assert "give --tokenizer" in error("export", str(run), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    weights = load_file(run / "model.safetensors")
    weights["backbone.norm_f.weight"] = torch.ones(3)
    save_file(weights, run / "model.safetensors")
    tokenizer = str(trained.run_dir / "tokenizer")
    assert "do not belong together" in error("generate", str(run), "--tokenizer", tokenizer)
    (run / "model.safetensors").write_bytes(b"torn")
    assert "model.safetensors" in error("generate", str(run), "--tokenizer", tokenizer)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
        trained: Outcome, tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
        ) -> None:
    run = Path(shutil.copytree(trained.run_dir, tmp_path / "run"))
    shutil.rmtree(run / "tokenizer")
    assert cli.main(["fed_avg", "--dataset", "pydocs", "--tokenizer", "bpe:500", "--init_from",
                     str(run), "--cache_dir", str(cache_dir), "--data_dir", str(tmp_path)]) == 2
    assert "--tokenizer bpe:500: its 500 tokens are more than the 400" in capsys.readouterr().err

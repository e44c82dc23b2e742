"""Models that leave and come back: exported folders, --init_from, generate, evaluate."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from fedrun import cli
from fedrun.common.terminal import visible
from fedrun.model.config import ModelConfig
from fedrun.model.mamba2 import Mamba2LM
from fedrun.model.pretrained import find_pretrained
from tests.support.prepared import run_ranks
from tests.support.runs import CORPUS, ROOT, SMALL, Outcome, execute, read_json

IDS = torch.randint(0, 400, (2, 37), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Outcome:
    """A run of two rounds."""
    data_dir = tmp_path_factory.mktemp("trained")
    code, output = run_ranks(1, ["fed_avg", *SMALL, "--rounds", "2", "--data_dir", str(data_dir),
                                 "--cache_dir", str(cache_dir), "--run_name", "run"], 250)
    assert code == 0, output
    return Outcome(code, output, data_dir / "run")


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        found = find_pretrained(str(folder), "RUN").build()(IDS)
    assert isinstance(found, Tensor)
    return found


def load_with_transformers(folder: Path) -> Any:
    """The model, whose weights are all found, with none left over."""
    from transformers import AutoModelForCausalLM
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, loading = loaded
    assert not any(loading.values())
    return model


def test_hf_folder_loads_with_equal_logits(trained: Outcome, tmp_path: Path) -> None:
    from transformers import AutoTokenizer
    out = tmp_path / "hf"
    assert cli.main(["export", str(trained.run_dir), "--to", "hf", str(out)]) == 0
    model = load_with_transformers(out)
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
    config = read_json(out / "config.json")
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
def test_the_model_card_has_the_numbers_of_the_history(
        trained: Outcome, tmp_path: Path, form: str, library: str) -> None:
    import yaml
    out = tmp_path / "out"
    assert cli.main(["export", str(trained.run_dir), "--to", form, str(out)]) == 0
    _, front, card = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == library
    last = trained.history[-1]
    for said in (f"{last['server_val_ppl']:.2f}", f"{last['tokens']:,}", CORPUS.name, "fed_avg",
                 "4 clients", f"{sum(t.numel() for t in trained.model.values()):,} parameters"):
        assert said in card


@pytest.mark.parametrize(("form", "processes"), [
    ("run", 1), pytest.param("mamba_ssm", 2, marks=pytest.mark.slow)])
def test_training_starts_from_a_model(trained: Outcome, tmp_path: Path, cache_dir: Path, form: str,
                                          processes: int) -> None:
    """With a vanishing learning rate the first round leaves the model where it was."""
    start = trained.run_dir
    if form != "run":
        start = tmp_path / "start"
        assert cli.main(["export", str(trained.run_dir), "--to", form, str(start)]) == 0
    data = [flag for flag in SMALL if flag not in ("--tokenizer", "bpe:400", "--config", "tiny")]
    code, output = run_ranks(
        processes, ["fed_avg", *data, "--lr", "1e-12", "--rounds", "1", "--init_from", str(start),
                    "--data_dir", str(tmp_path), "--cache_dir", str(cache_dir)], 250)
    assert code == 0, output
    outcome = Outcome(code, output, tmp_path / f"federated_config_{start.name}_lu_1_seed_0")
    for name, tensor in trained.model.items():
        torch.testing.assert_close(outcome.model[name], tensor, rtol=0, atol=1e-9)
    assert outcome.history[0]["server_val_ppl"] == pytest.approx(
        trained.history[-1]["server_val_ppl"], rel=1e-6)
    held = outcome.config
    assert held["model"] == trained.config["model"]
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
    copied = shutil.copyfile(CORPUS, tmp_path / "other.txt")
    on_other = ["--dataset", str(copied), "--sequence_length", "32", "--split", "validation"]
    found = []
    for argv in ([str(trained.run_dir)], [str(trained.run_dir), *on_other], [str(out), *on_other]):
        assert cli.main(["evaluate", *argv, "--cache-dir", str(cache_dir)]) == 0
        result = json.loads(capsys.readouterr().out)
        found.append(result["perplexity"])
        assert result["split"] == "validation"
    assert found[0] == pytest.approx(trained.history[-1]["server_val_ppl"])
    assert found[1] == pytest.approx(found[2])
    text = tmp_path / "text.txt"
    text.write_text("def function(a): return a\n" * 400)
    assert cli.main(["evaluate", str(trained.run_dir), "--dataset", str(text), "--split", "train",
                     "--cache_dir", str(cache_dir)]) == 0
    other = json.loads(capsys.readouterr().out)
    assert (other["split"], other["dataset"]) == ("train", str(text))


def test_evaluate_scores_all_of_the_text_that_is_given(
        trained: Outcome, tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
        ) -> None:
    def evaluate(*flags: str) -> tuple[int, str, str]:
        code = cli.main(["evaluate", str(trained.run_dir), "--cache_dir", str(cache_dir), *flags])
        return code, *capsys.readouterr()

    text = "".join(f"def function_{n}(a): return a + {n}\n" for n in range(60))
    (tmp_path / "held_out.txt").write_text(text)
    tokenizer = Tokenizer.from_file(str(trained.run_dir / "tokenizer" / "tokenizer.json"))
    tokens = sum(len(tokenizer.encode(line).ids) for line in text.splitlines(keepends=True))
    assert tokens % 32 > 1
    result = json.loads(evaluate("--dataset", str(tmp_path / "held_out.txt"))[1])
    assert (result["split"], result["tokens"]) == ("all", tokens - tokens // 32 - 1)
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("".join(
            json.dumps({"title": name, "body": line}) + "\n" for line in text.splitlines()))
    result = json.loads(evaluate("--dataset", str(folder), "--split", "test", "--text_column",
                                 "body")[1])
    assert (result["split"], result["tokens"]) == ("test", tokens // 32 * 31)
    code, _, said = evaluate("--split", "test")
    assert code == 2
    assert ("--split test: must be one of the dataset's splits other than train; it has train"
            in said)
    code, _, said = evaluate("--dataset", "")
    assert (code, "--dataset is empty" in said) == (2, True)


def test_generate_is_greedy_seeded_and_continues_the_prompt(
        trained: Outcome, capsys: pytest.CaptureFixture[str]) -> None:
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


@pytest.fixture(scope="module")
def unusual(trained: Outcome, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers model with a head of its own, biases and limits, and a tokenizer."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    model = Mamba2ForCausalLM(Mamba2Config(
        vocab_size=400, hidden_size=32, state_size=16, num_hidden_layers=2, head_dim=16,
        num_heads=4, n_groups=1, use_bias=True, use_conv_bias=False, layer_norm_epsilon=1e-4,
        tie_word_embeddings=False, time_step_limit=(0.005, 0.05)))
    for name, p in model.named_parameters():
        if name.endswith("proj.bias"):
            p.data.uniform_(-0.5, 0.5)
    folder = tmp_path_factory.mktemp("unusual")
    model.save_pretrained(folder)
    for file in (trained.run_dir / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


def unusual_flags(start: Path, data_dir: Path, cache_dir: Path, name: str, lr: str) -> list[str]:
    data = [flag for flag in SMALL if flag not in ("--tokenizer", "bpe:400", "--config", "tiny")]
    return ["fed_avg", *data, "--lr", lr, "--rounds", "2", "--init_from", str(start), "--data_dir",
            str(data_dir), "--cache_dir", str(cache_dir), "--run_name", name]


def test_an_unusual_model_is_trained_exported_and_loaded(
        unusual: Path, tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
        ) -> None:
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(unusual)
    with torch.no_grad():
        theirs = model(IDS, use_cache=False).logits
    torch.testing.assert_close(logits(unusual), theirs, rtol=1e-4, atol=1e-5)
    for name, lr in (("still", "1e-12"), ("run", "2e-3")):
        assert cli.main(unusual_flags(unusual, tmp_path, cache_dir, name, lr)) == 0
    torch.testing.assert_close(logits(tmp_path / "still"), theirs, rtol=1e-4, atol=1e-5)
    trained, start = (load_file(folder / "model.safetensors") for folder in
                      (tmp_path / "run", tmp_path / "still"))
    for name, tensor in trained.items():
        assert not torch.equal(tensor, start[name]), f"{name} was trained"
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in trained.values())
    assert {"lm_head.weight", "backbone.embedding.weight"} <= trained.keys()

    out = tmp_path / "hf"
    assert cli.main(["export", str(tmp_path / "run"), "--to", "hf", str(out)]) == 0
    again = load_with_transformers(out)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS, use_cache=False).logits, logits(tmp_path / "run"),
                                   rtol=1e-4, atol=1e-5)
    assert "embedding and head are not tied" in (out / "README.md").read_text()
    capsys.readouterr()
    original = str(tmp_path / "original")
    assert cli.main(["export", str(tmp_path / "run"), "--to", "mamba_ssm", original]) == 2
    assert ("--to mamba_ssm: must be hf for a model whose norms have an epsilon of 0.0001"
            in capsys.readouterr().err)
    assert not (tmp_path / "original").exists()
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace('"norm_eps": 0.0001', '"norm_eps": 1e-05'))
    assert cli.main(["export", str(tmp_path / "run"), "--to", "mamba_ssm", original]) == 0
    ssm_cfg = json.loads((tmp_path / "original" / "config.json").read_text())["ssm_cfg"]
    assert (ssm_cfg["bias"], ssm_cfg["conv_bias"], ssm_cfg["dt_limit"]) == (
        True, False, [0.005, 0.05])
    assert torch.equal(logits(tmp_path / "original"), logits(tmp_path / "run"))
    assert cli.main(["generate", str(tmp_path / "run"), "--max_new_tokens", "5"]) == 0


@pytest.mark.slow
def test_an_unusual_model_has_the_same_bits_in_every_world(
        unusual: Path, tmp_path: Path, cache_dir: Path) -> None:
    bits = []
    for processes in (1, 3):
        flags = unusual_flags(unusual, tmp_path, cache_dir, f"w{processes}", "2e-3")
        code, output = run_ranks(processes, flags, 250)
        assert code == 0, output
        bits.append((tmp_path / f"w{processes}" / "model.safetensors").read_bytes())
    assert bits[0] == bits[1]


@pytest.mark.parametrize(("change", "said"), [
    ({"n_layer": 10**9}, r"model.n_layer 1000000000: must be an integer in \[1, 4096\]"),
    ({"n_layer": 1.5}, "model.n_layer 1.5: must be an integer"),
    ({"d_model": 10**6}, "model.d_model 1000000: "),
    ({"d_model": 131072, "n_layer": 4096, "headdim": 16384}, " needs at least "),
    ({"n_layer": None}, "model.n_layer None"), ({"depth": 2}, "depth")])
def test_a_shape_that_cannot_be_is_a_line(trained: Outcome, tmp_path: Path, change: dict[str, int],
                                          said: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(trained.run_dir, tmp_path / "run"))
    settings = read_json(run / "config.json")
    settings["model"] |= change
    (run / "config.json").write_text(json.dumps(settings))
    assert cli.main(["generate", str(run)]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert text.startswith("fedrun: error: ")
    assert str(run) in text
    assert re.search(said, text)


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
    assert "exists already" in error("export", str(run), str(run))
    assert "would overwrite it" in error("fed_avg", "--init_from", str(run), "--data_dir",
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
    assert cli.main(["fed_avg", "--dataset", str(CORPUS), "--tokenizer", "bpe:500",
                     "--init_from", str(run), "--cache_dir", str(cache_dir),
                     "--data_dir", str(tmp_path)]) == 2
    assert "--tokenizer bpe:500: has 500 tokens, more than the 400" in capsys.readouterr().err

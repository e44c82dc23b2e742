"""Writes a model for other libraries, with its tokenizer and a model card."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedrun.common.errors import InputError
from fedrun.common.files import write_atomic
from fedrun.common.terminal import visible
from fedrun.library.tokenizers import need_tokenizer
from fedrun.records.schema import HELD_OUT

if TYPE_CHECKING:
    from fedrun.model.pretrained import Pretrained

LOADS = {
    "hf": "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
          'model = AutoModelForCausalLM.from_pretrained("{folder}")\n'
          'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
    "mamba_ssm": "from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel\n"
                 "from transformers import AutoTokenizer\n\n"
                 'model = MambaLMHeadModel.from_pretrained("{folder}", device="cuda")\n'
                 'tokenizer = AutoTokenizer.from_pretrained("{folder}")'}


def export(found: Pretrained, form: str, out: Path) -> None:
    """Write the model in float32, its tokenizer and its card into the folder `out`.

    form: `hf` for transformers, `mamba_ssm` for the original library.

    Raises:
        InputError: the folder is not empty, or the model has no tokenizer or weights that do not
            fit its config.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"OUT {out}: exists already; must be a new or empty folder")
    from fedrun.model.config import ModelConfig
    from fedrun.model.convert import to_mamba_ssm_config
    from fedrun.model.names import EMBEDDING, LM_HEAD
    tokenizer, config = need_tokenizer(found), dict[str, Any]()
    if form == "mamba_ssm":
        if not isinstance(found.model, ModelConfig):
            raise InputError("--to mamba_ssm: must be hf for a model of transformers "
                             f"({_kind(found)})")
        config = to_mamba_ssm_config(found.model, found.vocab_size)
    model = found.build()
    weights = {name: tensor.detach().float().contiguous()
               for name, tensor in model.named_parameters()}
    out.mkdir(parents=True, exist_ok=True)
    if form == "hf":
        _write_hf(found, weights, tokenizer, out)
    else:
        import torch

        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n",
                                          encoding="utf-8")
        # The library requires all keys of its state dict, where a tied head is listed as well.
        content = io.BytesIO()
        torch.save({**weights, LM_HEAD: weights.get(LM_HEAD, weights[EMBEDDING])}, content)
        write_atomic(out / "pytorch_model.bin", content.getbuffer())
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "vocab", "merges", "added_tokens")):
            shutil.copyfile(file, out / file.name)
    (out / "README.md").write_text(model_card(found, form, out, model), encoding="utf-8")


def _write_hf(found: Pretrained, weights: dict[str, Any], tokenizer: Path, out: Path) -> None:
    from safetensors.torch import save

    from fedrun.data.tokenizer import load_without_custom_code
    from fedrun.model.config import ModelConfig, TransformersShape
    from fedrun.model.convert import to_transformers, to_transformers_config
    from fedrun.model.transformers_config import library_config, model_class
    config: Any
    if isinstance(found.model, ModelConfig):
        config = to_transformers_config(found.model, found.vocab_size)
        weights = to_transformers(weights)
    else:
        assert isinstance(found.model, TransformersShape)
        config = library_config(found.model, found.vocab_size)
    config.architectures = [model_class(type(config), config.model_type).__name__]
    loaded = load_without_custom_code(tokenizer)
    config.bos_token_id, config.eos_token_id = loaded.bos_token_id, loaded.eos_token_id
    config.pad_token_id = loaded.eos_token_id if loaded.pad_token_id is None \
        else loaded.pad_token_id
    config.dtype = "float32"
    config.save_pretrained(out)
    # Not save_pretrained: its files are readable by their owner only.
    write_atomic(out / "model.safetensors", save(weights, {"format": "pt"}))


# ---- the card ------------------------------------------------------------------------------------

def model_card(found: Pretrained, form: str, out: Path, model: Any) -> str:
    """The model card: Markdown with the hub's front matter; data, method, settings, perplexity."""
    settings = {visible(name): visible(value) if isinstance(value, str) else value
                for name, value in found.settings.items()}
    front = ["---", f"library_name: {'transformers' if form == 'hf' else 'mamba-ssm'}",
             "pipeline_tag: text-generation", "tags:", f"- {_kind(found)}"]
    if settings.get("method", "central") != "central":
        front += ["- federated-learning"]
    hub = "/" in str(settings.get("dataset", "")) and not Path(settings["dataset"]).exists()
    if hub and not settings.get("sites"):  # with which it is not what the model was trained on
        front += ["datasets:", f"- {settings['dataset']}"]
    parameters = sum(p.numel() for p in model.parameters())
    name = "Mamba-2" if _kind(found) == "mamba2" else _kind(found)
    body = ["---", "", f"# {visible(found.folder.resolve().name)}", "",
            f"A {name} language model of {parameters:,} parameters (embedding and head are "
            f"{'tied' if model.names.tied else 'not tied'}), "
            + _origin(settings) + "." + (
                " It is the own model of one of the clients." if found.own else ""),
            "", "```python",
            LOADS[form].format(folder=visible(out.name)), "```", ""]
    body += _results(found)
    if settings:
        body += ["## Settings", "", "| setting | value |", "|---|---|"]
        body += [f"| {name} | {_cell(value)} |" for name, value in settings.items()
                 if name not in ("data_dir", "cache_dir", "run_name", "overwrite", "timeout")]
        body += [""]
    return "\n".join(front + body)


def _kind(found: Pretrained) -> str:
    """The name that transformers has for the model's architecture."""
    return visible(str(getattr(found.model, "model_type", "mamba2")))


def _origin(settings: dict[str, Any]) -> str:
    if not settings:
        return "converted from another library's format"
    how = "trained centrally" if settings["method"] == "central" else (
        f"trained by federated learning ({settings['method']}, {settings.get('num_clients')} "
        f"clients, local updates per round: {settings.get('local_updates')}"
        + " on average" * (settings.get("local_updates_schedule", "constant") != "constant") + ")")
    text = "the texts of its sites" if settings.get("sites") else settings.get("dataset")
    return f"{how} on {text} from scratch with fedrun" if not settings.get("init_from") else (
        f"{how} on {text} with fedrun, starting from {settings['init_from']}")


def _results(found: Pretrained) -> list[str]:
    """The card's section on results: the last perplexity and the data, as far as they are recorded,
    which they are not of a client's own model."""
    from fedrun.plots.run_folder import Damaged, read_run
    try:
        run = read_run(found.folder) if found.settings and not found.own else None
    except Damaged:
        run = None
    if run is None:
        return []
    corpus = run.environment.get("corpus")
    corpus = corpus if isinstance(corpus, dict) else {}
    last = run.final
    lines = ["## Results", "", "| | |", "|---|---|",
             f"| validation perplexity | {last.val_ppl:.2f} (lowest {run.best.val_ppl:.2f}) |",
             *([] if math.isnan(last.site_val_ppl) else [
                 f"| perplexity on text {HELD_OUT} | {last.site_val_ppl:.2f} |"]),
             f"| training tokens | {last.tokens:,.0f} |"]
    if run.settings.get("sites"):  # of the server, who has the validation text
        lines += [f"| sites | {_cell(run.settings['sites'])} |"]
    lines += [f"| {name.replace('_', ' ')} | {_cell(corpus[name])} |"
              for name in ("dataset", "validation_from", "tokenizer", "vocab_size",
                           "dataset_sha256") if name in corpus]
    return [*lines, ""]


def _cell(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (dict, list)) else visible(str(value))
    return text.replace("|", "\\|").replace("\n", " ")

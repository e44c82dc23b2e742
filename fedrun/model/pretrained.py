"""Loads models from disk or the hub, in the formats that this project reads.

    a run's folder                     config.json with a `method`, model.safetensors, tokenizer/
    transformers' Mamba2ForCausalLM    config.json with model_type mamba2, *.safetensors
    transformers' other causal models  config.json with another model_type, *.safetensors
    mamba_ssm's MambaLMHeadModel       config.json with d_model and ssm_cfg, pytorch_model.bin

All but the first may have a tokenizer next to the weights: `AntonV/mamba2-130m-hf` has one,
`state-spaces/mamba2-130m` has none.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedrun.common.errors import InputError, explain, one_line
from fedrun.common.files import open_regular, plain_name, read_json
from fedrun.common.old_names import renamed
from fedrun.common.terminal import shortened
from fedrun.data import hub
from fedrun.data.tokenizer import HUB_NAME
from fedrun.model.config import ModelConfig, ModelShape, TransformersShape, recorded_shape
from fedrun.model.convert import (
    dt_limits,
    from_transformers,
    from_transformers_config,
    whole_rows,
)
from fedrun.model.mamba2 import Mamba2LM
from fedrun.model.memory import BYTES_TO_LOAD, require_memory
from fedrun.model.names import EMBEDDING, LM_HEAD

if TYPE_CHECKING:
    from fedrun.model.transformers_lm import TransformersLM

FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model.bin",
         "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "generation_config.json"]

# Arguments of mamba_ssm's Mamba2 that affect only initialisation or the choice of algorithm.
_OF_NO_EFFECT = {"chunk_size", "use_mem_eff_path", "A_init_range", "conv_init", "dt_min", "dt_max",
                 "dt_init_floor"}


@dataclass(frozen=True)
class Pretrained:
    """A model's folder and shape. The weights are read on demand."""

    folder: Path
    model: ModelShape
    vocab_size: int
    """Rows of the embedding and head."""
    settings: dict[str, Any]
    """The run's config.json; empty for an exported or downloaded model."""
    own: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameters by our names in place of the files': of a client's own model."""

    @property
    def tokenizer(self) -> Path | None:
        """The folder with tokenizer.json, or None."""
        for folder in (self.folder / "tokenizer", self.folder):
            if (folder / "tokenizer.json").is_file():
                return folder
        return None

    def weights(self) -> dict[str, Tensor]:
        """The parameters by our names, in the type they were saved in, without a tied head; of a
        model of transformers, which only a run's folder has in one file, by the library's.

        Raises InputError if they cannot be read or contradict the config.
        """
        files = sorted(self.folder.glob("*.safetensors"))
        found: dict[str, Tensor] = {}
        try:
            for file in files:
                with plain_name(file) as name:
                    found |= load_file(name)
            if not files:
                with open_regular(self.folder / "pytorch_model.bin") as content:
                    found = torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # both libraries raise many kinds for a damaged file
            raise InputError(f"{self.folder}: cannot read the weights: "
                             f"{one_line(error)}") from error
        if not isinstance(self.model, ModelConfig):
            return {**found, **self.own}
        found = from_transformers(found)
        if self.model.tie_embeddings:
            head = found.pop(LM_HEAD, None)
            embedding = found.get(EMBEDDING)
            if head is not None and embedding is not None and not torch.equal(head, embedding):
                raise InputError(f"{self.folder}: the head differs from the embedding, but "
                                 "config.json has them tied")
        return {**found, **self.own}

    def _files(self) -> list[Path]:
        return sorted([*self.folder.glob("*.safetensors"), *self.folder.glob("*.bin")])

    @property
    def stored_bytes(self) -> int:
        """Of the weight files that are read: of two formats, the newer."""
        files = sorted(self.folder.glob("*.safetensors")) or self._files()
        return sum(file.stat().st_size for file in files)

    def digest(self) -> str:
        """A short digest of the weight files, to check that all machines have the same."""
        total = hashlib.sha256()
        for file in self._files():
            total.update(hashlib.sha256(file.read_bytes()).digest())
        return total.hexdigest()[:16]

    def build(self, compute_dtype: torch.dtype = torch.float32) -> Mamba2LM | TransformersLM:
        """The model with its weights, float32, on the CPU.

        Raises InputError if the model is too large, or the weights do not fit its shape.
        """
        count = parameters_of(self.model, self.vocab_size)
        require_memory(count, BYTES_TO_LOAD, str(self.folder))
        if isinstance(self.model, TransformersShape):
            from fedrun.model.transformers_lm import TransformersLM
            from fedrun.model.transformers_weights import of_folder, of_run
            return TransformersLM(
                of_run(self.model, self.vocab_size, self.weights(), self.folder) if self.settings
                else of_folder(self.model, self.vocab_size, self.folder), compute_dtype)
        assert isinstance(self.model, ModelConfig)
        weights = self.weights()
        try:
            model = Mamba2LM(self.model, self.vocab_size, compute_dtype)
            tied = {LM_HEAD: weights[EMBEDDING]} if self.model.tie_embeddings else {}
            model.load_state_dict({**weights, **tied})
        except (KeyError, RuntimeError) as error:
            raise InputError(f"{self.folder}: weights and config.json do not belong together: "
                             f"{one_line(error)}") from error
        return model


def find_pretrained(name: str, flag: str, cache_dir: Path = hub.CACHE_DIR, downloads: bool = True
                    ) -> Pretrained:
    """Find a model by its folder, its run's name under results/, or its name on the hub.

    cache_dir: the value of --cache_dir, for what comes from the hub. downloads: whether anything
    may come from there that is not in the cache.

    Raises InputError, naming `flag`, if there is none or it has another architecture, and
    ConnectionError if the hub is needed and cannot be reached.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir() and (Path("results") / name).is_dir():
        folder = Path("results") / name
    if not folder.is_dir():
        folder = _download(name, flag, cache_dir, downloads)
    try:
        config = read_json(folder / "config.json", dict)
        if "method" in config:
            return _of_run(folder, _check_types(renamed(config)))
        if config.get("model_type") == "mamba2":
            return Pretrained(folder, *from_transformers_config(config), {})
        if "model_type" in config:
            from fedrun.model.transformers_config import shape_of_folder
            return Pretrained(folder, *shape_of_folder(config), {})
        if "ssm_cfg" in config:
            return Pretrained(folder, *from_mamba_ssm_config(config), {})
    except FileNotFoundError as missing:
        raise InputError(f"{flag} {name}: there is no {missing.filename}") from None
    except KeyError as error:
        raise InputError(f"{flag} {name}: config.json has no {error}") from None
    except OSError as error:
        raise InputError(f"{flag} {name}: {explain(error)}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{flag} {name}: {one_line(error)}") from error
    raise InputError(f"{flag} {name}: config.json belongs neither to a run nor to a model of "
                     "transformers or mamba_ssm")


def _check_types(settings: dict[str, Any]) -> dict[str, Any]:
    """A run's settings, after a check of those that are used for a trained model."""
    for name, kind in (("method", str), ("dataset", str), ("sequence_length", int)):
        if name in settings and type(settings[name]) is not kind:
            raise InputError(f"config.json: {name} is {shortened(repr(settings[name]), 60)}, not "
                             f"of type {kind.__name__}")
    return settings


def _of_run(folder: Path, settings: dict[str, Any]) -> Pretrained:
    from safetensors import SafetensorError, safe_open
    path = folder / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    model, embedding = recorded_shape(settings["model"]), EMBEDDING
    if isinstance(model, TransformersShape):
        from fedrun.model.transformers_lm import embedding_name
        embedding = embedding_name(model)
    try:
        with plain_name(path) as name, safe_open(name, framework="pt") as file:
            shape = file.get_slice(embedding).get_shape()
    except SafetensorError as error:
        raise InputError(f"{path.name} cannot be read: {error}") from error
    if len(shape) != 2:
        raise InputError(f"{path.name}: {embedding} has {len(shape)} dimensions instead of 2")
    return Pretrained(folder, model, whole_rows(shape[0]), settings)


def parameters_of(shape: ModelShape, rows: int) -> int:
    """Number of parameters of a model whose embedding has `rows` rows. Raises InputError if
    transformers cannot build it."""
    if isinstance(shape, TransformersShape):
        from fedrun.model import transformers_lm
        return transformers_lm.parameters_of(shape, rows)
    assert isinstance(shape, ModelConfig)
    return shape.parameters(rows)


def from_mamba_ssm_config(config: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    """Our configuration for a mamba_ssm MambaConfig, and the rows of its embedding with padding.

    Raises InputError if our model cannot represent it.
    """
    required: dict[str, tuple[Any, Any]] = {  # name: (mamba_ssm's default, ours)
        "d_intermediate": (0, 0), "attn_layer_idx": ([], []), "rms_norm": (True, True),
        "residual_in_fp32": (True, True)}
    if not isinstance(config["ssm_cfg"], dict):
        raise InputError(f"ssm_cfg {config['ssm_cfg']}: must be an object")
    ssm = dict(config["ssm_cfg"])
    lower, upper = dt_limits(ssm.pop("dt_limit", (0.0, math.inf)))
    shape = {name: ssm.pop(name, default) for name, default in
             (("d_state", 128), ("headdim", 64), ("expand", 2), ("ngroups", 1), ("d_conv", 4))}
    biases = {"proj_bias": ssm.pop("bias", False), "conv_bias": ssm.pop("conv_bias", True)}
    found = {name: config.get(name, default) for name, (default, _) in required.items()}
    wrong = {name: value for name, value in found.items() if value != required[name][1]}
    if ssm.pop("layer", "Mamba1") != "Mamba2":
        wrong["ssm_cfg.layer"] = config["ssm_cfg"].get("layer", "Mamba1")
    defaults = {"d_ssm": None, "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False}
    wrong |= {f"ssm_cfg.{name}": value for name, value in ssm.items()
              if name not in _OF_NO_EFFECT and (name not in defaults or value != defaults[name])}
    if wrong:
        raise InputError("not a Mamba-2 model that fedrun can load: " + ", ".join(
            f"{name} {value}" for name, value in wrong.items()))
    model = ModelConfig(n_layer=config["n_layer"], d_model=config["d_model"], **shape, **biases,
                        tie_embeddings=config.get("tie_embeddings", True), dt_lower=lower,
                        dt_upper=upper)
    return model, whole_rows(config["vocab_size"], config.get("pad_vocab_size_multiple", 8))


def _download(name: str, flag: str, cache_dir: Path, downloads: bool) -> Path:
    """The folder of a hub model in the cache, downloaded if it is missing or out of date."""
    if not HUB_NAME.fullmatch(name):
        raise InputError(f"{flag} {name}: no such folder; must be the folder of a run or of an "
                         "exported model, or the name of a model on the hub (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError
    try:
        return Path(hub.from_hub(cache_dir, lambda folders: snapshot_download(
            name, allow_patterns=FILES, local_files_only=not (downloads and hub.hub_answers()),
            cache_dir=folders.hub)))
    except RepositoryNotFoundError as error:
        raise InputError(f"{flag} {name}: neither a folder nor a model on the hub") from error
    except Exception as error:  # the library raises many kinds
        if not downloads:
            raise InputError(f"{flag} {name}: must be a folder here, or a model that a run has "
                             "downloaded: nothing is downloaded for this") from error
        raise hub.hub_unreachable(flag, name, error) from None

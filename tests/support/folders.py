"""Small run folders for the tests of figures and the report, made without training.

Of both forms that exist: this project's, with config.json and full records, and those of the study
it grew from, with settings in the folder's name, short records, and npz keys without a layer.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROWS, COLUMNS = 24, 16
STEPS = (1, 30, 60, 90)  # evaluated


def perplexity_at(step: int, seed: int, gain: float) -> float:
    """A falling curve that differs with the seed."""
    return 400 * math.exp(-gain * step / 60) + 90 + 3 * seed


def ours(data_dir: Path, method: str = "fed_avg", config: str = "tiny", local_updates: int = 1,
         seed: int = 0, name: str | None = None, steps: tuple[int, ...] = STEPS, gain: float = 1.0,
         **settings: Any) -> Path:
    """A run folder as `fedrun` writes it, without a model."""
    central = method == "central"
    batch = 16 if central else 4
    tokens_per_step = batch * 256 * (1 if central else 4 * local_updates)
    updates = "" if central else f"_lu_{local_updates}"
    prefix = "federated" if method == "fed_avg" else method
    path = data_dir / (name or f"{prefix}_config_{config}{updates}_seed_{seed}")
    path.mkdir(parents=True)
    contents = {"method": method, "config": config, "seed": seed, "lr": 5e-4, "batch_size": batch,
                "sequence_length": 256, "dataset": "pydocs", "tokenizer": "bpe:400"}
    if not central:
        contents |= {"num_clients": 4, "local_updates": local_updates}
    write(path / "config.json", contents | settings)
    write(path / "environment.json", {"processes": 5, "device": "cpu", "device_name": "x86_64",
                                      "versions": {"torch": "2.13.0"},
                                      "corpus": {"dataset": "pydocs"}})
    records = []
    for step in steps:
        value = perplexity_at(step * local_updates, seed, gain)
        record = {"train_loss": math.log(1.1 * value), "train_ppl": 1.1 * value,
                  "tokens": step * tokens_per_step, "seconds": 0.5 * step + 0.01 * seed,
                  "generated": f"<b>Once & again</b> {step}"}
        if central:
            record |= {"step": step, "val_loss": math.log(value), "val_ppl": value}
        else:
            record |= {"global_step": step, "server_val_loss": math.log(value),
                       "server_val_ppl": value, "bytes": step * 1000}
        records.append(record)
    write(path / "training_history.json", records)
    return path


def ending_at(end: float) -> dict[int, float]:
    """A made-up curve in the form of the study's: from 50,000 to a lowest value, then up to `end`.
    """
    return {step: end * (1 + 80 * math.exp(-step / 12) - 0.24 * math.exp(-((step - 300) / 130)**2))
            if step < 600 else end for step in (1, *range(30, 601, 30))}


def study(data_dir: Path, local_updates: int | None = None, seed: int = 0,
          config: str = "pure_ssm_1_layer", method: str = "federated",
          end: float | None = None) -> Path:
    """A run folder as the study left it; of a central run if `local_updates` is None.

    end: the last perplexity of a made-up curve of the study's length and form.
    """
    curve = {step: perplexity_at(step, seed, 1) for step in STEPS} if end is None \
        else ending_at(end)
    if local_updates is None:
        path = data_dir / f"central_config_{config}_seed_{seed}"
        records = [{"step": step, "train_loss": math.log(value + 20), "val_loss": math.log(value)}
                   for step, value in curve.items()]
    else:
        path = data_dir / f"{method}_config_{config}_lu_{local_updates}_seed_{seed}"
        records = [{"global_step": step, "train_ppl": value + 20, "server_val_ppl": value}
                   for step, value in curve.items()]
    path.mkdir(parents=True)
    write(path / "training_history.json", records)
    return path


def change(step: int, seed: int, layer: int = 0) -> np.ndarray:
    """A change of in_proj (ROWS, COLUMNS): two strong directions and noise, times step."""
    left = np.random.default_rng([seed, layer]).normal(size=(ROWS, 2))
    right = np.random.default_rng([seed, layer, 1]).normal(size=(2, COLUMNS))
    noise = np.random.default_rng([seed, layer, 2]).normal(size=(ROWS, COLUMNS))
    return (step * (left @ right + 0.1 * noise) / 100).astype(np.float32)


def save_steps(folder: Path, seed: int = 0, layers: int = 1, deltas: bool = True,
               params: bool = True, study_keys: bool = False,
               steps: tuple[int, ...] = STEPS) -> None:
    """params/step_*.npz and deltas/step_*.npz under `folder`; parameters start at 1."""
    for step in steps:
        for kind, wanted, offset in (("deltas", deltas, 0.0), ("params", params, 1.0)):
            if not wanted:
                continue
            prefix = "delta_" if kind == "deltas" else ""
            arrays: dict[str, Any] = {}
            for layer in range(layers):
                key = "" if study_keys else f"layers.{layer}."
                arrays[f"{prefix}{key}in_proj"] = change(step, seed, layer) + np.float32(offset)
                arrays[f"{prefix}{key}D"] = np.ones(4, np.float32)
            (folder / kind).mkdir(parents=True, exist_ok=True)
            np.savez(folder / kind / f"step_{step:06d}.npz", **arrays)


def with_model(path: Path, words: Sequence[str] = ("once", "upon", "a", "time"),
               fill: float | None = None) -> Path:
    """Add an untrained model and a tokenizer to a run folder, and return the folder.

    words: the vocabulary. fill: the value of all parameters; None for random ones.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    from fedrun.model.config import ModelConfig
    from fedrun.model.mamba2 import Mamba2LM
    from fedrun.records.snapshots import save_model
    shape = ModelConfig(n_layer=1, d_model=32, d_state=16, headdim=16)
    model = Mamba2LM(shape, len(words))
    model.init_weights(0)
    if fill is not None:
        for parameter in model.parameters():
            parameter.detach().fill_(fill)
    save_model(path / "model.safetensors", model.named_parameters())
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (path / "tokenizer").mkdir()
    tokenizer.save(str(path / "tokenizer" / "tokenizer.json"))
    contents = json.loads((path / "config.json").read_text())
    write(path / "config.json", contents | {"model": dataclasses.asdict(shape)})
    return path


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))

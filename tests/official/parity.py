"""mamba-ssm's own model and kernels against ours, on the CPU, in Triton's interpreter.

Prints one JSON object: the largest relative difference, max|a - b| / max|b|, of the logits and of
every gradient. usage: parity.py ours|conv1d_and_chunk_scan SEQUENCE_LENGTH usual|unusual
(ours: our own scan; conv1d_and_chunk_scan: our module over the official kernels, as on a GPU;
unusual: a head of its own, biases and limits where most models of this kind have none)
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import types
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ["MAMBA_DETERMINISTIC"] = "1"

import torch

cuda: Any = torch.cuda
cuda.device = lambda *_: contextlib.nullcontext()
cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=2)

from torch.nn.functional import cross_entropy  # noqa: E402

from fedrun.model import kernels, mixer  # noqa: E402
from fedrun.model.config import ModelConfig  # noqa: E402
from fedrun.model.convert import to_mamba_ssm_config  # noqa: E402
from fedrun.model.mamba2 import Mamba2LM  # noqa: E402

kernels.ssd_kernels()  # makes the package importable without its compiled part

from mamba_ssm.models.config_mamba import MambaConfig  # noqa: E402
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel  # noqa: E402

VOCAB = 97
UNUSUAL: dict[str, Any] = {"tie_embeddings": False, "proj_bias": True, "conv_bias": False,
                           "dt_lower": 0.01, "dt_upper": 0.05}


def main(path: str, length: int, shape: str) -> None:
    config = ModelConfig(n_layer=2, d_model=64, d_state=32, headdim=32,
                         **(UNUSUAL if shape == "unusual" else {}))
    settings = to_mamba_ssm_config(config, VOCAB)
    settings["ssm_cfg"]["chunk_size"] = 32
    official = MambaLMHeadModel(MambaConfig(**settings))
    for layer in official.backbone.layers:
        layer.mixer.use_mem_eff_path = False  # it needs causal-conv1d, which needs a GPU
    ours = Mamba2LM(config, VOCAB)
    ours.init_weights(0)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if name.endswith("proj.bias"):  # they begin at zero
                p.copy_(torch.linspace(-1, 1, p.numel()))
    official.load_state_dict(ours.state_dict())
    calls: list[tuple[Any, ...]] = []
    if path != "ours":
        kernels.CHUNK_SIZE = 32
        patched: Any = kernels
        patched.path_for = lambda x: path
        patched = mixer
        official_mix = mixer.mix_with_kernels

        def counted(*arguments: Any) -> Any:
            calls.append(arguments)
            return official_mix(*arguments)

        patched.mix_with_kernels = counted
    tokens = torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(0))
    found = {}
    logits = {}
    for name, model in (("official", official), ("ours", ours)):
        out = model(tokens)
        logits[name] = out.logits if name == "official" else out
        cross_entropy(logits[name][:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert path == "ours" or len(calls) == config.n_layer
    found["logits"] = difference(logits["ours"], logits["official"])
    theirs = dict(official.named_parameters())
    for name, p in ours.named_parameters():
        assert p.grad is not None
        found[name] = difference(p.grad, theirs[name].grad)
    print(json.dumps(found))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    assert b.abs().max() > 0
    return float((a - b).abs().max() / b.abs().max())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])

"""An exported folder loaded by mamba-ssm's own `from_pretrained`, in Triton's interpreter.

Prints one JSON object: its logits on the tokens 0, 1, ..., 23. usage: load_export.py FOLDER
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
# What the package imports or asks of a GPU, and the SSD kernels do not need.
sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")

import torch  # noqa: E402

cuda: Any = torch.cuda
cuda.device = lambda *_: contextlib.nullcontext()
cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=2)

from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel  # noqa: E402

model = MambaLMHeadModel.from_pretrained(sys.argv[1])
for layer in model.backbone.layers:
    layer.mixer.use_mem_eff_path = False  # it needs causal-conv1d, which needs a GPU
with torch.no_grad():
    print(json.dumps(model(torch.arange(24)[None]).logits.tolist()))

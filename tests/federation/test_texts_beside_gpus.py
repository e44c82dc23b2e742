"""The model that the server makes sample texts with, and whether it may skip them, by the workers'
device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedrun import protocol
from fedrun.config import FederatedConfig
from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.data_plane import DataPlane
from fedrun.distributed.launch import detect
from fedrun.distributed.runtime import Runtime
from fedrun.federation.schedule import Schedule
from fedrun.flags import resolve
from fedrun.model.mamba2 import Mamba2LM
from tests.support.experiments import experiment_of
from tests.support.made_data import made


@pytest.mark.parametrize(("gpu", "dtype", "deterministic", "products", "skips"), [
    ("", "bf16", False, torch.bfloat16, False), ("", "fp32", False, torch.float32, False),
    ("H100", "bf16", False, torch.float32, True), ("H100", "fp32", False, torch.float32, True),
    ("H100", "bf16", True, torch.float32, False)])
def test_texts_beside_gpus(gpu: str, dtype: str, deterministic: bool, products: torch.dtype,
                           skips: bool, tmp_path: Path) -> None:
    config = resolve("fed_avg", {
        "config": "tiny", "num_clients": "2", "rounds": "3", "sequence_length": "8",
        "data_dir": str(tmp_path), "run_name": "run", "dtype": dtype,
        "deterministic": deterministic})
    assert isinstance(config, FederatedConfig)
    config.run_dir.mkdir()
    experiment = replace(experiment_of(config, made([100, 100], sequence_length=8)),
                         provenance={"gpu": gpu})
    runtime = Runtime(detect({}), torch.device("cpu"), (0,), ControlPlane(), DataPlane())
    stopping: Any = None
    server = protocol.make_server(experiment, Schedule(config, experiment.shards.sizes), runtime,
                                  stopping, None)
    assert server is not None
    model = server.model
    assert isinstance(model, Mamba2LM)
    assert (model.compute_dtype, server.dtype) == (products, torch.float32)
    assert (server.recorder._texts is not None) == skips
    start = dict(experiment.new_model("cpu").named_parameters())
    assert all(torch.equal(start[name], p) for name, p in model.named_parameters())
    server.recorder.close()

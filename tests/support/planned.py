"""A worker of a run on random tokens, to measure what `fedrun plan` says of it.

    python -m tests.pretended_cuda python -m tests.support.planned mamba2_130m

prints, as JSON, the bytes that a worker of such a run takes on its (pretended) GPU, planned and
counted: at first, and at the most while two clients train.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedrun import cli
from fedrun.config import FederatedConfig
from fedrun.data.partition import Shards
from fedrun.data.tokens import TokenData
from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.launch import Launch
from fedrun.distributed.runtime import build_runtime
from fedrun.experiment import Experiment
from fedrun.federation.messages import RoundReport
from fedrun.federation.noise_keeper import level_of
from fedrun.federation.worker import Worker
from fedrun.flags import resolve
from fedrun.protecting import hiding
from fedrun.protocol import make_worker
from fedrun.tools.plan_memory import worker
from fedrun.tools.plan_ranks import Layout, of_worker
from fedrun.training.evaluate import BATCH_SEQUENCES

GPT2 = {"model_type": "gpt2", "n_layer": 3, "n_embd": 64, "n_head": 4, "n_positions": 64}
# Its logits are limited after the head.
GEMMA2 = {"model_type": "gemma2", "num_hidden_layers": 3, "hidden_size": 64, "head_dim": 16,
          "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
          "final_logit_softcapping": 30.0, "max_position_embeddings": 64}
PLAN = ("plan", "fed_avg", "--config", "tiny", "--dataset", "pydocs", "--tokenizer", "bpe:400",
        "--sequence_length", "32", "--cache_dir", "cache")


def printed(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert cli.main([*PLAN, *flags]) == 0
    return capsys.readouterr().out


def config_of(method: str, **flags: object) -> FederatedConfig:
    config = resolve(method, flags)
    assert isinstance(config, FederatedConfig)
    return dataclasses.replace(config, dtype="fp32")


def experiment_of(config: FederatedConfig, vocab_size: int, validation: int = BATCH_SEQUENCES
                  ) -> Experiment:
    """Each client has random tokens for three rounds."""
    random, length = np.random.default_rng(0), config.sequence_length
    own = 3 * config.local_updates * config.batch_size
    train, held = (random.integers(vocab_size, size=(count, length), dtype=np.int32)
                   for count in (own * config.num_clients, validation))
    data = TokenData(train, held, vocab_size, {}, Path())
    return Experiment(config, data, Shards(np.split(np.arange(len(train)), config.num_clients)),
                      None, {})


def made(experiment: Experiment, device: str) -> Worker:
    """The only worker of a run."""
    runtime = build_runtime(Launch(), torch.device(device), ControlPlane(), {})
    schedule = experiment.schedule
    found = make_worker(experiment, schedule, runtime, None)
    assert found is not None
    if experiment.federated.private:  # without a log of what is spent
        level = level_of(experiment.federated, schedule, found.flat.size)
        found.noise = hiding(experiment, level, found, runtime, None)
    return found


def rounds(experiment: Experiment, device: str, folder: Path | None = None,
           look: Callable[[Worker], None] = lambda _: None, last: int = 3) -> None:
    """A worker's rounds, of which the first may average no moments. folder: write a checkpoint
    after the second. look: called at the end."""
    one, reference = made(experiment, device), experiment.config.method == "fed_entropy"
    for number in range(1, last + 1):
        plan = experiment.schedule.plan(number, 1.0 if reference else 0.0, save=number == 2)
        one.train(plan)
        if one.config.clips_to_median:
            one.terms.add_waiting(1.0)
        one.aggregate(plan)
        one.evaluate(RoundReport())
        if number == 2 and folder is not None:
            one.save(plan)
    look(one)
    one.checkpoint_writer.close()


def main() -> None:
    torch.set_num_threads(1)
    config = config_of("fed_avg", config=sys.argv[1], num_clients=2, batch_size=2, rounds=3,
                       sequence_length=64, checkpoint_freq=None)
    vocab_size, pretended = 50277, torch.ops.pretended_cuda
    found = worker(config, vocab_size, gpu=True)
    device, _ = of_worker(config, found, Layout(1, 1, False, True).hosted(2), gpu=True)
    rounds(experiment_of(config, vocab_size, validation=2), "cuda:0", last=2)
    json.dump({"planned": device.total(), "counted": pretended.peak_allocated(0),
               "items": device}, sys.stdout)


if __name__ == "__main__":
    main()

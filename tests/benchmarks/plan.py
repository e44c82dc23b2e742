"""What runs of 27 million to 2.7 billion parameters take, by `fedrun plan`.

    python -m tests.benchmarks.plan               # a minute; markdown
    python -m tests.benchmarks.plan --presets mamba2_130m

FedAvg with a client on each of 8 GPUs and a server, 4 sequences of 1,024 tokens in a step, 8 local
steps in a round. Nothing is trained: tensors have shapes and no memory. Seconds are not measured.
"""

from __future__ import annotations

import argparse
import dataclasses

from fedrun.config import FederatedConfig
from fedrun.federation.schedule import Schedule
from fedrun.flags import resolve
from fedrun.tools.plan_counting import LOSS_HEAD
from fedrun.tools.plan_disk import files, sent
from fedrun.tools.plan_machine import PUBLISHED
from fedrun.tools.plan_memory import ACTIVATIONS, worker
from fedrun.tools.plan_ranks import Layout, Rank, of_server, ranks
from fedrun.tools.plan_text import vocabulary
from fedrun.tools.plan_time import published

PRESETS = ("pure_ssm_1_layer", "mamba2_130m", "mamba2_370m", "mamba2_780m", "mamba2_1_3b",
           "mamba2_2_7b")
LAYOUT, GPU = Layout(processes=9, machines=1, colocated=False, gpu=True), "h100"
HEADER = """\
| preset | parameters (millions) | a worker's GPU (GB) | of which activations and loss head | \
spared | bytes a parameter | server's host (GB) | a term (GB) | a checkpoint (GB) | \
TFLOP a step | seconds a round (not measured) |
|---|---|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--presets", default=",".join(PRESETS))
    print(HEADER, flush=True)
    for preset in parser.parse_args().presets.split(","):
        print(row(preset), flush=True)


def row(preset: str) -> str:
    config = resolve("fed_avg", {
        "config": preset, "num_clients": 8, "sequence_length": 1024, "local_updates": 8,
        "rounds": 100})
    assert isinstance(config, FederatedConfig)
    config = dataclasses.replace(config, dtype="bf16")
    vocab_size = vocabulary(config.tokenizer)
    found = worker(config, vocab_size, gpu=True)
    gpu = _worker(config, ranks(config, found, LAYOUT))
    spared = dataclasses.replace(config, micro_batch=1, checkpoint_activations=True,
                                 moments_dtype="bf16")
    less = _worker(spared, ranks(spared, worker(spared, vocab_size, gpu=True), LAYOUT))
    size = found.flat.size
    shards = [8 * config.batch_size] * config.num_clients
    term = sent(config, found, LAYOUT, 100, Schedule(config, shards)).most
    seconds = published(config, found, LAYOUT, term, GPU, PUBLISHED[GPU]).of_round(config, LAYOUT)
    own = gpu.device[ACTIVATIONS] + gpu.device[LOSS_HEAD]
    return "| " + " | ".join((
        f"`{preset}`", f"{size / 1e6:,.1f}", f"{gpu.device.total() / 1e9:.1f}", f"{own / 1e9:.1f}",
        f"{less.device.total() / 1e9:.1f}", f"{(gpu.device.total() - own) / size:.1f}",
        f"{of_server(config, found).total() / 1e9:.1f}", f"{term / 1e9:.2f}",
        f"{files(config, found, LAYOUT, 100).checkpoint / 1e9:.1f}", f"{found.flop / 1e12:.1f}",
        f"{seconds:.2f}")) + " |"


def _worker(config: FederatedConfig, found: list[Rank]) -> Rank:
    assert found[-1].name == "a worker", config
    return found[-1]


if __name__ == "__main__":
    main()

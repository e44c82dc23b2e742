"""Every method's rounds with --offload global, beside the same without, on one pretended GPU.

    python -m tests.pretended_cuda python -m tests.support.offloaded PRESET NAME ...

prints for each, as a line of JSON: whether both end in the same bits, and without the flag and with
it what of the global state waits in pinned memory, the bytes on the device at the end, and the most
of them, planned and counted.
"""

from __future__ import annotations

import gc
import json
import sys
from itertools import pairwise
from typing import Any

import torch

from fedrun.federation.worker import Worker
from fedrun.tools.plan_memory import worker
from fedrun.tools.plan_ranks import of_worker
from tests.support.every_method import METHODS
from tests.support.planned import config_of, experiment_of, rounds

VOCAB = 1000
BESIDES = {"int8": ("fed_avg", "--aggregation", "int8"),
           "int8_moments": ("fed_avg", "--client_moments", "average_sqrt", "--moments_every", "2,1",
                            "--grad_clip", "1", "--aggregation", "int8"),
           "int4": ("fed_avg", "--aggregation", "int4"),
           "rows": ("fed_avg", "--client_moments", "average_rows", "--grad_clip", "1"),
           "clipped_to_a_number": ("fed_avg", "--client_clip", "0.01"),
           "float": ("fed_avg", "--aggregation", "float")}
SHAPE = {"num_clients": "3", "batch_size": "2", "sequence_length": "32", "rounds": "3",
         "local_updates": "2", "checkpoint_freq": "none", "val_freq": "1"}


def compare(method: str, flags: dict[str, str]) -> dict[str, Any]:
    pretended, seen = torch.ops.pretended_cuda, list[dict[str, Any]]()
    flags = SHAPE | {"config": sys.argv[1]} | flags
    if method == "fed_entropy":
        # The made text has no other holdout, and the entropy is far from the reference.
        flags |= {"entropy_on": "validation", "temperature": "10"}
    found = worker(config_of(method, **flags), VOCAB, gpu=True)
    for offload in ("none", "global"):
        config = config_of(method, **flags | {"offload": offload})
        device, host = of_worker(config, found, config.num_clients, gpu=True)

        def look(one: Worker) -> None:
            state = one.global_state.named()
            gc.collect()
            seen.append({"held": pretended.allocated(0),
                         "bits": [(name, t.cpu()) for name, t in state.items()],
                         "kept": [*state],
                         "pinned": [name for name, t in state.items() if t.is_pinned()],
                         "host": sum(t.nbytes for t in state.values() if t.is_pinned())})

        gc.collect()  # what the run before has left
        before = pretended.allocated(0)
        pretended.reset_peak(0)
        rounds(experiment_of(config, VOCAB, validation=2), "cuda:0", look=look)
        seen[-1]["held"] -= before
        seen[-1] |= {"counted": pretended.peak_allocated(0), "planned": device.total(),
                     "planned on the host": sum(host.values())}
    plain, offloaded = (one.pop("bits") for one in seen)
    same = all(name == other and torch.equal(tensor, again)
               for (name, tensor), (other, again) in zip(plain, offloaded, strict=True))
    return {"same": same, "without": seen[0], "with": seen[1]}


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        method, *flags = (METHODS | BESIDES)[name]
        given = {flag.removeprefix("--"): value for flag, value in pairwise(flags)
                 if flag.startswith("--")}
        print(json.dumps({"name": name, **compare(method, given)}), flush=True)


if __name__ == "__main__":
    main()

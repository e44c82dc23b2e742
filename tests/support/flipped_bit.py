"""Runs in which a bit flips in one worker's replica, in one set of processes:
python flipped_bit.py DATA_DIR SHARED_FLAG ...

Every worker is a machine of its own. Prints the exit code of each run.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist

from fedrun import cli
from fedrun.distributed import runtime
from fedrun.federation.worker import Worker

EVERYBODY = -1
RUNS: dict[str, tuple[tuple[int, int, str], tuple[str, ...]]] = {
    # name: ((rank, round, replica), flags); EVERYBODY: all replicas have the same NaN there
    "model": ((2, 2, "model"), ("fed_avg",)),
    "state": ((3, 2, "server.momentum"),
              ("fed_momentum", "--val_freq", "9", "--checkpoint_freq", "2")),
    "moments": ((1, 3, "moments.exp_avg_sq"), ("fed_avg", "--client_moments", "average")),
    "float": ((0, 0, ""), ("fed_avg", "--aggregation", "float")),
    "float_flipped": ((2, 3, "model"), ("fed_avg", "--aggregation", "float")),
    "ruined": ((EVERYBODY, 3, "model"), ("fed_avg", "--aggregation", "float")),
}
healthy = Worker.aggregate


def main() -> None:
    data_dir, *shared = sys.argv[1:]
    patched: Any = runtime
    patched.machine_id = lambda: 0
    for number, (name, ((rank, at, replica), flags)) in enumerate(RUNS.items()):

        def aggregate(worker: Worker, plan: Any, where: Any = (rank, at), replica: str = replica
                      ) -> Any:
            report = healthy(worker, plan)
            if (EVERYBODY, plan.round) == where:
                worker.global_state.named()[replica][1000] = torch.nan
            if (worker.runtime.rank, plan.round) == where:
                worker.global_state.named()[replica].view(torch.int32)[1000] ^= 1 << 20
            return report

        setattr(Worker, "aggregate", aggregate)  # noqa: B010
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # a name space in the store
        code = cli.main([flags[0], *shared, *flags[1:], "--data_dir", data_dir, "--run_name", name])
        if dist.is_initialized():  # as a failed run leaves it
            dist.destroy_process_group()
        if os.environ["RANK"] == "0":
            sys.stdout.write(f"{name}: exit code {code}\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()

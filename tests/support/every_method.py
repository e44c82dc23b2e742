"""Every method's run in one set of processes: python every_method.py DATA_DIR SHARED_FLAG ...

Whole runs one after the other, each connecting again, as after a restart of torchrun.
"""

from __future__ import annotations

import os
import sys

from fedrun import cli

METHODS: dict[str, tuple[str, ...]] = {
    "trained": ("fed_avg", "--weighting", "trained", "--sampling", "replacement"),
    "average": ("fed_avg", "--client_moments", "average", "--prox_mu", "0.5", "--grad_clip", "1"),
    "average_sqrt": ("fed_avg", "--client_moments", "average_sqrt", "--moments_every", "2,3",
                     "--grad_clip", "1"),
    "muon": ("fed_avg", "--local_optimizer", "muon", "--client_moments", "average_sqrt",
             "--moments_every", "2,3", "--grad_clip", "1"),
    "average_rows": ("fed_avg", "--local_optimizer", "muon", "--client_moments", "average_rows",
                     "--moments_every", "2", "--grad_clip", "1", "--personal", "*layers.1*"),
    "clipped": ("fed_avg", "--client_clip", "median"),
    "personal": ("fed_avg", "--personal", "*norm*,*embedding*", "--client_moments", "average"),
    "personal_int4": ("diloco", "--personal", "*layers.1*", "--aggregation", "int4"),
    "personal_muon": ("fed_fisher", "--personal", "*out_proj*", "--local_optimizer", "muon"),
    "fed_momentum": ("fed_momentum",),
    "diloco": ("diloco", "--warmup", "2", "--lr_schedule", "cosine",
               "--local_updates_schedule", "quadratic"),
    "fed_entropy": ("fed_entropy", "--temperature", "0.1"),
    "fed_fisher": ("fed_fisher",),
    "sequence": ("fed_fisher", "--fisher", "sequence", "--fisher_scope", "mixers"),
    "corrected": ("fed_fisher", "--fisher", "corrected", "--fisher_floor_mode", "relative",
                  "--fisher_floor", "0.1"),
    "fed_adam": ("fed_adam",),
    "fed_yogi": ("fed_yogi",),
    "fed_adagrad": ("fed_adagrad",),
    "fed_sgd": ("fed_sgd", "--local_updates", "1"),
    "fed_median": ("fed_median",),
    "fed_trimmed_mean": ("fed_trimmed_mean", "--num_clients", "5"),
    "fed_krum": ("fed_krum", "--num_clients", "5"),
    "fed_geometric_median": ("fed_geometric_median",),
}


def run_every(runs: dict[str, tuple[str, ...]]) -> None:
    for number, (name, flags) in enumerate(runs.items()):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # a name space in the store
        code = cli.main([flags[0], *sys.argv[2:], *flags[1:], "--data_dir", sys.argv[1],
                         "--run_name", name])
        if code:
            sys.exit(f"{name}: exit code {code}")


if __name__ == "__main__":
    run_every(METHODS)

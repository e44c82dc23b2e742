"""Runs whose clients have states of every kind: python every_store.py DATA_DIR SHARED_FLAG ..."""

from __future__ import annotations

from tests.support.every_method import run_every

RUNS: dict[str, tuple[str, ...]] = {
    "keep": ("fed_avg",),
    "average": ("fed_avg", "--client_moments", "average"),
    "reset": ("fed_avg", "--client_moments", "reset"),
    "epoch": ("fed_avg", "--sync", "epoch", "--epoch_passes", "0.1"),
    "int8": ("diloco", "--aggregation", "int8", "--cohort", "3"),
    "cohort": ("fed_avg", "--cohort", "0.5", "--partition", "dirichlet", "--size_skew", "0.5"),
}

if __name__ == "__main__":
    run_every(RUNS)

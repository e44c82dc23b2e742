"""What goes with --overlap. Does not import torch."""

from __future__ import annotations

from typing import Any

from fedrun.common.errors import require

METHODS = ("fed_avg", "fed_momentum", "diloco")
"""Those whose server update is linear in the mean update: a client's own part of it is a part of
the step."""


def check_overlap(config: Any) -> None:
    """InputError, naming the flag, if a run with --overlap has what does not go with it.

    config: the run's FederatedConfig.
    """
    if not config.overlap:
        return
    require(config.method in METHODS, "--overlap", "true",
            f"false for {config.method}: it is for {', '.join(METHODS)}")
    require(config.strategy.weighting != "trained", "--weighting", "trained",
            "samples or uniform with --overlap, where a client knows its weight before the sum")
    require(not config.averages_moments, "--client_moments", config.client_moments,
            "keep, reset or reset_epoch with --overlap")
    require(config.sync == "round", "--sync", config.sync, "round with --overlap")
    require(config.aggregation != "int4", "--aggregation", config.aggregation,
            "exact, float or int8 with --overlap")
    require(config.client_clip is None, "--client_clip", config.client_clip, "none with --overlap")
    require(config.sites is None, "--sites", config.sites, "none with --overlap")
    require(config.dp == "none", "--dp", config.dp, "none with --overlap")

"""What each client has for itself: parameters that never leave it, and text to measure them on.
Does not import torch.

Personal parameters are those of FedPer (Arivazhagan et al. 2019, "Federated Learning with
Personalization Layers") and FedBN (Li et al. 2021, "FedBN: Federated Learning on Non-IID Features
via Local Batch Normalization").
"""

from __future__ import annotations

from typing import Any

from fedrun.common.errors import require


def check_own(config: Any) -> None:
    """InputError, naming the flag, for settings of a federated run that do not go together."""
    _check_holdout(config)
    given = config.personal
    if given is None:
        return
    require(all(pattern.strip() for pattern in given.split(",")), "--personal", repr(given),
            "names of parameters or patterns with *, separated by commas")
    require(config.strategy.trains, "--personal", given, f"none for {config.method}, whose clients "
            "make no steps that could train parameters of their own")
    require(not config.private, "--personal", given, f"none with --dp {config.dp}, whose "
            "log of what was spent does not cover parameters that only a client has")
    require(config.keep == "last" or config.eval_clients, "--keep", config.keep, "last with "
            "--personal, or given with --eval_clients, which measures clients' own models: the "
            "global one is that of no client")
    require(config.keep == "last" or config.cohort_size == config.num_clients, "--keep",
            config.keep, "last with --personal and --cohort, for whose rounds other clients are "
            "measured each time")


def _check_holdout(config: Any) -> None:
    held = config.client_holdout
    require(held is None or 0 < held < 1, "--client_holdout", held, "in (0, 1), or none")
    require(held is None or config.eval_clients, "--client_holdout", held, "none without "
            "--eval_clients, which measures clients' own models on it")
    require(held is None or config.sites is None, "--client_holdout", held, f"none with --sites "
            f"{config.sites}: nothing of a single client's model leaves its site (--site_holdout "
            "measures on the text of all)")
    require(held is None or not config.private, "--client_holdout", held, f"none with --dp "
            f"{config.dp}: losses on clients' text have no noise")
    require(held is None or not config.strategy.holdout, "--client_holdout", held, "none with "
            "--entropy_on holdout, for which clients hold out --entropy_holdout")

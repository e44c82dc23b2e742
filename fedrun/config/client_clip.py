"""What goes with --client_clip. Does not import torch."""

from __future__ import annotations

from typing import Any

from fedrun.common.errors import require
from fedrun.privacy.settings import LARGEST_CLIP, SMALLEST_CLIP

MEDIAN = "median"


def check_client_clip(config: Any) -> None:
    """InputError, naming the flag, if --client_clip is no norm, or would not bound what one client
    can do.

    config: the run's FederatedConfig.
    """
    given = config.client_clip
    if given is None:
        return
    require(given == MEDIAN or _is_norm(given), "--client_clip", given,
            f"a number from {SMALLEST_CLIP:g} to {LARGEST_CLIP:g}, or median")
    flag = f"--client_clip {given}"
    method = config.strategy
    require(set(method.sums) == {"delta"} and method.inputs == ("delta",), "--client_clip", given,
            f"none with {config.method}, whose sums are not of updates alone")
    require(config.dp != "client", "--client_clip", given, "none with --dp client, which clips to "
            "--dp_clip")
    require(not config.sends_few_bits, "--aggregation", config.aggregation, f"exact or float with "
            f"{flag}: in few bits a client also sends what earlier rounds have left")
    require(not config.averages_moments, "--client_moments", config.client_moments,
            f"keep, reset or reset_epoch with {flag}: moments are not clipped")
    require(config.sync == "round", "--sync", config.sync, f"round with {flag}")
    require(given != MEDIAN or config.sites is None, "--client_clip", given, "a number with "
            "--sites, where nobody sees the norm of a single update")


def _is_norm(text: str) -> bool:
    try:
        return SMALLEST_CLIP <= float(text) <= LARGEST_CLIP  # nan is not
    except ValueError:
        return False

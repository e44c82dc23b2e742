"""How much memory a computation on the CPU takes, counted by torch's allocator."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from torch.autograd import profiler


def peak_bytes(compute: Callable[[], object]) -> int:
    """The most bytes of tensors that were allocated and not yet freed at one time, above what there
    was before."""
    gc.collect()  # what earlier tests have left would be freed meanwhile, and count against it
    # Not torch.profiler, which imports torch's compiler.
    with profiler.profile(profile_memory=True) as profile:
        compute()
    found: Any = profile.kineto_results
    events = [event for event in found.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak

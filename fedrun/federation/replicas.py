"""The copies of the global model: every GPU, and every machine of CPU workers, holds its own.

They are updated from the same sum by the same operations, so all have the same bits: `--aggregation
float` too, since an all-reduce (gloo's ring, NCCL's) computes each element in one place and hands
the result to everybody. Nothing else would ever show a bit that memory or a processor got wrong in
one of them; so their digests are compared before a model or a checkpoint is written.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedrun.aggregation.base import max_abs

_WORDS = 1 << 15  # in a row; the same everywhere, since the digest depends on it
_ROWS = {"cpu": 1, "cuda": 256}  # at a time


def digest(vector: Tensor) -> str:
    """Hex digits that are equal for vectors with the same bits, wherever they lie.

    The vector's 64-bit words, in rows of _WORDS, are summed along rows and along columns, wrapping:
    exact in any order, computed where the vector lies, and different wherever up to three words
    differ. What is copied and hashed is those sums, a few hundred kB.
    """
    raw = vector.detach().view(torch.uint8)
    whole = raw.numel() // 8 * 8
    words = raw[:whole].view(torch.int64)
    columns = torch.zeros(_WORDS, dtype=torch.int64, device=vector.device)
    rows = []
    for part in words.split(_WORDS * _ROWS[vector.device.type]):
        full = part[:part.numel() // _WORDS * _WORDS].view(-1, _WORDS)
        rows.append(full.sum(1))
        columns.add_(full.sum(0))
        if rest := part[full.numel():].numel():  # of the last row
            rows.append(part[-rest:].sum(0, keepdim=True))
            columns[:rest].add_(part[-rest:])
    sums = torch.cat([*rows, columns]).cpu()
    told = hashlib.sha256(sums.numpy().tobytes())
    told.update(raw[whole:].cpu().numpy().tobytes())
    return told.hexdigest()[:16]


def examine(vectors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A worker's report on the vectors it holds, by name: `replicas`, their digests, and
    `not_finite`, the names of those with an element that is NaN or infinite."""
    slices = {name: vector.split(_WORDS * _ROWS[vector.device.type])
              for name, vector in vectors.items()}
    return {"replicas": {name: digest(vector) for name, vector in vectors.items()},
            "not_finite": [name for name, parts in slices.items()
                           if not all(math.isfinite(max_abs(part)) for part in parts)]}


def compare(reports: Sequence[Mapping[str, Any]], model: Tensor | None = None) -> str:
    """Server: what is wrong with the replicas; empty where they are equal and finite.

    reports: of all ranks, with what `examine` says from those that hold replicas; model: the copy
    that the first of them has sent, (size,).
    """
    held = {rank: report["replicas"] for rank, report in enumerate(reports) if "replicas" in report}
    if not held:
        return ""
    names = next(iter(held.values()))
    differing = [name for name in names if len({told[name] for told in held.values()}) > 1]
    if differing:
        groups: dict[tuple[str, ...], list[int]] = {}
        for rank, told in held.items():
            groups.setdefault(tuple(told[name] for name in names), []).append(rank)
        *few, most = sorted(groups.values(), key=len)
        which = ", ".join(differing)
        if len(few[-1]) == len(most):
            everyone = " and ".join(map(_ranks, [*few, most]))
            return (f"the replicas of the global model ({which}) on {everyone} differ, and nothing "
                    "tells which is right: faulty memory or processors, or processors of different "
                    "kinds")
        return (f"the replica of the global model ({which}) on {' and '.join(map(_ranks, few))} "
                f"differs from that on {_ranks(most)}: faulty memory or a faulty processor there, "
                "or one of another kind")
    broken = sorted({name for report in reports for name in report.get("not_finite", ())})
    if broken:
        return f"the global model is no longer finite ({', '.join(broken)}): --lr may be too large"
    if model is not None and digest(model) != names["model"]:
        return (f"the copy of the global model that rank 0 received differs from "
                f"{_ranks([min(held)])}'s: memory or network at fault")
    return ""


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"

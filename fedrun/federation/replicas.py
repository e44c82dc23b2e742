"""The replicas of the global model: every GPU, and every machine of CPU workers, holds its own.

They are updated from the same sum by the same operations, so they have the same bits, float
aggregation included: an all-reduce (gloo's ring, NCCL's) computes each element in one place and
gives the result to everybody. Nothing else would reveal a bit that memory or a processor got wrong
in one of them, so their digests are compared before a model or a checkpoint is written.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedrun.aggregation.slices import max_abs
from fedrun.federation.messages import RoundReport

_ROW_WORDS = 1 << 15  # the same everywhere, because the digest depends on it
_ROWS_AT_ONCE = {"cpu": 1, "cuda": 256}


def digest(vector: Tensor) -> str:
    """A hexadecimal digest: equal for vectors with the same bits, on any device.

    The vector's 64-bit words, in rows of _ROW_WORDS, are summed along rows and along columns.
    These sums wrap around, so they are exact in any order; they are computed on the vector's
    device, and they differ if one to three words differ. Only the sums, a few hundred kB, are
    copied and hashed.
    """
    raw = vector.detach().view(torch.uint8)
    whole = raw.numel() // 8 * 8
    words = raw[:whole].view(torch.int64)
    columns = torch.zeros(_ROW_WORDS, dtype=torch.int64, device=vector.device)
    rows = []
    for part in words.split(_ROW_WORDS * _ROWS_AT_ONCE[vector.device.type]):
        full = part[:part.numel() // _ROW_WORDS * _ROW_WORDS].view(-1, _ROW_WORDS)
        rows.append(full.sum(1))
        columns.add_(full.sum(0))
        if rest := part[full.numel():].numel():  # of the last row
            rows.append(part[-rest:].sum(0, keepdim=True))
            columns[:rest].add_(part[-rest:])
    sums = torch.cat([*rows, columns]).cpu()
    hashed = hashlib.sha256(sums.numpy().tobytes())
    hashed.update(raw[whole:].cpu().numpy().tobytes())
    return hashed.hexdigest()[:16]


def digests(vectors: Mapping[str, Tensor]) -> dict[str, str]:
    """The digest of each vector, by name."""
    return {name: digest(vector) for name, vector in vectors.items()}


def not_finite(vectors: Mapping[str, Tensor]) -> list[str]:
    """Names of the vectors with an element that is NaN or infinite."""
    return [name for name, vector in vectors.items() if not all(
        math.isfinite(max_abs(part))
        for part in vector.split(_ROW_WORDS * _ROWS_AT_ONCE[vector.device.type]))]


def compare(reports: Sequence[RoundReport], model: Tensor | None = None) -> str:
    """Server: what is wrong with the replicas; empty if they are equal and finite.

    reports: of all ranks, in order; model: the copy that the first worker sent, (size,).
    """
    held = {rank: report.replicas for rank, report in enumerate(reports) if report.replicas}
    if not held:
        return ""
    names = next(iter(held.values()))
    differing = [name for name in names if len({found[name] for found in held.values()}) > 1]
    if differing:
        return _difference(held, differing)
    broken = sorted({name for report in reports for name in report.not_finite})
    if broken:
        return f"the global model is no longer finite ({', '.join(broken)}): --lr may be too large"
    if model is not None and digest(model) != names["model"]:
        return (f"the copy of the global model that rank 0 received differs from that of "
                f"{_ranks([min(held)])}: memory or network fault")
    return ""


def _difference(held: Mapping[int, Mapping[str, str]], differing: Sequence[str]) -> str:
    """Which ranks differ from the others in the vectors `differing`; `held`: digests by rank."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for rank, found in held.items():
        groups.setdefault(tuple(found.values()), []).append(rank)
    *few, most = sorted(groups.values(), key=len)
    which = ", ".join(differing)
    if len(few[-1]) == len(most):
        everyone = " and ".join(map(_ranks, [*few, most]))
        return (f"the replicas of the global model ({which}) on {everyone} differ, and nothing "
                "shows which one is right: faulty memory or processors, or processors of different "
                "kinds")
    return (f"the replica of the global model ({which}) on {' and '.join(map(_ranks, few))} "
            f"differs from that on {_ranks(most)}: faulty memory or a faulty processor there, or "
            "one of another kind")


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"

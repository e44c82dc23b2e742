"""Names of parameters that snapshots and FedFisher ask a model for. Needs no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from fedrun.common.errors import InputError, require

# Those of Mamba-2, as `mamba_ssm` has them.
EMBEDDING = "backbone.embedding.weight"
LM_HEAD = "lm_head.weight"
_MIXER = ".mixer."
_MATRICES = "in_proj.weight", "out_proj.weight"
_TRACKED = {"in_proj.weight": "in_proj", "A_log": "A_log", "D": "D", "dt_bias": "dt_bias"}


@dataclass(frozen=True)
class ParameterNames:
    """What a model says of its parameters, all by the names of `named_parameters`."""

    tracked: Mapping[str, str] = field(default_factory=dict)
    """Those whose values and changes a run saves in its evaluated steps -> their names there."""
    mixers: frozenset[str] = frozenset()
    """Those of sequence mixers, for --fisher_scope mixers."""
    matrices: frozenset[str] = frozenset()
    """The 2-dimensional weights inside the layers, which are neither embedding nor head: those that
    --local_optimizer muon updates by Muon."""
    tied: str | None = None
    """The one that is both the embedding and the head; None if each has its own."""


def mamba2_names(names: Iterable[str]) -> ParameterNames:
    """Those of a Mamba-2 model, of all names of its parameters.

    Tracked are in_proj, A_log, D and dt_bias of every layer, under names such as
    `layers.0.in_proj`.
    """
    given, tracked, mixers, matrices = list(names), {}, set[str](), set[str]()
    for name in given:
        block, in_mixer, parameter = name.partition(_MIXER)
        if in_mixer:
            mixers.add(name)
            if parameter in _MATRICES:
                matrices.add(name)
            if parameter in _TRACKED:
                layer = block.rpartition("layers.")[2]
                tracked[name] = f"layers.{layer}.{_TRACKED[parameter]}"
    return ParameterNames(tracked, frozenset(mixers), frozenset(matrices),
                          None if LM_HEAD in given else EMBEDDING)


def personal_names(patterns: str | None, names: Collection[str]) -> frozenset[str]:
    """The parameters, of these, that --personal names; none for None.

    patterns: separated by commas; `*` stands for any characters. InputError if one of them fits no
    name, or all together fit every one.
    """
    if patterns is None:
        return frozenset()
    found = set[str]()
    for pattern in patterns.split(","):
        fitting = {name for name in names if fnmatchcase(name, pattern.strip())}
        if not fitting:
            ordered = sorted(names)
            some = ordered[::max(1, len(ordered) // 4)][:5]
            raise InputError(f"--personal {patterns}: no parameter of the model is named "
                             f"{pattern.strip()!r}; must be names or patterns with *, separated by "
                             f"commas, such as {', '.join(some)} (of {len(ordered)})")
        found |= fitting
    require(len(found) < len(names), "--personal", patterns, "names or patterns that leave some "
            "parameters to be averaged")
    return frozenset(found)

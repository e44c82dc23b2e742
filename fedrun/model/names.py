"""Names of Mamba-2's parameters, which are those of `mamba_ssm`. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable

EMBEDDING = "backbone.embedding.weight"
LM_HEAD = "lm_head.weight"
_MIXER = ".mixer."


def in_mixer(name: str) -> bool:
    """Whether a parameter belongs to a block's mixer, and not to a norm, embedding or head."""
    return _MIXER in name


def tied_parameter(names: Iterable[str]) -> str | None:
    """The one of a model's parameters that is both its embedding and its head; None if each has its
    own."""
    return None if LM_HEAD in names else EMBEDDING


def mixer_parameter(name: str) -> tuple[str, str]:
    """Layer and parameter: ("0", "in_proj.weight") of `backbone.layers.0.mixer.in_proj.weight`.

    The parameter is empty outside mixers.
    """
    _, _, rest = name.partition("layers.")
    layer, _, parameter = rest.partition(_MIXER)
    return layer, parameter

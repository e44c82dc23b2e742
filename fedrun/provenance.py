"""Whether a folder holds the run that is asked for: its settings, and what it was made with.

Older runs know fewer settings than newer ones: what their config.json lacks had its default.
"""

from __future__ import annotations

import dataclasses
import json
import reprlib
from collections.abc import Mapping
from typing import Any

from fedrun.config import RunConfig

LONGEST_SHOWN = 60  # characters of a value in a message: a damaged file may hold anything


def differing(config: RunConfig, held: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that decide results and are others in `held`: name -> (there, here).

    held: a config.json's content, of any age. Those of the model are named `model.n_layer`. A
    `--dtype auto` differs from nothing, since it follows what the run began with.
    """
    mine = json.loads(json.dumps(config.results_dict()))
    theirs = _defaults(config) | {"model": {}} | dict(held)
    if isinstance(theirs["model"], dict):
        shapes = mine.pop("model"), _defaults(config.model) | theirs.pop("model")
        for values, shape in zip((mine, theirs), shapes, strict=True):
            values.update({f"model.{name}": value for name, value in shape.items()})
    if config.dtype == "auto":
        mine.pop("dtype")
    return {name: (theirs.get(name), value) for name, value in mine.items()
            if theirs.get(name) != value}


def told(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Differences in a line: `lr 0.002 there, 0.001 here`."""
    return ", ".join(f"{name} {shown(there)} there, {shown(here)} here"
                     for name, (there, here) in differences.items())


def shown(value: object) -> str:
    """A value as a message can hold it."""
    text = reprlib.repr(value) if isinstance(value, (dict, list)) else str(value)
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "..."


def _defaults(settings: Any) -> dict[str, Any]:
    """The defaults of a dataclass's fields, as JSON has them; a method's lie beside the others."""
    found = {f.name: f.default for f in dataclasses.fields(settings)
             if f.default is not dataclasses.MISSING}
    strategy = getattr(settings, "strategy", None)
    found |= _defaults(strategy) if strategy is not None else {}
    jsonable: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return jsonable

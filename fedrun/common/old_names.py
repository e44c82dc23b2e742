"""Former names of settings. Run folders, configs and studies that use them are read as if they used
today's; on the command line a former name is an error that gives the new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NEW_NAMES = {"client_state": "client_moments", "reduce": "aggregation", "wire": "aggregation"}
"""Former name -> today's, with the same values. --reduce and --wire became one setting: "exact",
the default of both, leaves the choice to the other."""


def renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run or of a file under today's names, in the same order.

    Former names that contradict each other, or today's name, are kept: whoever checks for unknown
    keys then refuses them.
    """
    values: dict[str, list[Any]] = {}
    for old, new in NEW_NAMES.items():
        if old in settings:
            values.setdefault(new, []).append(settings[old])
    chosen = {}
    for new, given in values.items():
        choices = [value for value in given if value != "exact"]
        if new not in settings and len(choices) <= 1:
            chosen[new] = choices[0] if choices else "exact"
    found: dict[str, Any] = {}
    for name, value in settings.items():
        new = NEW_NAMES.get(name, name)
        if new in chosen:
            found[new] = chosen[new]
        else:
            found[name] = value
    return found


def moved(flag: str, value: object) -> str:
    """The error for a flag under its former name; empty for any other flag."""
    if (new := NEW_NAMES.get(flag)) is None:
        return ""
    given = "" if value is None else f" {value}"
    return f"--{flag}{given}: this flag is now --{new}{given}"

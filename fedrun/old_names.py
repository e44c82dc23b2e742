"""Settings that had another name once. Run folders, configs and studies in the old spelling are
read as if they had been written in today's; on the command line the old flag is an error that names
the new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NEW_NAMES = {"client_state": "client_moments", "reduce": "aggregation", "wire": "aggregation"}
"""Old name -> today's; the values are the same. Where two became one, "exact" in one of them leaves
the choice to the other."""


def renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run or a file under today's names, in their order.

    Old names stay where they contradict each other or today's name, so that a file of settings is
    refused for them as for any unknown key.
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
    """What to say of a flag with an old name; empty for any other."""
    if (new := NEW_NAMES.get(flag)) is None:
        return ""
    given = "" if value is None else f" {value}"
    return f"--{flag}{given}: this flag is now --{new}{given}"

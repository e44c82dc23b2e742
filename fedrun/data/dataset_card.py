"""What a dataset's folder declares about its files: configurations in README.md, and state.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from fedrun.common.errors import InputError, one_line
from fedrun.common.files import DamagedFile, read_json, read_regular
from fedrun.data.text_files import printable

FRONT_MATTER = re.compile(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", re.S)
DEFAULT = "default"


def find_configuration(folder: Path, asked: str | None) -> tuple[str, dict[str, list[str]] | None]:
    """Find a configuration of a dataset: one listed in its README.md, or else a subfolder.

    Args:
        asked: its name; None: the only one, or the default.
    Returns:
        the folder below `folder` to read, and the file patterns of each split; None instead of
        patterns if the files' names decide their splits
    Raises:
        InputError: there is no such configuration, or there are several and none is asked for.
    """
    configs = {str(config.get("config_name", DEFAULT)): config
               for config in _listed_configurations(folder / "README.md")}
    if not configs:
        if asked is None:
            return "", None
        if (folder / asked).is_dir():
            return asked, None
        there = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise InputError(f"no configuration {asked}: no README.md lists it, and the folders are "
                         f"{', '.join(map(printable, there)) or 'none'}")
    defaults = [name for name, config in configs.items() if config.get(DEFAULT) is True]
    if asked is None and len(configs) == 1:
        chosen: str | None = next(iter(configs))
    else:
        chosen = asked or next((name for name in (*defaults, DEFAULT) if name in configs), None)
    if chosen not in configs:
        known = ", ".join(map(printable, configs))
        raise InputError(
            f"no configuration {asked}; the configurations are {known}" if asked else
            f"it has several configurations ({known}); choose one: FOLDER:{next(iter(configs))}")
    config = configs[chosen]
    inside = str(config.get("data_dir") or "")
    if not (folder / inside).resolve().is_relative_to(folder):
        raise InputError(f"{printable(folder / 'README.md')}: the data_dir {inside} of {chosen} "
                         "is outside the folder")
    return inside, _patterns(config.get("data_files"))


def _listed_configurations(readme: Path) -> list[dict[str, Any]]:
    try:
        text = read_regular(readme).decode("utf-8-sig", "replace")
        matter = FRONT_MATTER.match(text)
        front_matter = yaml.safe_load(matter[1]) if matter and "configs:" in matter[1] \
            else None
    except (OSError, DamagedFile):
        return []
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{printable(readme)}: its YAML block cannot be read: "
                         f"{one_line(error)}") from None
    configs = front_matter.get("configs") if isinstance(front_matter, dict) else None
    return [config for config in configs if isinstance(config, dict)
            and ("data_files" in config or "data_dir" in config)] \
        if isinstance(configs, list) else []


def _patterns(given: Any) -> dict[str, list[str]] | None:
    """The patterns of each split in a configuration's data_files, which has several forms."""
    if not given:
        return None
    patterns: dict[str, list[str]] = {}
    for entry in given if isinstance(given, list) else [given]:
        if isinstance(entry, dict) and "split" in entry:
            splits = {entry["split"]: entry.get("path", [])}
        else:
            splits = entry if isinstance(entry, dict) else {"train": entry}
        for split, paths in splits.items():
            patterns.setdefault(str(split), []).extend(
                str(path) for path in (paths if isinstance(paths, list) else [paths]))
    return patterns


def matches_pattern(name: str, pattern: str) -> bool:
    """Whether a path matches a pattern, in which * stays within a folder and ** does not."""
    pattern = pattern.removeprefix("./")
    if name == pattern:
        return True
    wild = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = (wild.get(part, re.escape(part)) for part in re.split(r"(\*\*/?|\*|\?)", pattern))
    return re.fullmatch("".join(parts), name) is not None


def listed_data_files(state: Path) -> list[str]:
    """The names of the dataset's files in `state.json`, which `datasets` writes (save_to_disk)."""
    try:
        listed = read_json(state, dict).get("_data_files")
    except (OSError, DamagedFile) as error:
        raise InputError(f"{printable(state)}: {error}") from None
    return [str(file.get("filename")) for file in listed if isinstance(file, dict)] \
        if isinstance(listed, list) else []

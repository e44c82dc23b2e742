"""Reads the runs of a study from the two files that it leaves beside their folders.

histories.json has each reported run's history by the run's name, table.json each setting's flags
and the values it was tuned to. Together they are all that figures of perplexity need, so that those
of a study whose runs are elsewhere, or gone, can be drawn.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fedrun.common.errors import InputError, one_line, require
from fedrun.common.files import DamagedFile, Kind, number, read_json
from fedrun.common.old_names import renamed
from fedrun.common.terminal import visible
from fedrun.flags import methods, resolve
from fedrun.plots.run_folder import Damaged, Run, from_settings, with_history

HISTORIES, TABLE = "histories.json", "table.json"
RUN = re.compile(r"(?P<at>.+)_seed_(?P<seed>\d{1,19})", re.DOTALL)


def is_study(folder: Path) -> bool:
    """Whether a folder holds the histories of a study."""
    return may_be_there(folder / HISTORIES)


def may_be_there(file: Path) -> bool:
    """Whether a file exists, or may exist because its folder's permissions hide it."""
    try:
        file.lstat()
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def read_study(folder: Path) -> tuple[list[Run], list[tuple[str, str]]]:
    """The runs of a study, and those that were skipped with the reason.

    Raises InputError, naming the file, if either of its files cannot be used.
    """
    histories = _read(folder, HISTORIES, dict)
    settings, notes = _settings(folder)
    runs, passed_over = [], []
    for name, history in histories.items():
        parts = RUN.fullmatch(name)
        try:
            if not parts or parts["at"] not in settings:
                raise Damaged(f"{TABLE} has no setting for it")
            run = from_settings(folder / name.replace("/", "_"), settings[parts["at"]] | {
                "seed": int(parts["seed"])}, TABLE)
            runs.append(with_history(run, history if isinstance(history, list) else [], HISTORIES))
        except Damaged as damaged:
            passed_over.append((visible(name), str(damaged)))
    if passed_over and not runs:
        raise InputError(f"--data_dir {folder}: {HISTORIES} and {TABLE} are not those of a study: "
                         f"{passed_over[0][0]}: {passed_over[0][1]}")
    return runs, notes + passed_over


def _read(folder: Path, name: str, kind: type[Kind]) -> Kind:
    try:
        return read_json(folder / name, kind)
    except DamagedFile as error:
        raise InputError(f"--data_dir {folder}: {name} is damaged: "
                         + str(error).removeprefix(str(folder / name)).strip()) from None
    except OSError as error:
        raise InputError(f"--data_dir {folder}: {name} cannot be read: {error.strerror}") from None


def read_table(folder: Path) -> list[dict[str, Any]]:
    """The rows of a study's table, each with its setting, flags with a method, and best.

    Raises InputError, naming the file, if it cannot be used.
    """
    rows = _read(folder, TABLE, list)
    for place, row in enumerate(rows, 1):
        of_row = row if isinstance(row, dict) else {}
        flags = of_row.get("flags")
        if not (isinstance(of_row.get("setting"), str) and isinstance(of_row.get("best"), dict)
                and isinstance(flags, dict) and isinstance(flags.get("method"), str)):
            raise InputError(f"--data_dir {folder}: {TABLE} is not a study's: row {place} lacks "
                             "setting, flags with a method, or best")
    return rows


def _settings(folder: Path) -> tuple[dict[str, dict[str, Any]], list[tuple[str, str]]]:
    """The settings of all runs but their seed, by the beginning of their names; and for each row of
    the table whose flags cannot be completed by their defaults, the reason."""
    found, notes = {}, []
    for row in read_table(folder):
        setting, flags, best = row["setting"], row["flags"], row["best"]
        given = renamed(flags) | best
        at = setting + "".join(f"_{name}_{number(value):g}" for name, value in best.items())
        try:
            require(given["method"] in methods(), "method", given["method"], " or ".join(methods()))
            of_run = {n: v for n, v in given.items() if n != "method"}
            found[at] = resolve(given["method"], of_run).to_dict()
        except InputError as error:  # a preset that is elsewhere, a flag of another version
            found[at] = given
            notes.append((visible(setting), f"{visible(one_line(error))} (its runs are shown with "
                          f"the settings that {TABLE} has)"))
    return found, notes

"""A file of a study's finished runs, from which the study can be continued on another machine.

A study of days may outlast the machine it began on, and others may want to compare a setting of
theirs to a published one without repeating it. runs.jsonl in the study's folder has a line for each
finished run: its settings, what it was made with, its history and its outcome, a few kilobytes in
place of a model and its checkpoints.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fedrun.common import locks
from fedrun.common.files import DamagedFile, finite, read_json, read_regular, write_atomic
from fedrun.records.outcome import read_outcome
from fedrun.records.run_dir import ENVIRONMENT
from fedrun.records.run_files import OUTCOME

RECORDS = "runs.jsonl"
PARAMETERS = "parameters"
"""Key of a recorded run's environment.json: how many its model has, which is not recorded."""
FAILED = "failed.txt"
"""Why a run failed that counts as one with an infinite loss."""
_HISTORY = "training_history.json"
_FILES: dict[str, type[Any]] = {
    "config.json": dict, ENVIRONMENT: dict, _HISTORY: list, OUTCOME: dict}
_LARGEST = 1 << 30  # bytes of a runs.jsonl
_PATIENCE = 60.0  # seconds in which another process that takes recorded runs may end


def write_records(study: Path) -> None:
    """Write the runs in a study's folder that are finished or have failed, in the order of their
    names, and keep the lines of those that have no folder."""
    runs = {path.name: path for path in (study / "runs").glob("*")
            if (path / FAILED).exists() or read_outcome(path).get("outcome") == "finished"}
    kept = {name: line for name, line in _read(study).items() if name not in runs}
    lines = {**kept, **{name: _record(path) for name, path in runs.items()}}
    write_atomic(study / RECORDS, "".join(
        json.dumps({"run": name, **finite(lines[name])}, allow_nan=False) + "\n"
        for name in sorted(lines)).encode())


def take_records(study: Path) -> int:
    """Make the missing folders of recorded runs; returns their number.

    Raises:
        DamagedFile: runs.jsonl is not what `write_records` writes.
    """
    (study / "queue").mkdir(parents=True, exist_ok=True)
    lock = locks.acquire(study / "queue" / "recorded.lock", _PATIENCE)
    taken, made = 0, study / "queue" / "recorded"
    try:
        for name, record in _read(study).items():
            if (study / "runs" / name).exists():
                continue
            shutil.rmtree(made, ignore_errors=True)  # of a process that was killed here
            made.mkdir()
            for file, content in record.items():
                text = content if file == FAILED else json.dumps(content, indent=1)
                (made / file).write_text(text, encoding="utf-8")
            (study / "runs").mkdir(exist_ok=True)
            os.rename(made, study / "runs" / name)
            taken += 1
    finally:
        lock.release()
    return taken


def _record(run: Path) -> dict[str, Any]:
    """A run's files by their names."""
    found = {name: read_json(run / name, kind) for name, kind in _FILES.items()
             if (run / name).exists()}
    found[_HISTORY] = [{k: v for k, v in record.items() if k not in ("generated", "prompt")}
                       for record in found.get(_HISTORY, [])]
    if (run / FAILED).exists():
        found[FAILED] = (run / FAILED).read_text(encoding="utf-8")
    elif PARAMETERS not in found[ENVIRONMENT]:
        found[ENVIRONMENT][PARAMETERS] = count_parameters(run)
    return found


def count_parameters(run: Path) -> int:
    """The number of parameters of a finished run's model, tied ones once.

    Raises:
        OSError, SafetensorError: its file is missing or damaged.
    """
    with safe_open(run / "model.safetensors", "numpy") as model:
        names: list[str] = model.keys()
        return sum(math.prod(model.get_slice(name).get_shape()) for name in names)


def _read(study: Path) -> dict[str, dict[str, Any]]:
    """The recorded runs by their names; {} without a file."""
    path = study / RECORDS
    if not path.exists():
        return {}
    found = {}
    for number, line in enumerate(read_regular(path, _LARGEST).splitlines(), 1):
        try:
            record = json.loads(line)
            name = record.pop("run")
            right = name == Path(name).name and all(
                isinstance(content, str if file == FAILED else _FILES[file])
                for file, content in record.items())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            right = False
        if not right:
            raise DamagedFile(f"{path}, line {number}: is not a run of a study")
        found[name] = record
    return found

"""Brings a resumed run's folder to the state that its checkpoint's step requires.

Folders are copied, damaged and edited. Whatever a checkpoint holds is written again from it; what
it does not hold, events and snapshots of earlier steps, is reported as missing.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedrun.common.files import DamagedFile, read_regular, write_json
from fedrun.common.log import WARNING, log
from fedrun.config import FederatedConfig, RunConfig
from fedrun.model.base import Model
from fedrun.records.checkpoint import GLOBAL, Checkpoint
from fedrun.records.events import Events
from fedrun.records.history import RunTotals
from fedrun.records.outcome import write_outcome
from fedrun.records.run_dir import ENVIRONMENT, MAX_EVENTS_BYTES
from fedrun.records.run_files import OUTCOME
from fedrun.records.schema import CENTRAL, FEDERATED, Schema
from fedrun.records.snapshots import save_model, save_snapshot, tracked_parameters
from fedrun.training.params import FlatParams

_FILES = ("config.json", ENVIRONMENT, OUTCOME, "events.jsonl", "training_history.json",
          "model.safetensors", "tracker.json")
_FOLDERS = ("checkpoints", "tokenizer", "params", "deltas", "server", "clients", "best",
            "tensorboard")


def _schema(config: RunConfig) -> Schema:
    return FEDERATED if isinstance(config, FederatedConfig) else CENTRAL


def move_obstacles(run_dir: Path) -> None:
    """Rename, with a warning, whatever has the name of a run's file or folder and is something
    else: it could not be written over, or, like a pipe, would never end when it is read."""
    for names, kind, fits in ((_FILES, "file", Path.is_file), (_FOLDERS, "folder", Path.is_dir)):
        for path in (run_dir / name for name in names):
            if (path.exists() or path.is_symlink()) and not fits(path):
                moved = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
                path.rename(moved)
                log(f"{path} is not a {kind}; renamed to {moved.name}", WARNING)


def warn_of_missing_records(config: RunConfig, checkpoint: Checkpoint) -> None:
    """A warning for each kind of record that the folder lacks of the steps up to a checkpoint's:
    events, snapshots."""
    run_dir = config.run_dir
    schema = _schema(config)
    root = run_dir / schema.snapshots
    recorded = {str(event.get(schema.unit)) for event in _events(run_dir / "events.jsonl")}
    events = [step for step in range(1, checkpoint.step + 1) if str(step) not in recorded]
    evaluated = [record[schema.step] for record in checkpoint.server["history"]]
    snapshots = [step for step in evaluated if config.model.tracks_parameters and not all(
        (root / kind / f"step_{step:06d}.npz").is_file() for kind in ("params", "deltas"))]
    for what, missing, path in (("events", events, run_dir / "events.jsonl"),
                                ("saved parameters", snapshots, root / "params")):
        if missing:
            log(f"{what} of {len(missing)} of the first {checkpoint.step} {schema.unit}s are "
                f"missing from {path}", WARNING)


def _events(path: Path) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    with suppress(OSError, DamagedFile):
        for line in read_regular(path, largest=MAX_EVENTS_BYTES).split(b"\n"):
            with suppress(ValueError, RecursionError):
                event = json.loads(line)
                if isinstance(event, dict):
                    found.append(event)
    return found


def finish_from_checkpoint(config: RunConfig, checkpoint: Checkpoint, model: Model) -> None:
    """Rank 0, after `prepare_run_dir`: write the results of a run from the checkpoint of its last
    step. The run was killed after that checkpoint, before it wrote them.

    model: the run's model at its start, on the CPU.
    """
    schema = _schema(config)
    run_dir, state = config.run_dir, checkpoint.server
    flat = FlatParams(model, config.personal if isinstance(config, FederatedConfig) else None)
    start = tracked_parameters(flat, flat.vector)
    flat.vector.copy_(checkpoint.tensors(GLOBAL)["model"])
    save_model(run_dir / "model.safetensors", flat.views(flat.vector))
    write_json(run_dir / "training_history.json", state["history"])
    save_snapshot(run_dir / schema.snapshots, checkpoint.step,
                  tracked_parameters(flat, flat.vector), start)
    totals = RunTotals()
    totals.load_state(state["clocks"])
    events = Events(dataclasses.replace(config, track="none"), schema.unit, checkpoint.step,
                    checkpoint.step)
    events.add("end", **totals.now())
    events.close()
    write_outcome(run_dir, "finished", checkpoint.step)

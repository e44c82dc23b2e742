"""What a run's folder has to hold at a checkpoint's step, made again or missed by name.

Folders are copied, damaged and edited: whatever a checkpoint holds is written from it, and what it
does not hold (events and saved parameters of earlier steps) is said to be lost.
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
from fedrun.config import FederatedConfig, RunConfig
from fedrun.model.mamba2 import Mamba2LM
from fedrun.records.checkpoint import GLOBAL, Checkpoint
from fedrun.records.history import RunTotals
from fedrun.records.run_dir import (
    ENVIRONMENT,
    LARGEST_EVENTS,
    save_model,
    save_snapshot,
    studied,
    write_outcome,
)
from fedrun.records.run_files import OUTCOME
from fedrun.records.track import Events
from fedrun.training.params import FlatParams

_FILES = ("config.json", ENVIRONMENT, OUTCOME, "events.jsonl", "training_history.json",
          "model.safetensors")
_FOLDERS = ("checkpoints", "tokenizer", "params", "deltas", "server", "clients")


def set_aside(run_dir: Path) -> list[str]:
    """Rename whatever stands where a run writes a file or a folder and is another kind of thing,
    which nothing could be written over or which would never end. A line for each."""
    said = []
    for names, fits in ((_FILES, Path.is_file), (_FOLDERS, Path.is_dir)):
        for path in (run_dir / name for name in names):
            if (path.exists() or path.is_symlink()) and not fits(path):
                aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
                path.rename(aside)
                said.append(f"warning: {path} is no {'file' if fits is Path.is_file else 'folder'};"
                            f" it is now {aside.name}")
    return said


def lost(config: RunConfig, found: Checkpoint) -> list[str]:
    """A line for each kind of what a run notes of its steps and its folder does not hold of those
    that lie behind it."""
    run_dir = config.run_dir
    federated = isinstance(config, FederatedConfig)
    unit, root = ("round", run_dir / "server") if federated else ("step", run_dir)
    told = {str(event.get(unit)) for event in _events(run_dir / "events.jsonl")}
    missing = [step for step in range(1, found.step + 1) if str(step) not in told]
    steps = [record.get("global_step", record.get("step")) for record in found.server["history"]]
    files = [step for step in steps if not all(
        (root / kind / f"step_{step:06d}.npz").is_file() for kind in ("params", "deltas"))]
    return [f"warning: {what} of {len(of)} of the first {found.step} {unit}s are not in {where}"
            for what, of, where in (("events", missing, run_dir / "events.jsonl"),
                                    ("saved parameters", files, root / "params")) if of]


def _events(path: Path) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    with suppress(OSError, DamagedFile):
        for line in read_regular(path, largest=LARGEST_EVENTS).split(b"\n"):
            with suppress(ValueError, RecursionError):
                event = json.loads(line)
                if isinstance(event, dict):
                    found.append(event)
    return found


def complete(config: RunConfig, found: Checkpoint, model: Mamba2LM) -> None:
    """Rank 0: finish the folder of a run whose last step a checkpoint holds, and that was ended
    before it could say so. `prepare_run_dir` has been here."""
    federated = isinstance(config, FederatedConfig)
    run_dir, state = config.run_dir, found.server
    flat = FlatParams(model)
    start = studied(flat.views(flat.vector))
    flat.vector.copy_(found.tensors(GLOBAL)["model"])
    save_model(run_dir / "model.safetensors", flat.views(flat.vector))
    write_json(run_dir / "training_history.json", state["history"])
    save_snapshot(run_dir / "server" if federated else run_dir, found.step,
                 studied(flat.views(flat.vector)), start)
    clocks = RunTotals()
    clocks.load_state(state["clocks"])
    events = Events(dataclasses.replace(config, track="none"), "round" if federated else "step",
                    found.step, found.step)
    events.add("end", **clocks.now())
    events.close()
    write_outcome(run_dir, "finished", found.step)

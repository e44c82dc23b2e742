"""How a run begins: anew, from a checkpoint, or not at all, since it is finished.

Rank 0 decides, holding the run's folder by a lock, and tells the others when they are connected.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedrun import __version__, checkpoint, run_files, rundir
from fedrun.checkpoint import Checkpoint
from fedrun.config import Dtype, RunConfig
from fedrun.errors import explain
from fedrun.files import write_json


class Refused(ValueError):
    """The run cannot begin as it was asked to; all ranks say so."""


@dataclass(frozen=True)
class Beginning:
    """What rank 0 found; travels as JSON."""

    dtype: Dtype
    """Of the matrix products: what a run began with is what it goes on with."""
    token: str
    """What every rank must see in the lock of the run's folder."""
    checkpoint: str | None = None
    """The folder to go on from."""
    finished: bool = False

    def open(self) -> Checkpoint | None:
        """Any rank: the checkpoint, which rank 0 has compared with its checksums."""
        return None if self.checkpoint is None else checkpoint.trusted(Path(self.checkpoint))


def begin(config: RunConfig, resolve_dtype: Callable[[RunConfig], Dtype],
          made_with: dict[str, Any], say: Callable[[str], None]) -> Beginning:
    """Rank 0: take the run's folder and decide; nothing in it is changed yet.

    made_with: what beside the settings decides the bits; `corpus`, `partition` and `kernels` have
    to be as they were, `versions` should. Refused where the folder is another's, holds another
    run, or cannot be written.
    """
    path, token = config.run_dir, secrets.token_hex(8)
    try:
        _held_config(config)  # before a lock is put into a folder that is no run's
        rundir.lock(path, token)
        held = _held_config(config)
        if not _replaces(config):
            _refuse_other(config, held, resolve_dtype)
        if _anew(config):
            held = None
        if held and rundir.read_outcome(path).get("outcome") == "finished":
            return Beginning(_dtype(config, held, resolve_dtype), token, finished=True)
        found = _to_go_on_from(config, held, say)
        if found:
            _refuse_other(config, found.config, resolve_dtype, str(found.folder))
            _compare_makings(found, made_with, say)
            say(f"goes on after step {found.step}, from {found.folder}")
        dtype = _dtype(config, found.config if found else None, resolve_dtype)
        return Beginning(dtype, token, str(found.folder) if found else None)
    except OSError as error:
        raise Refused(f"--data_dir {config.data_dir}: the folder {path} cannot be used: "
                      f"{explain(error)}") from None
    except ValueError as error:
        raise Refused(str(error)) from None


def make_ready(config: RunConfig, found: Checkpoint | None) -> None:
    """Rank 0, when all ranks have agreed: the folder as the beginning needs it, whatever it held.

    A kill between any two lines leaves a folder that the same command can begin from.
    """
    path = config.run_dir
    inside = found is not None and found.folder.resolve().is_relative_to(path.resolve())
    if found and inside:
        checkpoint.drop_after(path, found.step)
        rundir.cut_back(path, found.step)
    else:
        rundir.empty(path, lambda: _describe(config, 0))
    _describe(config, found.step if found else 0)


def _describe(config: RunConfig, step: int) -> None:
    rundir.write_outcome(config.run_dir, "running", step)
    write_json(config.run_dir / "config.json", {run_files.MARK: __version__} | config.to_dict())


def _restarted(run_dir: Path) -> bool:
    """Whether a launcher starts again what it had begun in this folder."""
    again = any(os.environ.get(name, "0") != "0"
                for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return again and rundir.read_outcome(run_dir).get("launch") == rundir.launch_id()


def _replaces(config: RunConfig) -> bool:
    """Whether the user asked for whatever is there to be replaced."""
    return config.overwrite and not _restarted(config.run_dir)


def _anew(config: RunConfig) -> bool:
    """Whether the user asked for a new beginning; a launcher that restarts the job did not."""
    return _replaces(config) or (config.resume == "never" and not _restarted(config.run_dir))


def _held_config(config: RunConfig) -> dict[str, Any] | None:
    """The settings of the run that the folder holds; None where there is none, or no more of it
    than an incomplete start leaves.

    ValueError where the folder holds something else, and where it was to be emptied for
    --overwrite and holds anything that a run does not write.
    """
    path = config.run_dir
    if not path.exists():
        return None
    held = run_files.settings(path)
    if held is None and not run_files.just_begun(path):
        raise ValueError(f"--run_name {config.name}: {path} exists and is no run's folder; "
                         "choose another --run_name or --data_dir")
    if _replaces(config) and (other := run_files.foreign(path)):
        raise ValueError(f"--overwrite: {other} is not written by a run; move it out of the run's "
                         "folder, or choose another --run_name")
    return held


def _to_go_on_from(config: RunConfig, held: dict[str, Any] | None, say: Callable[[str], None]
                   ) -> Checkpoint | None:
    """The checkpoint that --resume and the folder's run amount to; None to begin anew."""
    named = None if config.resume in ("auto", "never") else Path(config.resume)
    inside = named is not None and named.resolve().is_relative_to(config.run_dir.resolve())
    if named and inside and not _restarted(config.run_dir):
        return _named(named, say)
    # Where another run is named, it is where this one began: it goes on from its own checkpoints.
    own = checkpoint.latest(config.run_dir, say) if held else None
    return own if own or named is None else _named(named, say)


def _named(path: Path, say: Callable[[str], None]) -> Checkpoint:
    """What `--resume PATH` means: a checkpoint, or the newest one of a run."""
    if (path / checkpoint.MANIFEST).exists():
        return checkpoint.read(path)
    if found := checkpoint.latest(path, say):
        return found
    raise ValueError(f"--resume {path}: no checkpoint there; accepted is auto, never, a run's "
                     "folder or one of its checkpoints")


def _dtype(config: RunConfig, recorded: dict[str, Any] | None,
           resolve_dtype: Callable[[RunConfig], Dtype]) -> Dtype:
    """The type of products: for --dtype auto the one that the run began with."""
    if config.dtype == "auto" and recorded is not None:
        config = dataclasses.replace(config, dtype=recorded["dtype"])
    return resolve_dtype(config)


def _refuse_other(config: RunConfig, held: dict[str, Any] | None,
                  resolve_dtype: Callable[[RunConfig], Dtype], where: str = "") -> None:
    """ValueError, with the settings that differ, for a folder that holds another run."""
    if held is None:
        return
    config = dataclasses.replace(config, dtype=_dtype(config, held, resolve_dtype))
    mine = json.loads(json.dumps(config.results_dict()))
    if differing := [k for k in mine if held.get(k) != mine[k]]:
        told = ", ".join(f"{k} {held.get(k)} there, {mine[k]} here" for k in differing)
        raise ValueError(f"--run_name {config.name}: {where or config.run_dir} holds a run with "
                         f"other settings ({told}); choose another --run_name, or --overwrite to "
                         "replace it")


def _compare_makings(found: Checkpoint, made_with: dict[str, Any], say: Callable[[str], None]
                     ) -> None:
    """ValueError where the text, the shards or the kernels are not those that the checkpoint was
    made with; a word where a version is not."""
    for name, flag in (("corpus", "--dataset"), ("partition", "--partition"),
                       ("kernels", "--device")):
        if found.made_with[name] != made_with[name]:
            raise ValueError(f"{flag}: the {name} of this run was {found.made_with[name]} and is "
                             f"{made_with[name]} now; --overwrite begins anew")
    if found.made_with["versions"] != made_with["versions"]:
        say(f"warning: begun with {found.made_with['versions']}, goes on with "
            f"{made_with['versions']}: the last bits may differ")

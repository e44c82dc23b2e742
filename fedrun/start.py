"""How a run begins: from scratch, from a checkpoint, or not at all, since it is finished.

Rank 0 decides, holding the run's folder by a lock, and tells the others when they are connected.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from fedrun import __version__
from fedrun.common.errors import InputError, explain
from fedrun.common.files import DamagedFile, read_json, write_json
from fedrun.config import Dtype, RunConfig
from fedrun.records import checkpoint, run_files
from fedrun.records import run_dir as run_folder
from fedrun.records.checkpoint import Checkpoint
from fedrun.records.provenance import Length, check_provenance, other_settings, shown, told
from fedrun.records.run_dir import ENVIRONMENT


class RunRefused(InputError):
    """The run cannot begin as it was asked to; all ranks say so."""


@dataclass(frozen=True)
class StartDecision:
    """What rank 0 found; travels as JSON."""

    dtype: Dtype
    """Of the matrix products: a run keeps the one that it began with."""
    token: str
    """What every rank must see in the lock of the run's folder."""
    checkpoint: str | None = None
    """The folder to resume from."""
    finished: bool = False
    """Nothing is left to do."""
    complete: bool = False
    """All is trained, and the checkpoint's step was the last: its folder may lack what a finished
    run's has."""

    def open(self) -> Checkpoint | None:
        """Any rank: the checkpoint, which rank 0 has compared with its checksums."""
        return None if self.checkpoint is None else checkpoint.open_unverified(Path(self.checkpoint))


def decide_start(config: RunConfig, length: Length, resolve_dtype: Callable[[RunConfig], Dtype],
          provenance: dict[str, Any], say: Callable[[str], None]) -> StartDecision:
    """Rank 0: take the run's folder and decide; nothing in it is changed yet.

    provenance: what beside the settings decides the bits; what was read, shards and kernels have to
    be as they were, `versions` should. RunRefused where the folder is another's, holds another run, or
    cannot be written.
    """
    path, token = config.run_dir, secrets.token_hex(8)
    try:
        _held_config(config)  # before a lock is put into a folder that is no run's
        run_folder.lock(path, token)
        held = _held_config(config)
        named = _named_folder(config)
        if not _replaces(config):
            _refuse_other(config, held, _makings(path), provenance, resolve_dtype)
        if _anew(config):
            held = None
        finished = _finished_after(path) if held else None
        if finished == length.steps:
            return StartDecision(_dtype(config, held, resolve_dtype), token, finished=True)
        found = _to_resume_from(config, held, named, say)
        if finished:
            _refuse_to_extend(config, length, finished, found)
        if found is None:
            return StartDecision(_dtype(config, None, resolve_dtype), token)
        _refuse_other(config, found.config, found.provenance, provenance, resolve_dtype,
                      str(found.folder))
        check_provenance(found.provenance, provenance, say)
        complete = _compare_lengths(config, length, found, say)
        say(f"goes on after step {found.step}, from {found.folder}")
        return StartDecision(_dtype(config, found.config, resolve_dtype), token, str(found.folder),
                         complete=complete)
    except OSError as error:
        raise RunRefused(f"--data_dir {config.data_dir}: the folder {path} cannot be used: "
                      f"{explain(error)}") from None
    except ValueError as error:
        raise RunRefused(str(error)) from None


def prepare_run_dir(config: RunConfig, found: Checkpoint | None) -> None:
    """Rank 0, when all ranks have agreed: the folder as the beginning needs it, whatever it held.

    A kill between any two lines leaves a folder that the same command can begin from.
    """
    path = config.run_dir
    inside = found is not None and found.folder.resolve().is_relative_to(path.resolve())
    if found and inside:
        checkpoint.delete_after(path, found.step)
        run_folder.truncate_after(path, found.step)
    else:
        run_folder.clear(path, lambda: _describe(config, 0))
    _describe(config, found.step if found else 0)


def _describe(config: RunConfig, step: int) -> None:
    run_folder.write_outcome(config.run_dir, "running", step)
    write_json(config.run_dir / "config.json", {run_files.MARK: __version__} | config.to_dict())


def _restarted(run_dir: Path) -> bool:
    """Whether a launcher starts again what it had begun in this folder."""
    again = any(os.environ.get(name, "0") != "0"
                for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return again and run_folder.read_outcome(run_dir).get("launch") == run_folder.launch_id()


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
        raise InputError(f"--run_name {config.name}: {path} exists and is no run's folder; "
                         "choose another --run_name or --data_dir")
    if _replaces(config) and (other := run_files.foreign(path)):
        raise InputError(f"--overwrite: {other} is not written by a run; move it out of the run's "
                         "folder, or choose another --run_name")
    return held


def _makings(run_dir: Path) -> dict[str, Any]:
    """What the run in a folder was made with, as it noted itself; {} where it did not."""
    with suppress(OSError, DamagedFile):
        noted = read_json(run_dir / ENVIRONMENT, dict).get("made_with")
        return noted if isinstance(noted, dict) else {}
    return {}


def _finished_after(run_dir: Path) -> int | None:
    """The steps of the run in a folder, where it is finished."""
    outcome = run_folder.read_outcome(run_dir)
    step = outcome.get("step")
    return step if outcome.get("outcome") == "finished" and type(step) is int else None


def _named_folder(config: RunConfig) -> Path | None:
    """The folder that --resume names, if it names one. ValueError where it is not there, unless a
    launcher restarts the run, which has a folder of its own by now."""
    if config.resume in ("auto", "never"):
        return None
    path = Path(config.resume).expanduser()
    if not path.is_dir() and not _restarted(config.run_dir):
        raise InputError(f"--resume {config.resume}: there is no such folder; accepted is auto, "
                         "never, a run's folder or one of its checkpoints")
    return path


def _to_resume_from(config: RunConfig, held: dict[str, Any] | None, named: Path | None,
                    say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that --resume and the folder's run amount to; None to start over."""
    restarted = _restarted(config.run_dir)
    inside = named is not None and named.resolve().is_relative_to(config.run_dir.resolve())
    if named and inside and not restarted:
        return _named(named, say)
    # Where another run is named, it is where this one began: it has its own checkpoints by now.
    own = checkpoint.latest_valid(config.run_dir, say) if held else None
    if own and named and not restarted:
        say(f"--resume {named} is not taken: {config.run_dir} has checkpoints of its own "
            "(--overwrite starts over from the one that is named)")
    return own if own or named is None else _named(named, say)


def _refuse_to_extend(config: RunConfig, length: Length, finished: int, found: Checkpoint | None
                      ) -> None:
    """ValueError where a finished run cannot become one of `length`."""
    if length.steps < finished:
        raise InputError(f"{length.flag}: {config.run_dir} is finished after {shown(finished)} "
                         f"steps, more than {length.steps}; choose another --run_name, or "
                         "--overwrite to start over")
    if found is None:
        raise InputError(f"{length.flag}: {config.run_dir} is finished after {finished} steps and "
                         "kept no checkpoint (--checkpoint_freq) to train it further from; "
                         "--overwrite starts over")


def _compare_lengths(config: RunConfig, length: Length, found: Checkpoint,
                     say: Callable[[str], None]) -> bool:
    """Whether all is trained that is asked for. ValueError where less is asked for than is done, or
    where another length would change what was done already."""
    before, now = length.of(found.config), length.steps
    if found.step > now:
        raise InputError(f"{length.flag}: {found.folder} is {found.step} steps into its run, more "
                         f"than {now}; choose another --run_name, or --overwrite to start over")
    if before != now and config.lr_schedule != "constant":
        if not config.extend:
            raise InputError(f"{length.flag}: this run was one of {before} steps, on which its "
                             f"learning rates depend (--lr_schedule {config.lr_schedule}): trained "
                             f"further, it is not one long run of {now}; --extend does so anyway")
        say(f"warning: trained further from step {found.step}, with the learning rates of a run of "
            f"{now} steps: the result differs from one long run's")
    if found.step < now:
        return False
    last = found.server["history"][-1:]
    if not last or last[0].get("global_step", last[0].get("step")) != now:
        raise InputError(f"{length.flag}: the run has done {now} steps already, and was stopped "
                         "there without an evaluation; accepted is more")
    return True


def _named(path: Path, say: Callable[[str], None]) -> Checkpoint:
    """What `--resume PATH` means: a checkpoint, or the newest one of a run."""
    if (path / checkpoint.MANIFEST).exists():
        return checkpoint.read(path)
    if found := checkpoint.latest_valid(path, say):
        return found
    raise InputError(f"--resume {path}: no checkpoint there; accepted is auto, never, a run's "
                     "folder or one of its checkpoints")


def _dtype(config: RunConfig, recorded: dict[str, Any] | None,
           resolve_dtype: Callable[[RunConfig], Dtype]) -> Dtype:
    """The type of products: for --dtype auto the one that the run began with."""
    if config.dtype == "auto" and recorded and recorded.get("dtype") in get_args(Dtype):
        config = dataclasses.replace(config, dtype=recorded["dtype"])
    return resolve_dtype(config)


def _refuse_other(config: RunConfig, held: dict[str, Any] | None, then: dict[str, Any],
                  now: dict[str, Any], resolve_dtype: Callable[[RunConfig], Dtype],
                  where: str = "") -> None:
    """ValueError, with the settings that differ, for a folder that holds another run.

    then, now: what that run and this one are made with.
    """
    if held is None:
        return
    config = dataclasses.replace(config, dtype=_dtype(config, held, resolve_dtype))
    if differences := other_settings(config, held, then, now):
        raise InputError(f"--run_name {config.name}: {where or config.run_dir} holds a run with "
                         f"other settings ({told(differences)}); choose another --run_name, or "
                         "--overwrite to replace it")

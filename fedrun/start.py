"""How a run starts: from scratch, from a checkpoint, or not at all because it is finished.

Rank 0 decides, holding the lock of the run's folder, and sends its decision to the other ranks.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from fedrun import __version__
from fedrun.common.errors import InputError, explain
from fedrun.common.files import DamagedFile, read_json, write_json
from fedrun.common.log import WARNING, log
from fedrun.config import Dtype, RunConfig
from fedrun.records import checkpoint, run_files
from fedrun.records.checkpoint import Checkpoint
from fedrun.records.outcome import is_restart, read_outcome, write_outcome
from fedrun.records.provenance import (
    Length,
    abbreviated,
    check_provenance,
    conflicting_settings,
    describe_differences,
)
from fedrun.records.run_dir import ENVIRONMENT, clear_run_dir, truncate_after
from fedrun.records.run_lock import lock_run_dir
from fedrun.records.schema import read_field
from fedrun.records.site_states import Holdings, new_run_id

_RESUME_VALUES = "auto, never, a run's folder or one of its checkpoints"


class RunRefused(InputError):
    """The run cannot start as it was asked to. Raised on all ranks."""

    on_all_ranks = True


@dataclass(frozen=True)
class StartDecision:
    """What rank 0 decided; sent to the other ranks as JSON."""

    dtype: Dtype
    """Type of the matrix products. A resumed run keeps the type it was started with."""
    token: str
    """What every rank must read in the lock of the run's folder."""
    checkpoint: str | None = None
    """The folder of the checkpoint to resume from; None to start from scratch, and in a run of real
    sites, which have no such folder."""
    step: int | None = None
    """The step of that checkpoint, in any run."""
    finished: bool = False
    """The run is finished: there is nothing to do."""
    fully_trained: bool = False
    """The checkpoint is of the run's last step. Nothing is left to train, but the folder may lack
    files of a finished run."""

    def open(self, run_dir: Path | None = None) -> Checkpoint | None:
        """On any rank: the checkpoint, which rank 0 has verified. In a run of real sites on rank 0
        alone, whose folder of the run is `run_dir`; a site has `SiteStates.open`."""
        if self.checkpoint is not None:
            return checkpoint.open_unverified(Path(self.checkpoint))
        if self.step is None:
            return None
        assert run_dir is not None
        return checkpoint.open_unverified(checkpoint.folder_of(run_dir, self.step))


def run_id(config: RunConfig) -> str:
    """The server of a run of real sites, before it connects: the id of the run in the folder, or a
    new one where there is none or it is to be replaced. Writes nothing.

    Raises InputError if the folder is not a run's.
    """
    recorded = _recorded_config(config)
    if recorded is None or _starts_over(config):
        return new_run_id()
    return str(recorded.get(run_files.RUN_ID) or new_run_id())


def decide_start(config: RunConfig, length: Length, resolve_dtype: Callable[[RunConfig], Dtype],
                 provenance: dict[str, Any], holdings: Holdings | None = None) -> StartDecision:
    """Rank 0: lock the run's folder and decide how the run starts. Nothing else is written yet.

    provenance: what decides the bits besides the settings. For a resumed run, inputs, shards
    and kernels must be the same; `versions` should be. holdings: what real sites hold of the run.
    Raises RunRefused if the folder is in use or cannot be written, is not a run's, or holds another
    run, or if the sites hold no step in common.
    """
    path, token = config.run_dir, secrets.token_hex(8)
    try:
        _recorded_config(config)  # refuses folders that are not a run's before a lock is put there
        lock_run_dir(path, token)
        recorded = _recorded_config(config)
        named = _folder_to_resume(config)
        if not _overwrites(config):
            _refuse_another_run(config, recorded, _recorded_provenance(path), provenance,
                                resolve_dtype)
        if _starts_over(config):
            recorded = None
        _refuse_other_owners(config, recorded, holdings)
        finished = None if recorded is None else _finished_step(path)
        if finished == length.steps:
            return StartDecision(_dtype(config, recorded, resolve_dtype), token, finished=True)
        found = (_checkpoint_to_resume(config, recorded, named) if holdings is None else
                 _checkpoint_of_sites(config, recorded, named, holdings))
        if finished is not None:
            _refuse_to_extend(config, length, finished, found)
        if found is None:
            return StartDecision(_dtype(config, None, resolve_dtype), token)
        _refuse_another_run(config, found.config, found.provenance, provenance, resolve_dtype,
                            str(found.folder))
        check_provenance(found.provenance, provenance)
        fully_trained = _check_length(config, length, found)
        log(f"resuming from step {found.step}, from {found.folder}")
        return StartDecision(_dtype(config, found.config, resolve_dtype), token,
                             None if holdings else str(found.folder), found.step,
                             fully_trained=fully_trained)
    except OSError as error:
        raise RunRefused(f"--data_dir {config.data_dir}: the folder {path} cannot be used: "
                         f"{explain(error)}") from None
    except ValueError as error:
        raise RunRefused(str(error)) from None


def prepare_run_dir(config: RunConfig, found: Checkpoint | None, run: str = "") -> None:
    """Rank 0, when all ranks have agreed to start: bring the folder to the state that the start
    requires. found: the checkpoint to resume from. run: the id of a run of real sites.

    After a kill between any two lines the same command can start from what is left.
    """
    path = config.run_dir
    if found is not None and found.folder.resolve().is_relative_to(path.resolve()):
        checkpoint.delete_after(path, found.step)
        truncate_after(path, found.step)
    else:
        clear_run_dir(path, lambda: _write_description(config, 0, run))
    _write_description(config, 0 if found is None else found.step, run)


def _write_description(config: RunConfig, step: int, run: str) -> None:
    write_outcome(config.run_dir, "running", step)
    write_json(config.run_dir / "config.json", {run_files.MARK: __version__} | (
        {run_files.RUN_ID: run} if run else {}) | config.to_dict())


def _overwrites(config: RunConfig) -> bool:
    """Whether the user asked to replace whatever is in the folder."""
    return config.overwrite and not is_restart(config.run_dir)


def _starts_over(config: RunConfig) -> bool:
    """Whether the user asked to start over. A launcher that restarts the job did not: the flags are
    from the first start."""
    return _overwrites(config) or (config.resume == "never" and not is_restart(config.run_dir))


def _recorded_config(config: RunConfig) -> dict[str, Any] | None:
    """The settings of the run in the folder; None if there is no run, or only what an incomplete
    start leaves.

    Raises InputError if the folder is not a run's, and, with --overwrite, if it also holds files
    that no run writes.
    """
    path = config.run_dir
    if not path.exists():
        return None
    recorded = run_files.recorded_settings(path)
    if recorded is None and not run_files.holds_only_a_start(path):
        raise InputError(f"--run_name {config.name}: {path} exists and is not a run's folder; "
                         "choose another --run_name or --data_dir")
    if _overwrites(config) and (other := run_files.foreign(path)):
        raise InputError(f"--overwrite: {other} is not written by a run; move it out of the run's "
                         "folder, or choose another --run_name")
    return recorded


def _recorded_provenance(run_dir: Path) -> dict[str, Any]:
    """The provenance in a folder's environment.json; {} if it is missing or damaged."""
    with suppress(OSError, DamagedFile):
        recorded = read_json(run_dir / ENVIRONMENT, dict).get("made_with")
        return recorded if isinstance(recorded, dict) else {}
    return {}


def _finished_step(run_dir: Path) -> int | None:
    """The last step of the run in a folder; None if it is not finished."""
    outcome = read_outcome(run_dir)
    step = outcome.get("step")
    return step if outcome.get("outcome") == "finished" and type(step) is int else None


def _folder_to_resume(config: RunConfig) -> Path | None:
    """The folder that --resume names; None if it names none. Raises InputError if it does not
    exist, unless a launcher restarts the run, which then has checkpoints of its own."""
    if config.resume in ("auto", "never"):
        return None
    path = Path(config.resume).expanduser()
    if not path.is_dir() and not is_restart(config.run_dir):
        raise InputError(f"--resume {config.resume}: no such folder; must be {_RESUME_VALUES}")
    return path


def _checkpoint_to_resume(config: RunConfig, recorded: dict[str, Any] | None, named: Path | None
                          ) -> Checkpoint | None:
    """The checkpoint to resume from; None to start from scratch.

    recorded: settings of the run in the folder. named: the folder that --resume names.
    """
    restart = is_restart(config.run_dir)
    if (named is not None and not restart
            and named.resolve().is_relative_to(config.run_dir.resolve())):
        return _checkpoint_in(named)
    # A named folder of another run is where this one was started from: its own checkpoints are
    # newer.
    own = None if recorded is None else checkpoint.latest_valid(config.run_dir)
    if named is None:
        return own
    if own is None:
        return _checkpoint_in(named)
    if not restart:
        log(f"--resume {named} is ignored: {config.run_dir} has checkpoints of its own "
            f"(--overwrite starts over from {named})")
    return own


def _checkpoint_of_sites(config: RunConfig, recorded: dict[str, Any] | None, named: Path | None,
                         holdings: Holdings) -> Checkpoint | None:
    """The same in a run of real sites, which hold their clients' states of this run alone."""
    if recorded is not None and holdings.refusal:
        raise InputError(f"--resume: {holdings.refusal}")
    if named is None or is_restart(config.run_dir):
        return None if recorded is None else holdings.newest(config.run_dir)
    if recorded is None or not named.resolve().is_relative_to(config.run_dir.resolve()):
        raise InputError(f"--resume {named}: with --site_dir must be auto, never or a checkpoint "
                         "of this run, since sites hold no clients' states of others; --init_from "
                         "starts from another run's model")
    found = _checkpoint_in(named)
    if lacking := holdings.lacking(found):
        raise InputError(f"--resume {named}: {', '.join(lacking)} no longer "
                         f"{'holds' if len(lacking) == 1 else 'hold'} step {found.step}")
    return found


def _refuse_other_owners(config: RunConfig, recorded: dict[str, Any] | None,
                         holdings: Holdings | None) -> None:
    """Raise InputError if the run in the folder had other sites than this start, or real ones where
    this has simulated ones."""
    if recorded is None:
        return
    there, here = recorded.get(run_files.RUN_ID), None if holdings is None else holdings.run
    if there is None and here is not None:
        raise InputError(f"--site_dir: the run in {config.run_dir} was started without it, so no "
                         "site holds its clients' states; choose another --run_name")
    if there is not None and here is None:
        raise InputError(f"--site_dir: the run in {config.run_dir} was started with it, so its "
                         "clients' states are at their sites; give it on all ranks, or choose "
                         "another --run_name")
    if there != here:
        raise InputError(f"{config.run_dir} was changed by another start meanwhile; give the same "
                         "command again")


def _checkpoint_in(path: Path) -> Checkpoint:
    """The checkpoint that `--resume PATH` means: PATH itself, or the newest one of a run."""
    if (path / checkpoint.MANIFEST).exists():
        return checkpoint.read(path)
    found = checkpoint.latest_valid(path)
    if found is None:
        raise InputError(f"--resume {path}: no checkpoint there; must be {_RESUME_VALUES}")
    return found


def _refuse_to_extend(config: RunConfig, length: Length, finished: int, found: Checkpoint | None
                      ) -> None:
    """Raise InputError if a run that finished after `finished` steps cannot become one of `length`.
    """
    if length.steps < finished:
        raise InputError(f"{length.flag}: {config.run_dir} is finished after "
                         f"{abbreviated(finished)} steps, more than {length.steps}; choose another "
                         "--run_name, or --overwrite to start over")
    if found is None:
        raise InputError(f"{length.flag}: {config.run_dir} is finished after {finished} steps and "
                         "kept no checkpoint (--checkpoint_freq) to train further from; "
                         "--overwrite starts over")


def _check_length(config: RunConfig, length: Length, found: Checkpoint) -> bool:
    """Whether the checkpoint is of the last step asked for.

    Raises InputError if it is past that step, if the new length would change the learning rates of
    the steps done, or if the last step lacks its evaluation.
    """
    before, now = length.of(found.config), length.steps
    if found.step > now:
        raise InputError(f"{length.flag}: {found.folder} is at step {found.step}, more "
                         f"than {now}; choose another --run_name, or --overwrite to start over")
    if before != now and config.lr_schedule != "constant":
        if not config.extend:
            raise InputError(f"{length.flag}: this run was started with {before} steps, on which "
                             f"its learning rates depend (--lr_schedule {config.lr_schedule}): "
                             f"trained further, it differs from one run of {now} steps; "
                             + ("--extend allows that" if getattr(
                                 config, "local_updates_schedule", "constant") == "constant" else
                                "and so do its rounds (--local_updates_schedule quadratic)"))
        log(f"training further from step {found.step} with the learning rates of a run of {now} "
            "steps: the result differs from that of one long run", WARNING)
    elif before != now and found.step == before and getattr(config, "overlap", False):
        if not config.extend:
            raise InputError(f"{length.flag}: this run was started with {before} steps, and waited "
                             "for the last one's sum (--overlap): trained further, it differs from "
                             f"one run of {now} steps; --extend allows that")
        log(f"training further from step {found.step}, whose sum clients have not trained beside: "
            "the result differs from that of one long run", WARNING)
    if found.step < now:
        return False
    if before is not None and found.step < before and getattr(config, "overlap", False):
        raise InputError(f"{length.flag}: the run has already done {now} steps, but with --overlap "
                         "its model is without the last one's update; must be more")
    last = found.server["history"][-1:]
    if not last or read_field(last[0], "step") != now:
        raise InputError(f"{length.flag}: the run has already done {now} steps, and was stopped "
                         "there without an evaluation; must be more")
    return True


def _dtype(config: RunConfig, recorded: dict[str, Any] | None,
           resolve_dtype: Callable[[RunConfig], Dtype]) -> Dtype:
    """The type of the matrix products. For --dtype auto, the one that the run was started with."""
    if config.dtype == "auto" and recorded and recorded.get("dtype") in get_args(Dtype):
        config = dataclasses.replace(config, dtype=recorded["dtype"])
    return resolve_dtype(config)


def _refuse_another_run(config: RunConfig, recorded: dict[str, Any] | None,
                        recorded_provenance: dict[str, Any], provenance: dict[str, Any],
                        resolve_dtype: Callable[[RunConfig], Dtype], where: str = "") -> None:
    """Raise InputError, with the settings that differ, if `recorded` are those of another run.

    where: the folder that records them, if not the run's.
    """
    if recorded is None:
        return
    config = dataclasses.replace(config, dtype=_dtype(config, recorded, resolve_dtype))
    if differences := conflicting_settings(config, recorded, recorded_provenance, provenance):
        differ = f"with other settings ({describe_differences(differences)}); choose another"
        if config.run_name is None and not where:
            raise InputError(f"the default name {config.name} is taken by a run {differ} with "
                             f"--run_name, or --overwrite to replace it ({config.run_dir})")
        raise InputError(f"--run_name {config.name}: {where or config.run_dir} holds a run "
                         f"{differ} --run_name, or --overwrite to replace it")

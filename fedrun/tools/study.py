"""`fedrun study FILE`: runs a grid of settings, tunes, repeats over seeds, and makes one table.

    python -m fedrun study configs/experiments/methods.yaml --dataset my/text --jobs 2

FILE lists settings, each a method with its flags. Every setting is run on a grid, for example of
learning rates, with one seed, and tuned on the first half of the validation split; if the best
value lies at the grid's edge, the grid is extended. Settings close enough to the reference are run
again at their best value with other seeds, and reported on the second half, as ratios of perplexity
to the reference with the same seed. Each run has a folder in results/NAME/runs. Finished runs are
not repeated, so that the same command resumes a study; with --recorded, and results/NAME/runs.jsonl
in place of the folders, also on another machine.

    name: methods               # results go to results/methods
    jobs: 2                     # runs of one process at the same time
    workers: 1                  # processes (on GPUs: one for each) of one federated run
    reference: central          # the setting that the others are compared to; of a list, the one
                                # that is better on the tuning seed
    tune_seed: 0
    report_seeds: [1, 2, 3]
    prune: 1.1                  # settings whose tuned ratio is above this are not repeated,
    repeat: [averaged]          # unless they are listed here
    extensions: 3               # how often a grid may grow at its edge; of a setting too
    grid: {lr: [1e-3, 2e-3]}    # for settings without a grid of their own
    base: {config: study}       # flags for all runs; flags on the command line override them
    axes:                       # every setting at every combination of these that its method has
      config: [study, tiny]     # and that it does not set itself; compared to the reference there
      local_updates: [1, 8]
      seed: [1, 2, 3]           # in place of report_seeds and tune_seed
    scales:                     # --scale small: another base, axes or grid, in results/NAME_small
      small: {base: {dataset: pydocs}}
    figures:                    # drawn into results/NAME/figures, with flags of `fedrun plot`
      - perplexities
      - federated-deltas --entity client_0
    settings:
      central: {method: central, rounds: 240}
      averaged: {method: fed_avg, rounds: 240, grid: {lr: [1e-3]}}
      entropy: {method: fed_entropy, rounds: 240, only_first: [config]}  # the axis's first value

Several processes, on one machine or on several that share the folder, can run the same command:
they share the runs out. So do the processes that torchrun, srun or the scripts in launch/ start;
each run has its own GPU, or with --workers N as many. SIGTERM, Ctrl-C and a file STOP in
results/NAME stop the runs with a checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import yaml

from fedrun.common import locks
from fedrun.common.errors import InputError, one_line, require
from fedrun.common.log import WARNING, log
from fedrun.config import RunConfig
from fedrun.distributed.launch import Launch, detect, without_rank
from fedrun.distributed.stopping import (
    LAUNCHER,
    StopRequest,
    end_process,
    seconds_of_one_request,
)
from fedrun.flags import Parser, add_flags, method_flags, methods
from fedrun.records.outcome import START_VARIABLE, read_outcome, write_outcome
from fedrun.strategies.plugins import LOADED
from fedrun.tools import study_process
from fedrun.tools.study_devices import places, remark, visible_gpus
from fedrun.tools.study_file import OF_A_TABLE, Study, notes, read
from fedrun.tools.study_process import handling_signals
from fedrun.tools.study_queue import Member, Stopped, run_all
from fedrun.tools.study_records import RECORDS, take_records
from fedrun.tools.study_runs import loss_halves
from fedrun.tools.study_setting import Point, StudySetting
from fedrun.tools.study_table import write

SECONDS_FOR_FIGURES = 600.0  # in which another process that has finished as well may draw them


def tune(study: Study, member: Member) -> None:
    """Run all grids with the tuning seed; extend them until no best value lies at an edge, or they
    may not grow further. Where no result decides what is repeated, repeat it at the same time."""
    growing = list(study.settings.values())
    repeats = [] if _is_tuned(study) else [study.config(s, s.points()[0], seed)
                                           for seed in study.report_seeds for s in growing]
    while growing:
        configs = {(s.name, point): study.config(s, point, study.tune_seed)
                   for s in growing for point in s.points()}
        run_all(member, [*configs.values(), *repeats])
        for setting in growing:
            for point in setting.points():
                halves = loss_halves(configs[setting.name, point])
                assert halves is not None
                setting.tuned[point] = halves[0]
        growing = [setting for setting in growing
                   if setting.extend(functools.partial(_is_possible, study, setting))]


def _is_possible(study: Study, setting: StudySetting, point: Point) -> bool:
    """Whether a grid may grow to this point; if a run with it would be refused, a line says so."""
    try:
        study.config(setting, point, study.tune_seed)
    except InputError as error:
        log(f"study: the grid of {setting.name} ends at its edge: {error}")
        return False
    return True


def _is_tuned(study: Study) -> bool:
    """Whether results with the tuning seed decide which runs follow."""
    return study.prune < math.inf or any(len(s.points()) > 1 for s in study.settings.values())


def repeat(study: Study, member: Member) -> None:
    """Run the settings that are close enough to the reference again, with the reported seeds."""
    kept = [s for s in study.settings.values()
            if study.tuned_ratio(s) <= study.prune or {s.name, s.of} & {*study.always}]
    run_all(member, [study.config(s, s.best, seed) for seed in study.report_seeds for s in kept])


def unfinished(study: Study) -> list[RunConfig]:
    """The runs that are left, if every setting is repeated and no grid grows. Which value is
    repeated is not known before the tuning: any of them costs the same."""
    settings = study.settings.values()
    grid = [study.config(s, p, study.tune_seed) for s in settings for p in s.points()]
    repeats = [study.config(s, s.points()[0], seed) for s in settings
               for seed in study.report_seeds]
    return [config for config in {c.name: c for c in grid + repeats}.values()
            if loss_halves(config) is None]


def budget(study: Study, at_a_time: int) -> str:
    """A line that says how many runs the study makes at most, and how many of its grid are left."""
    grid = [study.config(s, p, study.tune_seed) for s in study.settings.values()
            for p in s.points()]
    left = sum(loss_halves(config) is None for config in grid)
    repeats = len(study.settings) * len({*study.report_seeds} - {study.tune_seed})
    return (f"{study.folder.name}: {len(study.settings)} settings, {len(grid)} runs on the grid "
            f"({left} to do), at most {repeats} repeated with other seeds, {at_a_time} at a time")


def finished(study: Study) -> int:
    """How many runs in the study's folder are finished: the step in its outcome.json."""
    return sum(read_outcome(path).get("outcome") == "finished"
               for path in (study.folder / "runs").glob("*"))


def take_part(study: Study, launch: Launch, gpus: Sequence[str | None]) -> int:
    """Run what is left of a study on these GPUs (see `Member`), together with its other processes;
    return the exit code.

    Rank 0 of those that a launcher has started concludes the study, once its runs are finished by
    whomever. If it is lost, the same command does. Launch scripts read the outcome.json in the
    study's folder.
    """
    study.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=study.folder, prefix=".began.") as began:
        stop = StopRequest(study.folder, Path(began.name), list, launch)
    first, others = launch.rank == 0, read_outcome(study.folder)
    # The outcome that a launch script waits for is left to the processes that it has started.
    joins = (START_VARIABLE not in os.environ and others.get("outcome") == "running"
             and bool(others.get("start")))
    if first and not joins:
        write_outcome(study.folder, "running", finished(study))
    with handling_signals(signals := Signals()):
        try:
            member = Member(study.folder, gpus, study.workers, stop.asked_by)
            tune(study, member)
            repeat(study, member)
            signals.left = "its runs are finished, not its table and figures"
            if first:
                conclude(study)
        except Stopped as stopped:
            signals.first = signals.first or time.monotonic()
            if first and not joins:
                write_outcome(study.folder, "stopped", finished(study), str(stopped))
            if first:
                log(str(stopped), WARNING)
            return stopped.code
        except Exception as error:
            if first and not joins:
                write_outcome(study.folder, "failed", finished(study), one_line(error))
            raise
    return 0


class Signals:
    """The handler of signals while no queue, which has its own, makes runs: as when figures are
    drawn. The first one raises Stopped; one that is sent again ends the process."""

    def __init__(self) -> None:
        self.left = "no run was being made"
        """For the message."""
        self.first = 0.0
        """When the study was first asked to stop."""

    def __call__(self, number: int, _: FrameType | None = None) -> None:
        if not self.first:
            self.first = time.monotonic()
            raise Stopped(signal.Signals(number).name, 128 + number, self.left)
        if time.monotonic() - self.first > seconds_of_one_request(number):
            end_process(128 + number)


def conclude(study: Study) -> None:
    """Write the table and plot what the study's file lists, unless another process of the same
    launch script has done so."""
    try:
        lock = locks.acquire(study.folder / "queue" / "table.lock", SECONDS_FOR_FIGURES)
    except locks.Busy as holder:
        log(f"{holder} draws the figures of {study.folder}")
        return
    try:
        start, before = os.environ.get(START_VARIABLE), read_outcome(study.folder)
        if start and (before.get("start"), before.get("outcome")) == (start, "finished"):
            return
        publish(study)
        write_outcome(study.folder, "finished", finished(study))
    finally:
        lock.release()


def publish(study: Study) -> None:
    """Write and print the table, and plot what the study's file lists."""
    write(study)
    print((study.folder / "table.md").read_text(encoding="utf-8"), end="", flush=True)
    for kind, *flags in study.figures:
        from fedrun.tools import plot
        folder = study.folder if kind in OF_A_TABLE else study.folder / "runs"
        plot.main([kind, *flags, "--data_dir", str(folder),
                   "--out_dir", str(study.folder / "figures")])


def so_far(study: Study) -> Study:
    """The study as if it were of what is finished alone: settings with a run on their grid whose
    reference has one too. InputError if there is none."""
    for setting in study.settings.values():
        grew = True
        while grew:
            for point in setting.points():
                halves = loss_halves(study.config(setting, point, study.tune_seed))
                if halves is not None:
                    setting.tuned[point] = halves[0]
            grew = len(setting.tuned) == len(setting.points()) and setting.extend()
    tuned = {name: setting for name, setting in study.settings.items() if setting.tuned}
    found = dataclasses.replace(study, settings=tuned)
    for name, setting in [*tuned.items()]:
        try:
            found.reference_of(setting)
        except InputError:
            del tuned[name]
    require(bool(tuned), "--so_far", "", "given once a run of the reference and its grid is "
            f"finished in {study.folder}")
    return found


def say_cost(study: Study, at_a_time: int) -> None:
    """Print what is left, and what it costs on this machine. Uses a GPU if there is one."""
    print(budget(study, at_a_time), flush=True)
    if left := unfinished(study):
        from fedrun.tools.study_cost import estimate  # imports torch
        print(estimate(left, study.workers).describe(at_a_time), flush=True)


def _gpu_count() -> int:
    import torch
    return torch.cuda.device_count()


def main(argv: Sequence[str]) -> int:
    """Run the unfinished runs of a study, and write its table. Or make one run of a study, for
    which the study itself has started this process."""
    if len(argv) == 2 and argv[0] == study_process.FLAG:
        return study_process.main(Path(argv[1]))
    parser = Parser(
        prog="fedrun study", description=__doc__, allow_abbrev=False,
        usage="fedrun study FILE [options] [--flag value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the study's YAML file")
    parser.add_argument("--jobs", metavar="N",
                        help="runs of one process at the same time (default: as in FILE, or 1)")
    parser.add_argument("--workers", metavar="N",
                        help="processes that train the clients of one federated run, on GPUs one a "
                             "GPU (default: as in FILE, or 1)")
    parser.add_argument("--results", type=Path, default=Path("results"),
                        help="folder in which the study's folder is created (default: results/)")
    parser.add_argument("--name", metavar="TEXT",
                        help="name of the study's folder (default: as in FILE, or FILE's own)")
    parser.add_argument("--report_seeds", metavar="N,N",
                        help="seeds of the reported runs (default: as in FILE)")
    parser.add_argument("--axes", metavar="FLAG=VALUE,VALUE", action="append",
                        help="values of an axis (may be given several times)")
    parser.add_argument("--scale", metavar="NAME", help="one of the scales in FILE")
    parser.add_argument("--settings", metavar="NAME,NAME",
                        help="these settings of FILE alone, with the reference among them")
    parser.add_argument("--recorded", action="store_true",
                        help=f"do not repeat the runs that {RECORDS} in the study's folder lists, "
                             "of an earlier machine or of others; to repeat one, remove its line")
    parser.add_argument("--so_far", action="store_true",
                        help="write the table and figures of the runs that are finished, and exit, "
                             "also while others go on")
    parser.add_argument("--dry_run", action="store_true",
                        help="print how many runs are left and what they cost here, and exit")
    parser.add_argument("--print_config", action="store_true",
                        help="print the resolved settings of all runs as YAML, and exit")
    parser.add_argument("--print_run_dir", action="store_true",
                        help="print the path of the study's folder and exit (for launch scripts)")
    add_flags(parser, {name: flag for method in methods()
                       for name, flag in method_flags(method).items()}, hidden=True)
    given = vars(parser.parse_intermixed_args(argv))
    path, results = given.pop("file"), given.pop("results")
    dry_run, print_config = given.pop("dry_run"), given.pop("print_config")
    partly, recorded = given.pop("so_far"), given.pop("recorded")
    print_run_dir = given.pop("print_run_dir")
    overrides = {name: value for name, value in given.items() if value is not None}
    study, launch = read(path, results, overrides), detect(os.environ)
    if print_run_dir:
        print(study.folder)
        return 0
    if launch.rank == 0:
        for line in notes(study, overrides):
            log(line, WARNING)
    if print_config:
        print(yaml.safe_dump(study.to_dict(), sort_keys=False), end="")
        return 0
    if recorded:
        require((study.folder / RECORDS).exists(), "--recorded", "true",
                f"left out: there is no {RECORDS} in {study.folder}")
    if recorded and (taken := take_records(study.folder)):
        log(f"{taken} finished runs of {study.folder / RECORDS} are not repeated")
    if partly:
        publish(so_far(study))
        return 0
    visible = [] if study.device == "cpu" else visible_gpus(os.environ, _gpu_count)
    gpus = places(launch, study.jobs, visible, study.workers)
    line = remark(launch, study.jobs, visible, study.workers)
    if line and launch.local_rank == 0 and not dry_run:
        log(line, WARNING)
    at_a_time = study.jobs * launch.world_size
    if launch.rank == 0 and visible and not dry_run:
        # In a process of its own: this one would keep a part of the first GPU.
        env = without_rank(os.environ) | {LAUNCHER: str(os.getpid())}
        subprocess.run([sys.executable, "-m", "fedrun", "study", *argv, "--dry_run", "--jobs",
                        str(at_a_time), *(f"--plugin={plugin}" for plugin in LOADED)],
                       env=env, check=False)
    elif launch.rank == 0:
        say_cost(study, at_a_time)
    return 0 if dry_run else take_part(study, launch, gpus)

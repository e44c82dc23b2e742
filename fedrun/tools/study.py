"""`fedrun study FILE`: runs a grid of settings, tunes, repeats over seeds, and makes one table.

    python -m fedrun study configs/experiments/methods.yaml --dataset my/text --jobs 2

FILE lists settings, each a method with its flags. Every setting is run on a grid, for example of
learning rates, with one seed, and tuned on the first half of the validation split; if the best
value lies at the grid's edge, the grid is extended. Settings close enough to the reference are run
again at their best value with other seeds, and reported on the second half, as ratios of perplexity
to the reference with the same seed. Each run has a folder in results/NAME/runs. Finished runs are
not repeated, so that the same command resumes a study.

    name: methods               # results go to results/methods
    jobs: 2                     # runs at the same time
    reference: central          # the setting that the others are compared to
    tune_seed: 0
    report_seeds: [1, 2, 3]
    prune: 1.1                  # settings whose tuned ratio is above this are not repeated,
    repeat: [averaged]          # unless they are listed here
    extensions: 3               # how often a grid may grow at its edge
    grid: {lr: [1e-3, 2e-3]}    # for settings without a grid of their own
    base: {config: study}       # flags for all runs; flags on the command line override them
    axes:                       # every setting at every combination of these that its method has
      config: [study, tiny]     # and that it does not set itself; compared to the reference there
      local_updates: [1, 8]
      seed: [1, 2, 3]           # in place of report_seeds and tune_seed
    scales:                     # --scale small: another base, axes or grid, in results/NAME_small
      small: {base: {dataset: pydocs}}
    settings:
      central: {method: central, rounds: 240}
      averaged: {method: fed_avg, rounds: 240, grid: {lr: [1e-3]}}
      entropy: {method: fed_entropy, rounds: 240, only_first: [config]}  # the axis's first value

Several processes, on one machine or on several that share the folder, can run the same command:
they share the runs out. SIGTERM and Ctrl-C stop the runs with a checkpoint.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import yaml

from fedrun.common.errors import InputError
from fedrun.common.log import WARNING, log
from fedrun.config import RunConfig
from fedrun.distributed.launch import detect
from fedrun.flags import Parser, add_flags, method_flags, methods
from fedrun.tools.study_file import Study, notes, read
from fedrun.tools.study_queue import Stopped, run_all
from fedrun.tools.study_runs import loss_halves
from fedrun.tools.study_table import write


def tune(study: Study) -> None:
    """Run all grids with the tuning seed; extend them until no best value lies at an edge, or they
    may not grow further."""
    growing = list(study.settings.values())
    while growing:
        configs = {(s.name, point): study.config(s, point, study.tune_seed)
                   for s in growing for point in s.points()}
        run_all(study.folder, configs.values(), study.jobs)
        for setting in growing:
            for point in setting.points():
                halves = loss_halves(configs[setting.name, point])
                assert halves is not None
                setting.tuned[point] = halves[0]
        growing = [setting for setting in growing if setting.extend()]


def repeat(study: Study) -> None:
    """Run the settings that are close enough to the reference again, with the reported seeds."""
    kept = [s for s in study.settings.values()
            if study.tuned_ratio(s) <= study.prune or {s.name, s.of} & {*study.always}]
    run_all(study.folder, [study.config(s, s.best, seed) for seed in study.report_seeds
                           for s in kept], study.jobs)


def unfinished(study: Study) -> list[RunConfig]:
    """The runs that are left, if every setting is repeated and no grid grows. Which value is
    repeated is not known before the tuning: any of them costs the same."""
    settings = study.settings.values()
    grid = [study.config(s, p, study.tune_seed) for s in settings for p in s.points()]
    repeats = [study.config(s, s.points()[0], seed) for s in settings
               for seed in study.report_seeds]
    return [config for config in {c.name: c for c in grid + repeats}.values()
            if loss_halves(config) is None]


def budget(study: Study) -> str:
    """A line that says how many runs the study makes at most, and how many of its grid are left."""
    grid = [study.config(s, p, study.tune_seed) for s in study.settings.values()
            for p in s.points()]
    left = sum(loss_halves(config) is None for config in grid)
    repeats = len(study.settings) * len({*study.report_seeds} - {study.tune_seed})
    return (f"{study.folder.name}: {len(study.settings)} settings, {len(grid)} runs on the grid "
            f"({left} to do), at most {repeats} repeated with other seeds, {study.jobs} at a time")


def main(argv: Sequence[str]) -> int:
    """Run the unfinished runs of a study, and write its table."""
    parser = Parser(
        prog="fedrun study", description=__doc__, allow_abbrev=False,
        usage="fedrun study FILE [options] [--flag value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the study's YAML file")
    parser.add_argument("--jobs", metavar="N",
                        help="runs at the same time (default: as in FILE, or 1)")
    parser.add_argument("--results", type=Path, default=Path("results"),
                        help="folder in which the study's folder is created (default: results/)")
    parser.add_argument("--name", metavar="TEXT",
                        help="name of the study's folder (default: as in FILE, or FILE's own)")
    parser.add_argument("--report_seeds", metavar="N,N",
                        help="seeds of the reported runs (default: as in FILE)")
    parser.add_argument("--axes", metavar="FLAG=VALUE,VALUE", action="append",
                        help="values of an axis (may be given several times)")
    parser.add_argument("--scale", metavar="NAME", help="one of the scales in FILE")
    parser.add_argument("--dry_run", action="store_true",
                        help="print how many runs are left and what they cost here, and exit")
    parser.add_argument("--print_config", action="store_true",
                        help="print the resolved settings of all runs as YAML, and exit")
    add_flags(parser, {name: flag for method in methods()
                       for name, flag in method_flags(method).items()}, hidden=True)
    given = vars(parser.parse_intermixed_args(argv))
    launch = detect(os.environ)
    if not launch.alone:  # every rank would pass its own rank on to its runs
        raise InputError(f"study: starts its runs itself, but {launch.world_size} processes were "
                         "started together: use `python -m fedrun study`, several times to share "
                         "a study out")
    path, results = given.pop("file"), given.pop("results")
    dry_run, print_config = given.pop("dry_run"), given.pop("print_config")
    overrides = {name: value for name, value in given.items() if value is not None}
    study = read(path, results, overrides)
    for line in notes(study, overrides):
        log(line, WARNING)
    if print_config:
        print(yaml.safe_dump(study.to_dict(), sort_keys=False), end="")
        return 0
    print(budget(study), flush=True)
    if left := unfinished(study):
        from fedrun.tools.study_cost import estimate  # imports torch
        print(estimate(left).describe(study.jobs), flush=True)
    if dry_run:
        return 0
    try:
        tune(study)
        repeat(study)
    except Stopped as stopped:
        log(str(stopped), WARNING)
        return 128 + stopped.number
    write(study)
    print((study.folder / "table.md").read_text(encoding="utf-8"), end="")
    return 0

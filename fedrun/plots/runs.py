"""The runs in a folder: each in a folder of its own, or all of them in the files of a study."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fedrun.common.errors import InputError, naming
from fedrun.common.terminal import shortened, visible
from fedrun.plots.groups import groups
from fedrun.plots.run_folder import HISTORY, NAME, Damaged, Run, read_run
from fedrun.plots.studies import is_study, may_be_there, read_study

LONGEST = 300  # columns for the settings of a variant in a line


@dataclass(frozen=True)
class Found:
    """The runs in a data folder, and the folders that were skipped with the reason."""

    runs: list[Run]
    passed_over: list[tuple[str, str]]

    def __str__(self) -> str:
        lines = [f"found {len(self.runs)} run{'s' * (len(self.runs) != 1)}"]
        for group in groups(self.runs):
            updates = f", local updates {group.local_updates}" * (group.method != "central")
            variant = f", {shortened(group.variant, LONGEST)}" * bool(group.variant)
            seeds = ", ".join(str(seed) for seed in sorted(run.seed for run in group.runs))
            lines.append(f"  {group.config}: {group.method}{updates}{variant}, seeds {seeds}")
        return "\n".join(lines + [f"skipped {n}: {reason}" for n, reason in self.passed_over])


def find_runs(data_dir: Path) -> Found:
    """All runs directly under `data_dir`, and, if it is a study's folder, those of its histories.

    Raises InputError if there is no such folder, or for a damaged file of a study.
    """
    runs: list[Run] = []
    passed_over = []
    folders = run_folders(data_dir)
    for path in folders:
        try:
            runs.append(read_run(path))
            if runs[-1].damage:
                passed_over.append((runs[-1].name, f"{runs[-1].damage} (the rest is shown)"))
        except Damaged as damaged:
            passed_over.append((visible(path.name), str(damaged)))
    if is_study(data_dir):
        of_study, unusable = read_study(data_dir)
        runs += of_study
        passed_over += unusable
    passed_over += [(visible(path.name), f"is a study: --data_dir {visible(str(path))} shows it")
                    for path in _folders(data_dir) if path not in folders and is_study(path)]
    return Found(runs, passed_over)


def run_folders(data_dir: Path) -> list[Path]:
    """The folders under `data_dir` that look like a run's, even if they turn out to be damaged.

    Raises InputError if `data_dir` is not a folder or cannot be read.
    """
    return [path for path in _folders(data_dir) if NAME.fullmatch(path.name)
            or any(may_be_there(path / name) for name in ("config.json", HISTORY))]


def _folders(data_dir: Path) -> list[Path]:
    if not os.path.isdir(data_dir):
        raise InputError(f"--data_dir {data_dir}: no such folder; must be one with run folders, or "
                         "a study's")
    with naming("--data_dir", data_dir):
        return sorted(path for path in data_dir.iterdir() if os.path.isdir(path))

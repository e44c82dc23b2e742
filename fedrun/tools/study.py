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
    settings:
      central: {method: central, rounds: 240}
      averaged: {method: fed_avg, rounds: 240, grid: {lr: [1e-3]}}
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fedrun.common.errors import InputError, one_line
from fedrun.common.files import DamagedFile, Kind, finite, read_json, write_atomic, write_json
from fedrun.common.log import WARNING, log
from fedrun.common.old_names import renamed
from fedrun.common.perplexity import perplexity
from fedrun.config import RunConfig
from fedrun.data.text_options import TextOptions
from fedrun.flags import METHODS, Parser, add_flags, method_flags
from fedrun.records.outcome import START_VARIABLE, read_outcome
from fedrun.records.provenance import INPUT_DIGESTS, corpus_digests, differing_settings
from fedrun.records.run_dir import ENVIRONMENT
from fedrun.records.schema import read_field
from fedrun.tools.study_file import Point, Study, StudySetting, notes, read
from fedrun.unused import NEVER_READ

# ---- runs ---------------------------------------------------------------------------------------

def loss_halves(config: RunConfig) -> list[float] | None:
    """A finished run's losses on the two halves of the validation split, in nats per token; None if
    it is not finished.

    Infinite for a run that failed, for example because its learning rate is too large. Raises
    ValueError if the folder holds a run with other settings, or damaged files.
    """
    folder = config.run_dir
    if not (folder / "config.json").exists():
        return None
    held = renamed(_read(folder / "config.json", dict))
    differences = differing_settings(config, held)
    if differences.keys() <= INPUT_DIGESTS.keys() and differences and _same_corpus(config):
        differences = {}
    if differences:
        raise InputError(f"study: {folder} holds a run with another {', '.join(differences)}; "
                         "remove it, or give the study another name")
    if (folder / "failed.txt").exists():
        return [math.inf, math.inf]
    if read_outcome(folder).get("outcome") != "finished":
        return None
    halves = history(config)[-1].get("val_loss_halves")
    if not isinstance(halves, list) or len(halves) != 2:
        raise _damaged(f"{folder / 'training_history.json'} has no val_loss_halves at its end")
    return [_number(loss) for loss in halves]


def history(config: RunConfig) -> list[dict[str, Any]]:
    """The history of a finished run. ValueError if it is damaged."""
    path = config.run_dir / "training_history.json"
    records = _read(path, list)
    if not records or not all(isinstance(record, dict) for record in records):
        raise _damaged(f"{path} does not hold a list of records")
    return records


def _read(path: Path, kind: type[Kind]) -> Kind:
    try:
        return read_json(path, kind)
    except (OSError, DamagedFile) as error:
        raise _damaged(one_line(error)) from None


def _damaged(what: str) -> InputError:
    return InputError(f"study: {what}; remove the run's folder and start the study again to repeat "
                      "it")


def _number(loss: object) -> float:
    """A loss or perplexity from a history, in which null stands for infinity."""
    return float(loss) if isinstance(loss, (int, float)) else math.inf


def _same_corpus(config: RunConfig) -> bool:
    """Whether a run read the same text and tokenizer as `config` would, by other paths."""
    if config.init_from:
        return False
    made = _read(config.run_dir / ENVIRONMENT, dict).get("made_with")
    return isinstance(made, dict) and made.get("content") == _content(
        config.dataset, config.tokenizer, config.sequence_length, config.cache_dir,
        config.text_options)


@functools.cache
def _content(dataset: str, tokenizer: str, length: int, cache_dir: Path, options: TextOptions
             ) -> str:
    from fedrun.data.tokens import prepare
    data = prepare(dataset, tokenizer, length, cache_dir, options=options)
    return corpus_digests(data.fingerprint)["content"]


def start(config: RunConfig) -> float:
    """Run `config` in a process of its own; return the seconds that it took.

    A run that diverges leaves the end of its error output in failed.txt. Raises ValueError if it
    fails in any other way, or is stopped.
    """
    began = time.monotonic()
    flags = [f"--{name}={'none' if value is None else value}"
             for name, value in config.to_dict().items()
             if name not in ("method", "model") and name not in NEVER_READ.get(config.method, {})]
    token = os.urandom(8).hex()  # distinguishes this start's outcome from an earlier one
    done = subprocess.run([sys.executable, "-m", "fedrun", config.method, *flags],
                          capture_output=True, text=True, check=False,
                          env={**os.environ, START_VARIABLE: token})
    errors, outcome = done.stderr.strip()[-2000:], read_outcome(config.run_dir)
    if done.returncode and (outcome.get("start"), outcome.get("kind")) == (token, "diverged"):
        (config.run_dir / "failed.txt").write_text(errors, encoding="utf-8")
    elif done.returncode:
        raise InputError(f"study: {config.name}: {errors}")
    elif loss_halves(config) is None:
        raise InputError(f"study: {config.name} was stopped; the same command resumes the study")
    return time.monotonic() - began


def run_all(configs: Iterable[RunConfig], jobs: int) -> None:
    """Run the configs that are not finished yet, `jobs` at a time."""
    todo = [config for config in configs if loss_halves(config) is None]
    with ThreadPoolExecutor(jobs) as pool:
        timed = zip(todo, pool.map(start, todo), strict=True)
        for number, (config, seconds) in enumerate(timed, start=1):
            loss = loss_halves(config)
            assert loss is not None, f"{config.run_dir} is not finished"
            print(f"{number}/{len(todo)}  {config.name}  {seconds:.0f} s  "
                  f"val ppl {perplexity(statistics.mean(loss)):.2f}", flush=True)


def tune(study: Study) -> None:
    """Run all grids with the tuning seed; extend them until no best value lies at an edge, or they
    may not grow further."""
    growing = list(study.settings.values())
    while growing:
        configs = {(s.name, point): study.config(s, point, study.tune_seed)
                   for s in growing for point in s.points()}
        run_all(configs.values(), study.jobs)
        for setting in growing:
            for point in setting.points():
                halves = loss_halves(configs[setting.name, point])
                assert halves is not None
                setting.tuned[point] = halves[0]
        growing = [setting for setting in growing if setting.extend()]


def repeat(study: Study) -> None:
    """Run the settings that are close enough to the reference again, with the reported seeds."""
    kept = [s for s in study.settings.values()
            if tuned_ratio(study, s) <= study.prune or s.name in study.always]
    run_all([study.config(s, s.best, seed) for seed in study.report_seeds for s in kept],
            study.jobs)


def tuned_ratio(study: Study, setting: StudySetting) -> float:
    """The setting's perplexity at its best point divided by the reference's at its own, both with
    the tuning seed."""
    reference = study.settings[study.reference]
    return perplexity(setting.tuned[setting.best] - reference.tuned[reference.best])


# ---- the table ----------------------------------------------------------------------------------

def table(study: Study) -> list[dict[str, Any]]:
    """One row for each setting, best first: perplexities, and ratios to the reference."""
    rows = []
    reference = study.settings[study.reference]
    for setting in study.settings.values():
        row: dict[str, Any] = {
            "setting": setting.name, "flags": setting.flags, "best": dict(setting.best),
            "tuned_ppl": {_shown(p): perplexity(loss) for p, loss in sorted(setting.tuned.items())},
            "tuned_ratio": tuned_ratio(study, setting)}
        ratios, final, best = [], [], []
        for seed in study.report_seeds:
            config = study.config(setting, setting.best, seed)
            mine = loss_halves(config)
            theirs = loss_halves(study.config(reference, reference.best, seed))
            if mine is None or theirs is None:
                continue
            ratios.append(perplexity(mine[1] - theirs[1]))
            if not math.isfinite(mine[1]):
                continue
            curve = [_number(read_field(r, "val_ppl")) for r in history(config)]
            final.append(curve[-1])
            best.append(min(curve))
        if ratios:
            row |= {"ratios": ratios, "ratio_mean": statistics.mean(ratios),
                    "ratio_std": statistics.stdev(ratios) if len(ratios) > 1 else 0.0}
        if final:
            row |= {"final_ppl": statistics.mean(final), "best_ppl": statistics.mean(best)}
        rows.append(row)
    return sorted(rows, key=lambda r: (r.get("ratio_mean", math.inf), r["tuned_ratio"]))


def markdown(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `table` as Markdown, below a sentence that says what they show."""
    seeds = ", ".join(map(str, study.report_seeds))
    lines = [f"Perplexity against {study.reference}. Tuned: seed {study.tune_seed}, first half of "
             f"the validation split. Ratio: seeds {seeds}, second half, paired by seed. Final and "
             "best: whole split, mean over these seeds.", "",
             "| setting | tuned at | tuned ratio | ratio | final ppl | best ppl |",
             "|---|---|---|---|---|---|"]
    for row in rows:
        ratio = f"{row['ratio_mean']:.4f}" if "ratio_mean" in row else "not repeated"
        if len(row.get("ratios", ())) > 1:
            ratio += f" ± {row['ratio_std']:.4f}"
        final, best = (f"{row[k]:.2f}" if k in row else "" for k in ("final_ppl", "best_ppl"))
        lines.append(f"| {row['setting']} | {_shown(tuple(row['best'].items()))} | "
                     f"{row['tuned_ratio']:.4f} | {ratio} | {final} | {best} |")
    return "\n".join(lines) + "\n"


def write(study: Study) -> None:
    """Write table.json, table.md, and histories.json: the histories of each setting's runs at its
    best point."""
    rows = table(study)
    curves = {}
    for setting in study.settings.values():
        for seed in (study.tune_seed, *study.report_seeds):
            config = study.config(setting, setting.best, seed)
            halves = loss_halves(config)
            if halves and math.isfinite(halves[0]):
                curves[config.name] = [{k: v for k, v in record.items() if k != "generated"}
                                       for record in history(config)]
    write_json(study.folder / "table.json", json.loads(json.dumps(rows, default=str)))
    write_atomic(study.folder / "histories.json",
                (json.dumps(finite(curves), allow_nan=False) + "\n").encode())
    write_atomic(study.folder / "table.md", markdown(study, rows).encode())


def _shown(point: Point) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in point)


def budget(study: Study) -> str:
    """A line that says how many runs the study makes at most, and how many of its grid are left."""
    grid = [study.config(s, p, study.tune_seed) for s in study.settings.values()
            for p in s.points()]
    left = sum(loss_halves(config) is None for config in grid)
    repeats = len(study.settings) * len(study.report_seeds)
    return (f"{study.folder.name}: {len(study.settings)} settings, {len(grid)} runs on the grid "
            f"({left} to do), at most {repeats} repeated with other seeds, {study.jobs} at a time")


def main(argv: Sequence[str]) -> int:
    """Run the unfinished runs of a study, and write its table."""
    parser = Parser(
        prog="fedrun study", description=__doc__, allow_abbrev=False,
        usage="fedrun study FILE [--jobs N] [--results FOLDER] [--dry_run] [--flag value ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the study's YAML file")
    parser.add_argument("--jobs", metavar="N",
                        help="runs at the same time (default: as in FILE, or 1)")
    parser.add_argument("--results", type=Path, default=Path("results"),
                        help="folder in which the study's folder is created (default: results/)")
    parser.add_argument("--dry_run", action="store_true",
                        help="print how many runs are left, and exit")
    add_flags(parser, {name: flag for method in METHODS
                       for name, flag in method_flags(method).items()}, hidden=True)
    given = vars(parser.parse_intermixed_args(argv))
    path, results, dry_run = given.pop("file"), given.pop("results"), given.pop("dry_run")
    overrides = {name: value for name, value in given.items() if value is not None}
    study = read(path, results, overrides)
    for line in notes(study, overrides):
        log(line, WARNING)
    print(budget(study), flush=True)
    if dry_run:
        return 0
    tune(study)
    repeat(study)
    write(study)
    print((study.folder / "table.md").read_text(encoding="utf-8"), end="")
    return 0

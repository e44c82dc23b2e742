"""The table of a study, and the histories behind it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from fedrun.common.files import finite, write_atomic, write_json
from fedrun.common.perplexity import perplexity
from fedrun.records.schema import read_field
from fedrun.tools.study_file import Point, Study
from fedrun.tools.study_runs import history, loss_halves, number


def table(study: Study) -> list[dict[str, Any]]:
    """One row for each setting, best first: perplexities, and ratios to the reference."""
    rows = []
    for setting in study.settings.values():
        reference = study.reference_of(setting)
        row: dict[str, Any] = {
            "setting": setting.name, "reference": reference.name, "flags": setting.flags,
            "best": dict(setting.best),
            "tuned_ppl": {_shown(p): perplexity(loss) for p, loss in sorted(setting.tuned.items())},
            "tuned_ratio": study.tuned_ratio(setting)}
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
            curve = [number(read_field(r, "val_ppl")) for r in history(config)]
            final.append(curve[-1])
            best.append(min(curve))
        if ratios:
            row |= {"ratios": ratios, "ratio_mean": statistics.mean(ratios),
                    "ratio_std": _deviation(ratios)}
        if setting.name in study.published:
            row["published_final_ppl"] = study.published[setting.name]
        if final:
            row |= {"final_ppl": statistics.mean(final),
                    "final_ppl_std": _deviation(final),
                    "best_ppl": statistics.mean(best)}
        rows.append(row)
    return sorted(rows, key=lambda r: (r.get("ratio_mean", math.inf), r["tuned_ratio"]))


def _deviation(values: Sequence[float]) -> float:
    """The sample's standard deviation; 0 for one value, nan if a run has diverged."""
    if len(values) < 2:
        return 0.0
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def markdown(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `table` as Markdown, below a sentence that says what they show."""
    seeds = ", ".join(map(str, study.report_seeds))
    axes = list(study.reference_of(next(iter(study.settings.values()))).axis)
    against = study.reference + (f" at the same {' and '.join(axes)}" if axes else "")
    lines = [f"Perplexity against {against}. Tuned: seed {study.tune_seed}, first half of "
             f"the validation split. Ratio: seeds {seeds}, second half, paired by seed. Final and "
             "best: whole split, mean over these seeds"
             f"{'' if len(study.report_seeds) < 2 else ', final with deviation'}.", "",
             "| setting | tuned at | tuned ratio | ratio | final ppl | best ppl |"
             + " published |" * bool(study.published),
             "|---|---|---|---|---|---|" + "---|" * bool(study.published)]
    for row in rows:
        ratio = f"{row['ratio_mean']:.4f}" if "ratio_mean" in row else "not repeated"
        if len(row.get("ratios", ())) > 1:
            ratio += f" ± {row['ratio_std']:.4f}"
        final, best = (f"{row[k]:.2f}" if k in row else "" for k in ("final_ppl", "best_ppl"))
        if "final_ppl" in row and len(study.report_seeds) > 1:
            final += f" ± {row['final_ppl_std']:.2f}"
        lines.append(f"| {row['setting']} | {_shown(tuple(row['best'].items()))} | "
                     f"{row['tuned_ratio']:.4f} | {ratio} | {final} | {best} |"
                     + f" {row.get('published_final_ppl', '')} |" * bool(study.published))
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
                curves[config.name] = [
                    {k: v for k, v in record.items() if k not in ("generated", "prompt")}
                    for record in history(config)]
    write_json(study.folder / "table.json", json.loads(json.dumps(rows, default=str)))
    write_atomic(study.folder / "histories.json",
                (json.dumps(finite(curves), allow_nan=False) + "\n").encode())
    write_atomic(study.folder / "table.md", markdown(study, rows).encode())


def _shown(point: Point) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in point)

"""The table of a study, and the histories behind it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedrun.common.files import finite, write_atomic, write_json
from fedrun.common.perplexity import perplexity
from fedrun.records.schema import HELD_OUT, SITE_VAL_PPL
from fedrun.tools.study_file import Study
from fedrun.tools.study_records import write_records
from fedrun.tools.study_runs import history, loss_halves, number, parameters, val_ppl
from fedrun.tools.study_setting import Point, StudySetting

FP32 = 4  # bytes


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
        ratios, final, best, at_sites = [], [], [], []
        for seed in study.report_seeds:
            config = study.config(setting, setting.best, seed)
            mine = loss_halves(config)
            theirs = loss_halves(study.config(reference, reference.best, seed))
            if mine is None or theirs is None:
                continue
            ratios.append(perplexity(mine[1] - theirs[1]))
            if not math.isfinite(mine[1]):
                continue
            records = history(config)
            curve = [*map(val_ppl, records)]
            if SITE_VAL_PPL in records[-1]:
                at_sites.append(number(records[-1][SITE_VAL_PPL]))
            final.append(curve[-1])
            best.append(min(curve))
        if ratios:
            row |= {"ratios": ratios, "ratio_mean": statistics.mean(ratios),
                    "ratio_std": _deviation(ratios), "ratio_range": [min(ratios), max(ratios)]}
        if setting.name in study.published:
            row["published_final_ppl"] = study.published[setting.name]
        if final:
            row |= {"final_ppl": statistics.mean(final),
                    "final_ppl_std": _deviation(final),
                    "best_ppl": statistics.mean(best)}
        if at_sites:
            row |= {"final_site_ppl": statistics.mean(at_sites),
                    "final_site_ppl_std": _deviation(at_sites)}
        rows.append(row | _traffic(study, setting))
    return sorted(rows, key=lambda r: (r.get("ratio_mean", math.inf), r["tuned_ratio"]))


def _traffic(study: Study, setting: StudySetting) -> dict[str, float]:
    """What the clients of a setting send and receive for a token that they train on, in bytes; and
    how many times as much it would be if they summed fp32 gradients at every step, as central
    training on several machines does. Nothing for settings that record no bytes."""
    for seed in (*study.report_seeds, study.tune_seed):
        config = study.config(setting, setting.best, seed)
        halves = loss_halves(config)
        if halves is None or not math.isfinite(halves[0]):
            continue
        last = history(config)[-1]
        sent, tokens = number(last.get("bytes")), number(last.get("tokens"))
        if math.isfinite(sent / tokens):
            every_step = 2 * FP32 * parameters(config) / (config.batch_size
                                                          * config.sequence_length)
            return {"bytes_per_token": sent / tokens,
                    "times_fewer_bytes": every_step * tokens / sent}
        break
    return {}


def _deviation(values: Sequence[float]) -> float:
    """The sample's standard deviation; 0 for one value, nan if a run has diverged."""
    if len(values) < 2:
        return 0.0
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def markdown(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `table` as Markdown, below a sentence that says what they show."""
    seeds = ", ".join(map(str, study.report_seeds))
    sites = any("final_site_ppl" in row for row in rows)
    sent = any("bytes_per_token" in row for row in rows)
    several = len(study.report_seeds) > 1
    axes = list(study.reference_of(next(iter(study.settings.values()))).axis)
    against = study.references[0] if len(study.references) == 1 else \
        f"the better of {' and '.join(study.references)} when tuned"
    against += f" at the same {' and '.join(axes)}" if axes else ""
    lines = [f"Perplexity against {against}. Tuned: seed {study.tune_seed}, first half of "
             f"the validation split. Ratio: seeds {seeds}, second half, paired by seed. Final and "
             "best: whole split, mean over these seeds"
             f"{', final with deviation' if several else ''}.", ""]
    if sent:
        lines[0] += (" Bytes: sent and received by the clients for a token that they train on; "
                     "fewer: than by summing fp32 gradients at every step.")
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "setting": lambda row: str(row["setting"]),
        "tuned at": lambda row: _shown(tuple(row["best"].items())),
        "tuned ratio": lambda row: f"{row['tuned_ratio']:.4f}",
        "ratio": lambda row: _with_deviation(row, "ratio_mean", "ratio_std", 4, len(
            row.get("ratios", ())) > 1) or "not repeated"}
    if several:
        columns["range"] = lambda row: " to ".join(f"{r:.4f}" for r in row.get("ratio_range", ()))
    if sent:
        columns["bytes a token"] = lambda row: _rounded(row.get("bytes_per_token"))
        columns["fewer bytes"] = lambda row: _rounded(row.get("times_fewer_bytes"), " times")
    columns |= {
        "final ppl": lambda row: _with_deviation(row, "final_ppl", "final_ppl_std", 2, several),
        "best ppl": lambda row: _with_deviation(row, "best_ppl", "", 2, False)}
    if sites:
        columns[f"final ppl, {HELD_OUT}"] = lambda row: _with_deviation(
            row, "final_site_ppl", "final_site_ppl_std", 2, several)
    if study.published:
        columns["published"] = lambda row: str(row.get("published_final_ppl", ""))
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cell(row) for cell in columns.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _with_deviation(row: Mapping[str, Any], name: str, deviation: str, digits: int, several: bool
                    ) -> str:
    """A mean of a row and, over several seeds, its deviation; empty if the row does not have it."""
    if name not in row:
        return ""
    return f"{row[name]:.{digits}f}" + (f" ± {row[deviation]:.{digits}f}" if several else "")


def _rounded(value: float | None, unit: str = "") -> str:
    """A number to three digits or more; empty if there is none."""
    if value is None:
        return ""
    return (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") + unit


def write(study: Study) -> None:
    """Write table.json, table.md, histories.json, which has the histories of each setting's runs at
    its best point, and runs.jsonl."""
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
    write_records(study.folder)


def _shown(point: Point) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in point)

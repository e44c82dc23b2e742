"""`fedrun report --data_dir results/`: writes one self-contained HTML page about all runs.

A table of the runs, the figures of `fedrun plot`, and each run's curve, settings and sample text.
It loads nothing from elsewhere: figures are SVG inside the page.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from fedrun.common.errors import naming
from fedrun.common.files import write_atomic
from fedrun.common.terminal import say, visible
from fedrun.flags import Parser
from fedrun.plots import deltas, perplexity, saved, style
from fedrun.plots.groups import Group, Settings, groups
from fedrun.plots.run_folder import AXES, Run
from fedrun.plots.runs import Found, find_runs

BROAD = 760  # CSS pixels: beside another figure, the text of a wider one would be too small


@dataclass(frozen=True)
class Picture:
    """A figure for the page."""

    name: str
    source: str
    """A data: URL."""
    width: int
    """In CSS pixels, as the height."""
    height: int

    @property
    def broad(self) -> bool:
        """Whether it needs the whole width of the page."""
        return self.width > BROAD


@dataclass(frozen=True)
class Row:
    """A run for the page, with its numbers as text."""

    run: Run
    number: int
    """On the page, from 1."""
    final: str
    best: str
    tokens: str
    clock: str
    bytes: str
    devices: str
    pictures: list[Picture]
    settings: list[tuple[str, str]]


@dataclass(frozen=True)
class Experiment:
    """Runs for the page that differ in their seed alone, with the means of their numbers as text.
    """

    label: str
    colour: str
    lowest: bool
    """Whether no experiment with the same config has a lower final perplexity."""
    differs: Settings
    """From the other experiments with its method, config and number of local updates."""
    seeds: str
    final: str
    best: str
    tokens: str
    clock: str
    bytes: str
    rows: list[Row]


def main(argv: Sequence[str]) -> int:
    """Write the page. The exit code is 1 if the folder has no run that can be shown."""
    parser = Parser(prog="fedrun report", allow_abbrev=False,
                    description="Write one self-contained HTML page about all runs in a folder.")
    parser.add_argument("--data_dir", type=Path, default=Path("results"), metavar="FOLDER",
                        help="folder with run folders, or of a study (default: results/)")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="file to write (default: report.html in --data_dir)")
    parser.add_argument("--x", choices=AXES, default="tokens",
                        help="quantity on the x-axis of curves (default: tokens)")
    parser.add_argument("--skip_deltas", action="store_true",
                        help="leave out heatmaps and singular values, which take the longest")
    args = parser.parse_args(argv)
    found = find_runs(args.data_dir)
    say(str(found))
    if not found.runs:
        return 1
    out = args.out or args.data_dir / "report.html"
    content = page(found, args.data_dir, args.x, not args.skip_deltas)
    with naming("--out", out):
        write_atomic(out, content.encode())
    say(f"wrote {out}")
    return 0


def page(found: Found, data_dir: Path, axis: Any, with_deltas: bool) -> str:
    """The page as HTML. `axis` is the quantity on the x-axis, one of plots.runs.AXES."""
    made, left_out = perplexity.figures(found.runs, axis)
    heatmaps: dict[Path, list[Picture]] = {}
    if with_deltas:
        for federated in (False, True):
            found_saved = saved.find_entities(data_dir, "server", federated, None)
            if not found_saved.entities:
                continue
            made |= {name: figure for name, figure in deltas.figures(found_saved).items()
                     if not name.startswith("heatmap_")}
            limit = deltas.common_limit([e for e in found_saved.entities if 0 in e.layers], 0)
            with style.drawing():
                for entity in found_saved.entities:
                    if 0 in entity.layers:
                        heatmaps.setdefault(entity.run.path, []).append(
                            picture("how in_proj changed", deltas.heatmap(entity, 0, limit)))
    experiments = _experiments(found.runs, axis, heatmaps)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined,
                                     trim_blocks=True, lstrip_blocks=True, finalize=readable)
    environment.filters["breakable"] = breakable
    template = environment.from_string(
        (Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        folder=data_dir.resolve().name, experiments=experiments,
        rows=[row for experiment in experiments for row in experiment.rows], left_out=left_out,
        passed_over=found.passed_over,
        pictures=[picture(name, figure) for name, figure in made.items()
                  if isinstance(figure, Figure)],
        skipped=[(name, reason) for name, reason in made.items() if isinstance(reason, str)])


def picture(name: str, figure: Figure) -> Picture:
    """A figure as SVG in a data: URL."""
    content = io.BytesIO()
    style.write(figure, content, "svg")
    width, height = figure.get_size_inches()
    source = "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()
    return Picture(name, source, round(96 * width), round(96 * height))


def _experiments(runs: Sequence[Run], axis: Any, heatmaps: Mapping[Path, Sequence[Picture]]
                 ) -> list[Experiment]:
    """The lowest of each config first."""
    made: list[Experiment] = []
    numbers = itertools.count(1)
    lowest: dict[str, Group] = {}
    for group in sorted(groups(runs), key=lambda group: (group.config, group.final_ppl)):
        lowest.setdefault(group.config, group)
        of_runs = sorted(group.runs, key=lambda run: (run.seed, run.name))
        finals = [run.final for run in of_runs]
        look = style.look(group.method)
        made.append(Experiment(
            look.label, look.colour, lowest[group.config] is group, group.differs,
            ", ".join(str(run.seed) for run in of_runs),
            with_deviation([record.val_ppl for record in finals]),
            with_deviation([run.best.val_ppl for run in of_runs]),
            count(mean([record.tokens for record in finals])),
            clock(mean([record.seconds for record in finals])),
            size(mean([record.bytes for record in finals])),
            [_row(run, next(numbers), axis, heatmaps.get(run.path, ())) for run in of_runs]))
    return made


def _row(run: Run, number: int, axis: Any, heatmaps: Iterable[Picture]) -> Row:
    final = run.final
    device = run.environment.get("device_name") or run.environment.get("device") or ""
    processes = run.environment.get("processes")
    return Row(run, number, perplexity_text(final.val_ppl), perplexity_text(run.best.val_ppl),
               count(final.tokens) + (" (inferred)" if run.tokens_inferred else ""),
               clock(final.seconds), size(final.bytes),
               f"{processes} × {device}" if processes and device else str(device),
               [picture("perplexity", perplexity.single(run, axis)), *heatmaps],
               [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
                for name, value in run.settings.items()])


def readable(value: Any) -> Any:
    """Text with its control characters written as codes: HTML cannot hold most of them."""
    return visible(value, keep="\n\t") if type(value) is str else value


def breakable(name: str) -> Markup:
    """A name that browsers may break after underscores."""
    return Markup("_<wbr>").join(readable(name).split("_"))


def perplexity_text(value: float) -> str:
    """1234.5 as 1,234.50; the perplexity of a diverged run with its power of ten."""
    return f"{value:,.2f}" if value < 1e9 else f"{value:.3g}"


def with_deviation(values: Sequence[float]) -> str:
    """The mean of perplexities, of several with their standard deviation."""
    middle = perplexity_text(mean(values))
    return f"{middle} ± {perplexity_text(statistics.stdev(values))}" if len(values) > 1 else middle


def mean(values: Sequence[float]) -> float:
    """The mean; nan if a value is."""
    return math.fsum(values) / len(values)


def count(number: float) -> str:
    """A number of tokens, 1,024; an empty string for nan."""
    return f"{number:,.0f}" if math.isfinite(number) else ""


def clock(seconds: float) -> str:
    """Seconds as hours, 3725 as 1:02:05; an empty string for nan."""
    if not math.isfinite(seconds):
        return ""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def size(count: float) -> str:
    """Bytes, 63e6 as 63 MB; an empty string for nan."""
    if not math.isfinite(count):
        return ""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"

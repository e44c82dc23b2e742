"""`fedrun report --data_dir results/`: writes one self-contained HTML page about all runs.

A table of the runs, the figures of `fedrun plot perplexities`, and each run's curve, sample text,
changes of weights and settings; of a run with sites, what it showed of their text. It loads nothing
from elsewhere: figures are SVG inside the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from fedrun.common.errors import naming
from fedrun.common.files import write_atomic
from fedrun.common.terminal import say, visible
from fedrun.flags import Parser
from fedrun.plots import perplexity
from fedrun.plots.run_folder import AXES
from fedrun.plots.runs import Found, find_runs
from fedrun.plots.texts import texts
from fedrun.records.schema import HELD_OUT
from fedrun.tools.report_pictures import of_weights, picture
from fedrun.tools.report_runs import experiments


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
    shown = experiments(found.runs, axis, of_weights(data_dir) if with_deltas else {})
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined,
                                     trim_blocks=True, lstrip_blocks=True, finalize=readable)
    environment.filters["breakable"] = breakable
    template = environment.from_string(
        (Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        folder=data_dir.resolve().name, experiments=shown, texts=texts(found.runs),
        rows=[row for experiment in shown for row in experiment.rows], left_out=left_out,
        passed_over=found.passed_over, HELD_OUT=HELD_OUT,
        held_out=any(experiment.at_sites for experiment in shown),
        pictures=[picture(name, figure) for name, figure in made.items()
                  if isinstance(figure, Figure)],
        skipped=[(name, reason) for name, reason in made.items() if isinstance(reason, str)])


def readable(value: Any) -> Any:
    """Text with its control characters written as codes: HTML cannot hold most of them."""
    return visible(value, keep="\n\t") if type(value) is str else value


def breakable(name: str) -> Markup:
    """A name that browsers may break after underscores."""
    return Markup("_<wbr>").join(readable(name).split("_"))

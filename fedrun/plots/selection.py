"""The runs that a set of figures is drawn from, grouped into lines."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence

from fedrun.plots import style
from fedrun.plots.curves import Curve, curve
from fedrun.plots.groups import Group, Settings, groups
from fedrun.plots.run_folder import INFERRED, Axis, Measure, Run
from fedrun.plots.view import WHOLE_FINDING, Drawn, View

NOTE_WIDTH = 100  # characters that fit under the narrowest figure
ENDS = "one dot: a run that was evaluated only at its start and its end"
BANDS = "bands: one standard deviation over the seeds, around their mean"


class Selection:
    """The groups of runs that a set of figures is drawn from, and notes for the reader."""

    def __init__(self, runs: Iterable[Run], axis: Axis, view: View = WHOLE_FINDING,
                 protocol: Settings = ()) -> None:
        self.axis: Axis = axis
        self.view = view
        self.protocol = protocol
        """The settings that these runs share, and that others of the folder have otherwise."""
        self.groups = groups(runs)
        self.notes: dict[str, None] = {}
        """Lines below the current figure, in order."""
        self.drawn: list[Drawn] = []
        """The lines of the current figure."""
        self.left_out: dict[str, None] = {}
        """Runs left out so far, with the reason, to be printed."""

    def group(self, method: str, config: str, local_updates: int) -> Group | None:
        """The group for one line: the best variant if there are several, with a note about it."""
        variants = [g for g in self.groups if (g.method, g.config, g.local_updates)
                    == (method, config, local_updates)]
        if not variants:
            return None
        best = min(variants, key=lambda g: g.final_ppl)
        if len(variants) > 1:
            where = f"{style.label(method)}, {updates_text(local_updates)}" \
                if method != "central" else style.label(method)
            differs = style.text(best.variant, 2 * NOTE_WIDTH)
            self.notes[f"{where}: {differs}, the best of {len(variants)} variants"] = None
        return best

    def curve(self, group: Group, measure: Measure) -> Curve | None:
        found = curve(group, measure, self.axis)
        if found is None and measure == "val_ppl":
            for run in group.runs:
                self.left_out[f"{run.name}: its history has no {self.axis}"] = None
        if found is not None:
            for name in found.left_out:
                self.left_out[
                    f"{name}: shorter than other seeds, or a second run of the same seed"] = None
            if found.std is not None:
                self.notes[BANDS] = None
            if self.axis == "tokens" and any(
                    run.tokens_inferred for run in group.runs if run.name not in found.left_out):
                self.notes[INFERRED] = None
        return found

    def methods(self, config: str) -> list[str]:
        """Methods with runs of this config, in the order of the palette."""
        order = list(style.LOOKS)
        return sorted({g.method for g in self.groups if g.config == config},
                      key=lambda m: (order.index(m) if m in order else len(order), m))

    def updates(self, config: str, methods: Sequence[str]) -> list[int]:
        """Numbers of local updates in federated runs of these methods."""
        return sorted({g.local_updates for g in self.groups if g.config == config
                       and g.method in methods and g.method != "central"})

    @property
    def configs(self) -> list[str]:
        return natural({g.config for g in self.groups})

    def foot(self) -> str:
        """Return the notes for the current figure and clear them."""
        text = "\n".join(textwrap.fill(note, NOTE_WIDTH) for note in self.notes)
        self.notes.clear()
        return text

    def seeds(self, groups: Iterable[Group]) -> str:
        """`, 3 seeds` for a legend, `, 2 to 3 seeds` if these groups differ; empty for one seed."""
        curves = [curve(group, "val_ppl", self.axis) for group in groups]
        counts = sorted({len(found.seeds) for found in curves if found})
        if not counts or counts[-1] == 1:
            return ""
        return f", {' to '.join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))} seeds"


def natural(names: Iterable[str]) -> list[str]:
    """Sorted, with numbers compared by value: 2_layer before 10_layer."""
    return sorted(names, key=lambda n: [(p.isdigit(), int(p) if p.isdigit() else 0, p)
                                        for p in re.split(r"(\d+)", n)])


def updates_text(count: int) -> str:
    return f"{count} local update{'s' * (count != 1)}"

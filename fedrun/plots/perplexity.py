"""`fedrun plot perplexities`: validation perplexity against work, from the histories alone.

    0_all_runs                     every run as a line of its own, and a table of what differs
    1_central_vs_fed_{config}      central training and FedAvg, train and validation
    2_lu_comparison_{config}       the same number of tokens in rounds of 1, 8, ... local updates
    3_method_comparison_{config}   every method found, a panel for each number of local updates
    4_multi_config_comparison      every config found, and the final perplexities side by side
    5_configs_in_one_axes          every config as a line, a panel for each method

But for the first, runs with several seeds are drawn as their mean with a band of one standard
deviation, and the lines of one figure have one protocol (`plots/protocols.py`). What of the
curves is shown, and where the y-axis ends: `plots/view.py`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.lines import Line2D

from fedrun.plots import style
from fedrun.plots.curves import ENDS_ONLY, Curve
from fedrun.plots.groups import Group, in_a_line
from fedrun.plots.overview import all_runs
from fedrun.plots.pieces import SITES, Result, draw, finish, named, new_panels, nothing_on
from fedrun.plots.protocols import protocols
from fedrun.plots.run_folder import Axis, Run
from fedrun.plots.selection import Selection, natural, updates_text
from fedrun.plots.view import WHOLE_FINDING, View
from fedrun.records.schema import HELD_OUT, SITE_VAL_PPL

NO_CURVES = ("needs runs that were evaluated in between (--val_freq): these were only at their "
             "start and end, and 0_all_runs has what they ended at")
LONGEST = 100  # characters for what tells protocols apart, in the reason for no figure

TRAIN: dict[str, Any] = {"linestyle": (0, (1.2, 1.6)), "linewidth": 1.5, "marker": None}


def figures(runs: Sequence[Run], axis: Axis, config: str | None = None,
            view: View = WHOLE_FINDING) -> tuple[dict[str, Result], list[str]]:
    """All figures of one config, or of every config found, by name; and the runs left out.

    Where runs have several protocols, each has figures of its own, with the protocol in their
    names.
    """
    made: dict[str, Result] = {}
    left_out: dict[str, None] = {}

    def add(name: str, members: Sequence[Run], figure: Callable[[Selection], Result]) -> None:
        drawn: dict[str, Result] = {}
        if members and not any(len(run.points("val_ppl", "rounds")) > ENDS_ONLY for run in members):
            made[name] = NO_CURVES
            return
        found = protocols(members) or {(): []}
        for protocol, its in found.items():
            selection = Selection(its, axis, view, protocol)
            suffix = "_" + re.sub(r"[^\w.=-]+", "_", in_a_line(protocol)) if protocol else ""
            drawn[name + suffix] = figure(selection)
            left_out.update(selection.left_out)
        able = {n: result for n, result in drawn.items() if not isinstance(result, str)}
        reason = str(next(iter(drawn.values())))
        if len(found) > 1:
            every = "; ".join(in_a_line(protocol) for protocol in found)
            names = dict.fromkeys(name for protocol in found for name, _ in protocol)
            reason += f", in the same protocol; there are {len(found)}" + (
                f": {every}" if len(every) < LONGEST else f", which differ in {', '.join(names)}")
        made.update(able)
        if not able:
            made[name] = reason

    with style.drawing():
        everything = Selection([r for r in runs if config in (None, r.config)], axis, view)
        made["0_all_runs"] = all_runs(everything)
        left_out.update(everything.left_out)
        for own in [config] if config else natural({run.config for run in runs}):
            members = [run for run in runs if run.config == own]
            for number, figure in enumerate((central_vs_fed, lu_comparison, method_comparison), 1):
                add(f"{number}_{figure.__name__}_{own}", members,
                    functools.partial(figure, config=own))
        add("4_multi_config_comparison", runs, multi_config_comparison)
        add("5_configs_in_one_axes", runs, configs_in_one_axes)
    return made, list(left_out)


def central_vs_fed(selection: Selection, config: str) -> Result:
    """Central and FedAvg with the fewest local updates, validation and train."""
    updates = selection.updates(config, ["fed_avg"])
    central = selection.group("central", config, 1)
    if central is None or not updates:
        return f"needs central and fed_avg runs of --config {config}"
    fed = selection.group("fed_avg", config, updates[0])
    assert fed is not None
    fig, (ax,) = new_panels(1)
    handles = []
    for group in (central, fed):
        label = style.label(group.method)
        label += f", {updates_text(group.local_updates)}" if group.method != "central" else ""
        line = draw(ax, selection, group, "val_ppl")
        draw(ax, selection, group, "train_ppl", **TRAIN)
        handles += named([(line, label + selection.seeds([group]))])
    if not ax.lines:
        return nothing_on(selection.axis)
    ax.set_title(style.title("Central and federated training", config))
    handles += [Line2D([], [], color="#666666", label="validation"),
                Line2D([], [], color="#666666", label="train", **TRAIN)]
    return finish(fig, [ax], selection, handles, 2, ylabel="perplexity")


def lu_comparison(selection: Selection, config: str) -> Result:
    """One panel for each method with runs of different numbers of local updates."""
    methods = [m for m in selection.methods(config)
               if m != "central" and len(selection.updates(config, [m])) > 1]
    if not methods:
        return (f"needs runs of one method and --config {config} with different --local_updates, "
                "such as 1 and 8")
    counts = selection.updates(config, methods)
    looks = {updates: style.line_look(place) for place, updates in enumerate(counts)}
    fig, axes = new_panels(len(methods))
    lines: dict[int, Any] = {}
    drawn: dict[int, list[Group]] = {}
    for ax, method in zip(axes, methods, strict=True):
        for updates in selection.updates(config, [method]):
            group = selection.group(method, config, updates)
            assert group is not None
            if line := draw(ax, selection, group, "val_ppl", **looks[updates]):
                lines[updates] = line
                drawn.setdefault(updates, []).append(group)
        ax.set_title(style.label(method))
    if not drawn:
        return nothing_on(selection.axis)
    fig.suptitle(style.title("Local updates in a round", config))
    handles = named([(lines[u], updates_text(u) + selection.seeds(drawn[u]))
                      for u in sorted(drawn)])
    return finish(fig, axes, selection, handles, 4)


def method_comparison(selection: Selection, config: str) -> Result:
    """One panel for each number of local updates, with every method and central training."""
    methods = selection.methods(config)
    panels = selection.updates(config, methods)
    if len(methods) < 2 or not panels:
        return f"needs runs of two or more methods with --config {config}"
    fig, axes = new_panels(len(panels))
    lines: dict[str, Any] = {}
    drawn: dict[str, list[Group]] = {}
    for ax, updates in zip(axes, panels, strict=True):
        for method in methods:
            group = selection.group(method, config, 1 if method == "central" else updates)
            if group and (line := draw(ax, selection, group, "val_ppl")):
                lines[method] = line
                drawn.setdefault(method, []).append(group)
        ax.set_title(updates_text(updates))
    if not drawn:
        return nothing_on(selection.axis)
    fig.suptitle(style.title("Methods", config))
    handles = named([(lines[m], style.label(m) + selection.seeds(drawn[m]))
                      for m in methods if m in drawn])
    return finish(fig, axes, selection, handles, 3)


def multi_config_comparison(selection: Selection) -> Result:
    """One panel per config, each method at its fewest local updates, and one with the final
    perplexities side by side."""
    configs = selection.configs
    if len(configs) < 2:
        return ("needs runs of two or more configs, such as pure_ssm_1_layer, pure_ssm_2_layer "
                "and pure_ssm_4_layer")
    fig, axes = new_panels(len(configs) + 1)
    finals: dict[str, list[tuple[int, Curve]]] = {}
    lines: dict[str, Any] = {}
    drawn: dict[str, list[Group]] = {}
    for place, (ax, config) in enumerate(zip(axes, configs, strict=False)):
        for method in selection.methods(config):
            own = [g.local_updates for g in selection.groups
                   if (g.method, g.config) == (method, config)]
            group = selection.group(method, config, min(own))
            if group and (line := draw(ax, selection, group, "val_ppl")):
                lines[method] = line
                drawn.setdefault(method, []).append(group)
                found = selection.curve(group, "val_ppl")
                assert found is not None
                finals.setdefault(method, []).append((place, found))
        ax.set_title(style.text(config, 28))
    if not lines:
        return nothing_on(selection.axis)
    last = axes[-1]
    for number, (method, ends) in enumerate(finals.items()):
        look = style.look(method)
        shift = 0.08 * (number - (len(finals) - 1) / 2)  # so that error bars do not overlap
        last.errorbar([place + shift for place, _ in ends], [c.mean[-1] for _, c in ends],
                      [0.0 if c.std is None else c.std[-1] for _, c in ends], color=look.colour,
                      marker=look.marker, linestyle="-", linewidth=1.2, capsize=3)
    last.set_title("at the end")
    last.set_xticks(range(len(configs)), _short(configs))
    last.set_xlim(-0.5, len(configs) - 0.5)
    fig.suptitle("Configs (the fewest local updates of each method)")
    handles = named([(line, style.label(m) + selection.seeds(drawn[m]))
                      for m, line in lines.items()])
    return finish(fig, axes, selection, handles, 3, curves=axes[:-1])


def configs_in_one_axes(selection: Selection) -> Result:
    """One panel for each method with runs of several configs, such as depths, and a line for each
    config at the fewest local updates that all of them have."""
    panels: dict[str, list[Group]] = {}
    for method in {g.method: None for g in selection.groups}:
        configs = [c for c in selection.configs if method in selection.methods(c)]
        shared = set.intersection(*(
            {g.local_updates for g in selection.groups if (g.method, g.config) == (method, c)}
            for c in configs))
        if len(configs) > 1 and shared:
            found = [selection.group(method, c, min(shared)) for c in configs]
            panels[method] = [group for group in found if group]
    if not panels:
        return "needs runs of one method with two or more configs and the same --local_updates"
    looks = {name: style.line_look(place) for place, name in enumerate(selection.configs)}
    fig, axes = new_panels(len(panels))
    lines: dict[str, Any] = {}
    drawn: dict[str, list[Group]] = {}
    for ax, (method, groups) in zip(axes, panels.items(), strict=True):
        for group in groups:
            if line := draw(ax, selection, group, "val_ppl", **looks[group.config]):
                lines[group.config] = line
                drawn.setdefault(group.config, []).append(group)
        what = f", {updates_text(groups[0].local_updates)}" if method != "central" else ""
        ax.set_title(style.label(method) + what)
    if not lines:
        return nothing_on(selection.axis)
    fig.suptitle("Configs in one axes")
    handles = named([(lines[c], style.text(c, 28) + selection.seeds(drawn[c]))
                      for c in selection.configs if c in lines])
    return finish(fig, axes, selection, handles, 3)


def single(run: Run, axis: Axis) -> Result:
    """Validation and train curves of one run, and that on what its sites hold out, over rounds if
    its history lacks `axis`.

    If it has no more than a start and an end, these in words.
    """
    known: Axis = axis if run.points("val_ppl", axis) else "rounds"
    points = run.points("val_ppl", known)
    if len(points) <= ENDS_ONLY:
        values = " and ".join(f"{value:,.2f} at step {step:,}" for step, (_, value) in
                              points.items())
        return f"No curve, since it was evaluated only at its start and end: {values}."
    selection = Selection([run], known, View(start=0))
    (group,) = selection.groups
    with style.drawing():
        fig = style.figure(7.0, 3.6)
        ax = fig.subplots()
        handles = named([(draw(ax, selection, group, "val_ppl"), "validation")])
        if draw(ax, selection, group, "train_ppl", **TRAIN):
            handles.append(Line2D([], [], color=style.look(run.method).colour, label="train",
                                  **TRAIN))
        if draw(ax, selection, group, SITE_VAL_PPL, **SITES):
            handles.append(Line2D([], [], color=style.look(run.method).colour, label=HELD_OUT,
                                  **SITES))
        return finish(fig, [ax], selection, handles, 3, ylabel="perplexity")


def _short(configs: Sequence[str]) -> list[str]:
    """Config names for ticks, without the words that all of them start or end with."""
    words = [name.split("_") for name in configs]
    while min(map(len, words)) > 1 and len({w[0] for w in words}) == 1:
        words = [w[1:] for w in words]
    while min(map(len, words)) > 2 and len({w[-1] for w in words}) == 1:
        words = [w[:-1] for w in words]
    columns = max(40 // len(configs), 5)
    return ["\n".join(style.text(part, columns) for part in w[:4]) for w in words]

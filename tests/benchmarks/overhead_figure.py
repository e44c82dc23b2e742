"""The figure of tests/benchmarks/overhead.py: seconds per round over parameters, by workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from fedrun.plots import style

COLOURS = {1: "#56B4E9", 2: "#0072B2", 4: "#000000"}  # by workers; Okabe & Ito's
PEERS = {"flower_s": ("Flower", "#E69F00", "D"), "pfl_s": ("pfl", "#D55E00", "v")}
BAR = 1.25  # of the floor, on four workers


def draw(points: list[dict[str, Any]], folder: Path) -> Path:
    """Write overhead.png and .svg with two panels: seconds per round, and ratio to the floor."""
    with style.drawing():
        fig = style.figure(11, 4.8)
        seconds, ratios = fig.subplots(1, 2)
        workers = sorted({point["workers"] for point in points})
        for count in workers:
            mine = sorted((p for p in points if p["workers"] == count), key=lambda p: p["params"])
            colour = COLOURS.get(count, "#882255")
            million = [p["params"] for p in mine]
            seconds.plot(million, [p["fedrun_s"] for p in mine], "-s", color=colour)
            if count > 1:
                apart = [p["apart"]["fed_avg"] for p in mine]
                seconds.plot(million, [one["round_s"] for one in apart], "-o", color=colour,
                             markerfacecolor="white")
                seconds.plot(million, [one["allreduce_s"] for one in apart], "--", color=colour,
                             lw=1.3)
                for marker, lines in (("s", "methods"), ("o", "apart")):
                    fill = colour if lines == "methods" else "white"
                    ratios.plot(million, [p[lines]["fed_avg"]["ratio"] for p in mine], "-",
                                marker=marker, color=colour, markerfacecolor=fill)
                    fisher = [(p["params"], p[lines]["fed_fisher"]["ratio"]) for p in mine
                              if "fed_fisher" in p[lines]]
                    if fisher:
                        ratios.plot(*zip(*fisher, strict=True), ":", marker=marker, color=colour,
                                    markerfacecolor=fill, lw=1.5)
            for name, (_, peer_colour, marker) in PEERS.items():
                found = [(p["params"], p[name]) for p in mine if name in p]
                if found:
                    seconds.plot(*zip(*found, strict=True), "-", marker=marker, color=peer_colour)
        ratios.axhline(BAR, color="#7F7F7F", lw=1)
        for ax, title in ((seconds, "seconds of a round without local training"),
                          (ratios, "times the floor (all-reduce and memory passes)")):
            ax.set_title(title)
            _axes(ax, sorted({point["params"] for point in points}))
        style.legend_below(fig, _handles(workers, points), columns=4)
        return style.save(fig, folder, "overhead")


def _axes(ax: Axes, params: list[float]) -> None:
    ax.set_xscale("log")
    ax.set_xlabel("million parameters")
    ax.set_xticks(params, [f"{million:g}" for million in params])
    ax.minorticks_off()
    style.log_axis(ax)


def _handles(workers: list[int], points: list[dict[str, Any]]) -> list[Line2D]:
    clients = ", ".join(str(n) for n in sorted({point["clients"] for point in points}))
    found = [Line2D([], [], color=COLOURS.get(count, "#882255"), marker="s",
                    label=f"{count} worker{'s' if count > 1 else ''}, {clients} clients")
             for count in workers]
    found.append(Line2D([], [], color="#000000", ls="--", lw=1.3, label="bare all-reduce"))
    found.append(Line2D([], [], color="#000000", marker="o", markerfacecolor="white",
                        label="a machine for each worker"))
    found.append(Line2D([], [], color="#000000", ls=":", label="Fisher (right)"))
    found += [Line2D([], [], color=colour, marker=marker, label=f"{label}, 2 workers")
              for name, (label, colour, marker) in PEERS.items()
              if any(name in point for point in points)]
    return found

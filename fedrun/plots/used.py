"""What rounds used of each client's update, where it was clipped or a robust rule chose: over the
evaluations of a run, which client was clipped, trimmed or not chosen."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from fedrun.plots import style
from fedrun.plots.run_folder import Run

MOST_CLIENTS = 40  # in a figure: those that were used least
MOST_TICKS = 12


def table(run: Run) -> tuple[list[int], list[int], np.ndarray]:
    """The steps that were evaluated, the clients, and the mean share of each client's update that
    was used since the evaluation before, (clients, steps); nan where it was in no round."""
    records = [record for record in run.history if record.used]
    clients = sorted({client for record in records for client in record.used})
    shares = np.array([[record.used.get(client, math.nan) for record in records]
                       for client in clients]).reshape(len(clients), len(records))
    return [record.step for record in records], clients, shares


def figure(run: Run) -> Figure | None:
    """A heatmap of them; None if the run has none."""
    steps, clients, shares = table(run)
    if not steps:
        return None
    if len(clients) > MOST_CLIENTS:
        chosen = np.sort(np.argsort(np.nanmean(shares, axis=1), kind="stable")[:MOST_CLIENTS])
        clients, shares = [clients[place] for place in chosen], shares[chosen]
    with style.drawing():
        fig = style.figure(7.0, 1.6 + 0.18 * len(clients))
        ax = fig.subplots()
        ax.grid(visible=False)
        ax.set_facecolor("#E3E3E3")  # where a client was in no round
        image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto",
                          interpolation="nearest")
        ax.set_xticks(ticks := _evenly(len(steps)), [f"{steps[place]:,}" for place in ticks])
        ax.set_yticks(ticks := _evenly(len(clients)), [str(clients[place]) for place in ticks])
        ax.set_xlabel("round")
        ax.set_ylabel("client")
        fig.colorbar(image, ax=ax, label="share used")
        return fig


def _evenly(count: int) -> list[int]:
    """At most MOST_TICKS of this many places, with the first and the last."""
    places = np.linspace(0, count - 1, min(count, MOST_TICKS)).round().astype(int)
    return list(dict.fromkeys(places.tolist()))

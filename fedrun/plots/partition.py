"""The figure of `fedrun partition`: each client's tokens by topic, and its divergence."""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator

from fedrun.data.shard_stats import ShardStats
from fedrun.plots import style

# Tol's muted scheme, ordered so that neighbours in a bar also differ in lightness. Letters on the
# bars name the topics without colour.
COLOURS = ("#332288", "#DDCC77", "#117733", "#88CCEE", "#882255", "#44AA99", "#CC6677", "#999933",
           "#AA4499", "#BBBBBB")
LETTER_SHARE = 0.05  # of the tallest bar; a letter does not fit into a smaller part
LETTERED_CLIENTS = 24  # with more, bars are too narrow for letters
LONGEST_TOPIC = 40  # characters


def letter(topic: int) -> str:
    """The letter of a topic: A for the largest, then B, C, ..."""
    return string.ascii_uppercase[topic]


def partition_figure(held: Sequence[ShardStats], topics: Sequence[str], title: str) -> Figure:
    """Stacked bars of each client's topics, above its divergence from the whole corpus.

    topics: their names, for the legend.
    """
    assert len(topics) <= len(COLOURS)
    with style.drawing():
        fig = style.figure(min(14.0, 8.0 + 0.25 * len(held)), 6.4)
        bars, points = fig.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        _stack(bars, held)
        bars.set_title(style.text(title, 100))
        clients = np.arange(len(held))
        points.plot(clients, [h.divergence for h in held], "o", color="#000000", markersize=7,
                    label="a client's shard")
        points.plot(clients, [h.divergence_at_random for h in held], "_", color="#D55E00",
                    markersize=max(4.0, min(13.0, 400 / len(held))), markeredgewidth=2.4,
                    label="random shard, same size")
        points.set_ylim(0, 1.15 * max(max(h.divergence, h.divergence_at_random) for h in held))
        points.set_ylabel("divergence from\nthe whole (bits)")
        points.set_xlabel("client")
        points.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        points.set_xlim(-0.6, len(held) - 0.4)
        shown = [style.text(name, LONGEST_TOPIC) for name in topics]
        names = [Patch(color=COLOURS[topic], label=f"{letter(topic)}  {name}")
                 for topic, name in enumerate(shown)]
        fig.legend(handles=[*names[::-1], *points.lines], loc="outside right upper",
                   handlelength=1.3, labelspacing=0.55)
    return fig


def _stack(ax: Axes, held: Sequence[ShardStats]) -> None:
    """One bar per client, as high as its tokens; the corpus's largest topic is at the bottom."""
    tallest = max(h.tokens for h in held)
    lettered = len(held) <= LETTERED_CLIENTS
    bottom = np.zeros(len(held), dtype=np.int64)
    for topic in range(len(held[0].topics)):
        tokens = np.array([h.topics[topic] for h in held])
        ax.bar(np.arange(len(held)), tokens, 0.82, bottom, color=COLOURS[topic],
               edgecolor="white", linewidth=0.8 if lettered else 0.0)
        for client in np.flatnonzero(tokens > LETTER_SHARE * tallest) if lettered else []:
            ax.text(int(client), bottom[client] + tokens[client] / 2, letter(topic), ha="center",
                    va="center", fontsize=10.5, color=_ink(COLOURS[topic]))
        bottom += tokens
    ax.grid(axis="x", visible=False)
    ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_ylabel("training tokens")


def _ink(colour: str) -> str:
    """Black or white, whichever contrasts more with a colour (by its luma, Rec. 709)."""
    return "black" if np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)) > 0.45 else "white"

"""Which runs have the same text: perplexities of different ones cannot be compared.

A perplexity is one for each token. A larger vocabulary has fewer and longer tokens, each of which
is harder to predict, and a small or uniform text is easier than a large one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fedrun.common.terminal import visible
from fedrun.plots.run_folder import Run


class Text(NamedTuple):
    """What a run's perplexities are measured on, safe to print."""

    dataset: str
    """Empty if the run does not record it, as those of the original study."""
    tokenizer: str

    def __str__(self) -> str:
        return ", ".join(filter(None, self)) or "text not recorded"


def text_of(run: Run) -> Text:
    """The data set and the tokenizer of a run."""
    return Text(*(visible(str(run.settings.get(name) or "")) for name in Text._fields))


def texts(runs: Iterable[Run]) -> list[Text]:
    """Those of these runs, sorted."""
    return sorted({text_of(run) for run in runs})

"""The figures of `fedrun report`: what stands below each of them, and those of a run's weights."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure

from fedrun.plots import deltas, saved, style

BROAD = 760  # CSS pixels: beside another figure, the text of a wider one would be too small
LAYER = 0

CAPTIONS = {
    "0_all_runs": "Every run, with the settings in which they differ. A panel has the runs of one "
                  "data set and tokenizer: perplexities of others cannot be compared with its own.",
    "1_central_vs_fed": "Central training and FedAvg at its fewest local updates, on the "
                        "validation text and (dotted) on the training text.",
    "2_lu_comparison": "The same number of tokens in rounds of few and of many local updates.",
    "3_method_comparison": "Every method, a panel for each number of local updates.",
    "4_multi_config_comparison": "Every config, each method at its fewest local updates, and the "
                                 "final perplexities side by side.",
    "5_configs_in_one_axes": "Every config as a line, a panel for each method."}
"""By how a figure's name starts. Names go on with the config and the settings, which are in the
figure itself."""


@dataclass(frozen=True)
class Picture:
    """A figure for the page."""

    name: str
    """As `fedrun plot` names it; of a run's own figure, what it shows."""
    caption: str
    source: str
    """A data: URL."""
    width: int
    """In CSS pixels, as the height."""
    height: int

    @property
    def broad(self) -> bool:
        """Whether it needs the whole width of the page."""
        return self.width > BROAD


def picture(name: str, figure: Figure, caption: str = "") -> Picture:
    """A figure as SVG in a data: URL. caption: empty for that of CAPTIONS."""
    content = io.BytesIO()
    style.write(figure, content, "svg")
    width, height = figure.get_size_inches()
    source = "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()
    kind = re.match(r"\d_(all_runs|[a-z]+_vs_fed|(lu|method|multi_config)_comparison"
                    r"|configs_in_one_axes)", name)
    return Picture(name, caption or CAPTIONS.get(kind[0] if kind else "", name), source,
                   round(96 * width), round(96 * height))


def of_weights(data_dir: Path) -> Mapping[Path, list[Picture]]:
    """Each run's figures of how in_proj changed, by the run's folder. The heatmaps have one scale.
    """
    entities = [entity for federated in (False, True)
                for entity in saved.find_entities(data_dir, "server", federated, None).entities
                if LAYER in entity.layers]
    made: dict[Path, list[Picture]] = {}
    limit = deltas.common_limit(entities, LAYER)
    with style.drawing():
        for entity in entities:
            own = replace(entity, differs=())  # the page has a run's settings beside its figures
            made[entity.run.path] = [
                picture("how in_proj changed", deltas.heatmap(own, LAYER, limit),
                        deltas.explained(entity, LAYER)),
                picture("largest singular values", deltas.evolution([own], LAYER),
                        "The largest singular values of the change: how fast it grows, and in how "
                        "many directions."),
                picture("all singular values", deltas.spectrum([own], LAYER),
                        "All of them at the end. The dashed line is the rank that holds 95 % of "
                        "the change's energy, the sum of their squares.")]
    return made

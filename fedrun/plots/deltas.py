"""`fedrun plot deltas` and `federated-deltas`: how in_proj changed since the start of a run.

    heatmap_structure_{run}.png              where in the matrix the change lies, step by step
    averaged_svd_evolution_{config}.png      its largest singular values over the steps
    averaged_final_spectrum_{config}.png     all singular values at the end, and the rank that
                                             holds 95 % of the energy (sum of squares)

Federated runs have heatmap_{method}_{config}_lu_{lu}_seed_{seed}_{entity},
svd_evolution_{method}_{config}_lu_{lu} and svd_spectrum_..., followed by _{entity} unless it is the
server. Names end in _layer{N} unless it is layer 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.colors import FuncNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fedrun.plots import style, tables
from fedrun.plots.groups import groups
from fedrun.plots.saved import Entity, FoundEntities

ROWS_AND_COLUMNS = 80  # of the matrix in a heatmap
HEATMAPS = 10  # steps in a figure
TOP_VALUES = 8  # singular values drawn over the steps
SUBSCRIPTS = "₁₂₃₄₅₆₇₈"
WIDTH = 7.6  # inches, of figures of singular values without a table
WIDE = 10  # the ratio of singular values from which on their axis is logarithmic
ENERGY = 0.95
COLOUR_QUANTILE = 0.98
"""The colour scale ends at this quantile of the changes. If it ended at the largest change, one
extreme element would make all others pale."""

# ---- the numbers ---------------------------------------------------------------------------------

def evenly(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly spaced, with the first and the last."""
    places = np.linspace(0, len(steps) - 1, min(count, len(steps))).round().astype(int)
    return [steps[place] for place in dict.fromkeys(places.tolist())]


def strongest(change: np.ndarray, count: int = ROWS_AND_COLUMNS) -> tuple[np.ndarray, np.ndarray]:
    """Indices, ascending, of the `count` rows and the `count` columns of largest Euclidean norm."""
    rows = np.sort(np.argsort(-np.linalg.norm(change, axis=1), kind="stable")[:count])
    columns = np.sort(np.argsort(-np.linalg.norm(change, axis=0), kind="stable")[:count])
    return rows, columns


def singular_values(change: np.ndarray) -> np.ndarray:
    """All singular values in descending order, computed in float64."""
    values: np.ndarray = np.linalg.svd(change.astype(np.float64), compute_uv=False)
    return values


def energy_rank(values: np.ndarray, share: float = ENERGY) -> int:
    """The smallest rank whose squared singular values make up `share` of the total."""
    energy = np.cumsum(values**2)
    return int(np.searchsorted(energy, share * energy[-1])) + 1


# ---- the figures ---------------------------------------------------------------------------------

def figures(found: FoundEntities, layer: int | None = 0) -> dict[str, Figure | str]:
    """All figures by name, or the reason why there is none. layer: None for all layers."""
    made: dict[str, Figure | str] = {}
    if not found.entities:
        needed = "runs" if found.entity in ("server", "central") \
            else "runs with --save_client_deltas"
        kind = "federated" if found.federated else "central"
        return {f"heatmaps and spectra of {found.entity}": f"need {kind} {needed}"}
    layers = sorted({n for e in found.entities for n in e.layers}) if layer is None else [layer]
    families = _families(found.entities)
    with style.drawing():
        for number in layers:
            limit = common_limit([e for e in found.entities if number in e.layers], number)
            suffix = f"_layer{number}" if number else ""
            for entity in found.entities:
                name = (f"heatmap_{_family(entity)}_seed_{entity.run.seed}_{entity.name}"
                        if found.federated else f"heatmap_structure_{entity.run.name}")
                made[_unused(made, name + suffix, entity)] = (
                    heatmap(entity, number, limit) if number in entity.layers
                    else _no_layer(entity))
            for family, members in families.items():
                having = [e for e in members if number in e.layers]
                entity_suffix = "" if found.entity in ("server", "central") else f"_{found.entity}"
                names = ((f"svd_evolution_{family}", f"svd_spectrum_{family}") if found.federated
                         else (f"averaged_svd_evolution_{family}",
                               f"averaged_final_spectrum_{family}"))
                for name, draw in zip(names, (evolution, spectrum), strict=True):
                    made[name + entity_suffix + suffix] = (
                        _no_layer(members[0]) if not having else
                        _no_mean(having, number) or draw(having, number))
    return made


def _families(entities: Sequence[Entity]) -> dict[str, list[Entity]]:
    """Repetitions with different seeds, by the name that their figures share.

    Of two runs with the same seed only the first is used. Settings that differ between families are
    part of the name.
    """
    by_path = {entity.run.path: entity for entity in entities}
    families: dict[str, list[Entity]] = {}
    for group in groups(entity.run for entity in entities):
        variant = re.sub(r"[^\w.=-]+", "_", group.variant)
        by_seed = {run.seed: by_path[run.path] for run in reversed(group.runs)}
        name = "_".join(filter(None, [_family(by_path[group.runs[0].path]), variant]))
        families[name] = [by_seed[seed] for seed in sorted(by_seed)]
    return families


def common_limit(entities: Sequence[Entity], layer: int) -> float:
    """Where the colour scale of these entities' heatmaps ends, so that they can be compared: at a
    quantile of all that they show."""
    shown = [np.abs(change).ravel() for entity in entities
             for change in _shown(entity, layer)[0].values()]
    return float(np.quantile(np.concatenate(shown), COLOUR_QUANTILE)) or 1.0 if shown else 1.0


def _colours(limit: float) -> FuncNorm:
    """A scale from -limit to limit on which a colour's strength is the square root of the change.

    On a linear one the small changes, of an early step or of a run with a lower learning rate than
    the others, would be white.
    """
    return FuncNorm((lambda change: np.sign(change) * np.sqrt(np.abs(change)),
                     lambda colour: np.sign(colour) * np.square(colour)), -limit, limit)


def explained(entity: Entity, layer: int) -> str:
    """What a heatmap shows, in words."""
    _, rows, columns, (total_rows, total_columns) = _shown(entity, layer)
    return (f"The change of in_proj since {entity.since}. It maps {total_columns} inputs (columns) "
            f"to {total_rows} outputs (rows): the gate of the layer, its input, its B and C and "
            f"its step sizes. Here are the {len(columns)} columns and the {len(rows)} rows whose "
            "change is largest at the end. Red grew, blue fell. All heatmaps of this page share "
            "their colours, so a pale one is of a run whose weights moved little.")


def _shown(entity: Entity, layer: int
           ) -> tuple[dict[int, np.ndarray], np.ndarray, np.ndarray, tuple[int, ...]]:
    """What a heatmap shows: the change at up to ten steps in the rows and the columns that changed
    most by the last one; these rows and columns; the whole shape."""
    steps = evenly(entity.changed_steps, HEATMAPS)
    changes = entity.changes(layer, steps)
    rows, columns = strongest(changes[steps[-1]])
    return ({step: change[np.ix_(rows, columns)] for step, change in changes.items()}, rows,
            columns, changes[steps[-1]].shape)


def heatmap(entity: Entity, layer: int, limit: float) -> Figure:
    """The rows and columns that changed most by the last step, shown at up to ten steps.

    limit: where the colour scale ends, from `common_limit`.
    """
    shown, rows, columns, (total_rows, total_columns) = _shown(entity, layer)
    steps = list(shown)
    across = min(5, len(steps))
    down = -(-len(steps) // across)
    fig = style.figure(1.6 + 2.5 * across, 1.5 + 2.6 * down)
    grid = fig.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    axes = list(grid.flat)
    for ax, step in zip(axes, steps, strict=False):
        image = ax.imshow(shown[step], cmap=style.DIVERGING, norm=_colours(limit),
                          aspect="auto", interpolation="nearest")
        ax.set_title(f"step {step}" if entity.run.method == "central" else f"round {step}",
                     fontsize=12)
        ax.grid(False)
        ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    for unused in axes[len(steps):]:
        unused.remove()
    beyond = np.mean([np.abs(change) > limit for change in shown.values()])
    fig.colorbar(image, ax=axes[:len(steps)], extend="both", shrink=0.9, pad=0.015,
                 ticks=[part * limit for part in (-1, -0.25, 0, 0.25, 1)], format="%.2g",
                 label=f"change of the weight\n({beyond:.1%} beyond the ends)")
    fig.supxlabel(_part(len(columns), total_columns, "inputs"), fontsize=12)
    fig.supylabel(_part(len(rows), total_rows, "outputs"), fontsize=12)
    fig.suptitle(style.lines(
        fig.get_figwidth(), f"Change of in_proj since {entity.since}, {_layer(entity, layer)}",
        f"{_title(entity)}, seed {entity.run.seed}"))
    tables.settings_beside(fig, entity.differs)
    return fig


def _part(count: int, total: int, what: str) -> str:
    return f"all {total} {what}" if count == total else \
        f"the {count} of {total} {what} that changed most"


def evolution(entities: Sequence[Entity], layer: int) -> Figure:
    """The largest singular values over the steps: mean over seeds and standard deviation."""
    steps, values = _over_seeds(entities, layer)  # (seeds, steps, values)
    fig = style.figure(WIDTH, 5.0)
    ax = fig.subplots()
    shades = np.linspace(0.95, 0.35, min(TOP_VALUES, values.shape[-1]))
    handles = []
    for index, shade in enumerate(shades):
        colour = style.shade(entities[0].run.method, float(shade))
        series = values[:, :, index]
        handles += ax.plot(steps, series.mean(axis=0), color=colour, marker="o", markersize=4,
                           label=f"σ{SUBSCRIPTS[index]}")
        if len(series) > 1:
            std = series.std(axis=0, ddof=1)
            ax.fill_between(steps, series.mean(axis=0) - std, series.mean(axis=0) + std,
                            color=colour, alpha=style.BAND_OPACITY, linewidth=0)
    means = values.mean(axis=0)[:, :len(shades)]
    if means.min() > 0 and means.max() > WIDE * means.min():
        ax.set_ylim(means.min() / 1.2, means.max() * 1.2)
        style.log_axis(ax)
    else:
        ax.set_ylim(bottom=0)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlabel("step" if entities[0].run.method == "central" else "round")
    ax.set_ylabel("singular value")
    ax.set_title(style.lines(
        WIDTH - 1, "Largest singular values of the change of in_proj, "
        + _layer(entities[0], layer), _title(entities[0], len(values))))
    style.legend_below(fig, handles, TOP_VALUES // 2)
    tables.settings_beside(fig, entities[0].differs)
    return fig


def spectrum(entities: Sequence[Entity], layer: int) -> Figure:
    """All singular values at the last step that all seeds saved, and the rank of 95 % energy."""
    steps, values = _over_seeds(entities, layer, last_only=True)
    final = values[:, -1]
    mean = final.mean(axis=0)
    rank = energy_rank(mean)
    look = style.look(entities[0].run.method)
    fig = style.figure(WIDTH, 5.0)
    ax = fig.subplots()
    numbers = np.arange(1, len(mean) + 1)
    handles = ax.plot(numbers, mean, color=look.colour, label="mean" if len(final) > 1 else
                      f"seed {entities[0].run.seed}")
    if len(final) > 1:
        std = final.std(axis=0, ddof=1)
        ax.fill_between(numbers, (mean - std).clip(min=mean[mean > 0].min(initial=1e-12) / 10),
                        mean + std, color=look.colour, alpha=style.BAND_OPACITY, linewidth=0)
    ax.axvline(rank, color="#444444", linestyle=(0, (4, 2)), linewidth=1.4)
    handles.append(Line2D([], [], color="#444444", linestyle=(0, (4, 2)), linewidth=1.4,
                          label=f"{ENERGY:.0%} of the energy in rank {rank} of {len(mean)}"))
    if mean.any():
        style.log_axis(ax)
    ax.set_xlim(0, len(mean) + 1)
    ax.set_xlabel("number of the singular value")
    ax.set_ylabel("singular value")
    when = "step" if entities[0].run.method == "central" else "round"
    ax.set_title(style.lines(
        WIDTH - 1, f"Singular values of the change of in_proj, {_layer(entities[0], layer)}, "
        f"{when} {steps[-1]}", _title(entities[0], len(final))))
    style.legend_below(fig, handles, 2)
    tables.settings_beside(fig, entities[0].differs)
    return fig


def _over_seeds(entities: Sequence[Entity], layer: int, last_only: bool = False
                ) -> tuple[list[int], np.ndarray]:
    """The steps that all entities saved, and singular values (entities, steps, values)."""
    common = set.intersection(*(set(e.changed_steps) for e in entities))
    steps = sorted(common)[-1:] if last_only else sorted(common)
    return steps, np.array([[singular_values(change) for change in
                             e.changes(layer, steps).values()] for e in entities])


def _layer(entity: Entity, layer: int) -> str:
    """The layer in words."""
    return f"layer {layer}" if entity.says_layer else "layer not said by its files"


def _family(entity: Entity) -> str:
    run = entity.run
    return run.config if run.method == "central" else (
        f"{run.method}_{run.config}_lu_{run.local_updates}")


def _title(entity: Entity, seeds: int = 1) -> str:
    run = entity.run
    what = f"{style.label(run.method)}, {style.text(run.config, 28)}"
    end = f", mean of {seeds} seeds" * (seeds > 1)
    if run.method == "central":
        return f"{what}{end}"
    who = "global model" if entity.name == "server" else style.text(entity.name.replace("_", " "))
    updates = f"{run.local_updates} local update{'s' * (run.local_updates != 1)}"
    return f"{what}, {updates}, {who}{end}"


def _no_layer(entity: Entity) -> str:
    return f"--layer: {entity.run.name} has layers {', '.join(map(str, entity.layers))}"


def _no_mean(entities: Sequence[Entity], layer: int) -> str:
    """Why these entities have no mean; empty if they have one."""
    if len({entity.shapes[layer] for entity in entities}) > 1:
        return "needs runs whose in_proj have the same shape"
    if not set.intersection(*(set(entity.changed_steps) for entity in entities)):
        return "needs runs that saved a step in common"
    return ""


def _unused(made: dict[str, Figure | str], name: str, entity: Entity) -> str:
    """`name`, with the folder's name added if another run with the same method and seed has it."""
    return name if name not in made else f"{name}_{entity.run.name}"

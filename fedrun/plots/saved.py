"""Reads saved steps of models from run folders: in_proj, or its change since the start.

    params/step_000030.npz, deltas/step_000030.npz      central runs
    server/params/..., client_0/deltas/..., ...         federated runs

Files that are damaged or not ours are reported and skipped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedrun.common.errors import InputError, one_line
from fedrun.common.files import open_regular
from fedrun.common.terminal import visible
from fedrun.plots.groups import Settings, groups
from fedrun.plots.run_folder import Damaged, Run, identify
from fedrun.plots.runs import run_folders
from fedrun.plots.studies import HISTORIES, is_study

STEP_FILE = re.compile(r"step_(\d{1,15})\.npz")
LARGEST_ARRAY = 1 << 32  # bytes
# Keys of the npz files, not names of parameters; an original run's file may lack the layer.
IN_PROJ = re.compile(r"(?:delta_)?(?:layers\.(?P<layer>\d+)\.)?in_proj")


@dataclass(frozen=True)
class Entity:
    """The saved steps of one model of a run: the global model, a client's or a central run's."""

    run: Run
    """Its history is not read: these figures do not need it."""
    name: str
    """server, client_0, ... or central."""
    folder: Path
    files: dict[int, Path]
    """The npz file of each saved step, in order: deltas if there are any, else parameters."""
    is_delta: bool
    shapes: dict[int, tuple[int, ...]]
    """(rows, columns) of each layer's in_proj, the same in all files."""
    says_layer: bool = True
    """Whether the files say which layer they hold. Those of the original study hold one layer, of
    several the last, without saying so; it counts as layer 0 here."""
    differs: Settings = ()
    """The settings in which it differs from other runs of its method."""

    def changes(self, layer: int, steps: Sequence[int]) -> dict[int, np.ndarray]:
        """The change of in_proj (rows, columns) at each of `steps`.

        Since the start of the run, or since the first saved step if only parameters were saved.
        """
        arrays = {step: _in_proj(self.files[step])[layer] for step in steps}
        if self.is_delta:
            return arrays
        first = _in_proj(self.files[self.steps[0]])[layer]
        return {step: array - first for step, array in arrays.items()}

    @property
    def layers(self) -> list[int]:
        return list(self.shapes)

    @property
    def steps(self) -> list[int]:
        """All saved steps."""
        return list(self.files)

    @property
    def changed_steps(self) -> list[int]:
        """Steps with a change: all, or all but the first if changes are computed from it."""
        return self.steps if self.is_delta else self.steps[1:]

    @property
    def since(self) -> str:
        """What changes are relative to, in words."""
        return "the start" if self.is_delta else f"step {self.steps[0]}"


@dataclass(frozen=True)
class FoundEntities:
    """What a data folder has of one entity, and the files that were skipped with the reason."""

    entity: str
    federated: bool
    entities: list[Entity]
    passed_over: list[tuple[str, str]]

    def __str__(self) -> str:
        return "\n".join([
            f"found {len(self.entities)} runs with saved changes of {self.entity}",
            *(f"note {e.run.name}: its files hold one layer without saying which; those of older "
              "runs hold the last one" for e in self.entities if not e.says_layer),
            *(f"skipped {name}: {reason}" for name, reason in self.passed_over)])


def find_entities(data_dir: Path, entity: str, federated: bool, config: str | None
                  ) -> FoundEntities:
    """The saved steps of `entity` in all central, or all federated, runs under `data_dir`.

    config: only runs of this config. Raises InputError if there is no such folder.
    """
    found, passed_over = [], []
    for path in run_folders(data_dir):
        try:
            run = identify(path)
            if (run.method != "central") != federated or config not in (None, run.config):
                continue
            read, damage = _read_entity(run, entity if federated else "central",
                                        path / entity if federated else path)
            found.append(read)
            passed_over += [(f"{run.name}/{file}", reason) for file, reason in damage]
        except Damaged as damaged:
            passed_over.append((visible(path.name), str(damaged)))
    if is_study(data_dir):
        passed_over.append((HISTORIES, "has no weights, which are in the folders of its runs"))
    differs = {run.path: group.differs for group in groups(read.run for read in found)
               for run in group.runs}
    return FoundEntities(entity if federated else "central", federated,
                         [replace(read, differs=differs[read.run.path]) for read in found],
                         passed_over)


def _read_entity(run: Run, name: str, folder: Path) -> tuple[Entity, list[tuple[str, str]]]:
    """The entity and its damaged files. Raises Damaged if no file can be used."""
    model = run.settings.get("model")
    if isinstance(model, dict) and "transformers" in model:
        raise Damaged("its model is one of transformers, which names no parameters to save")
    damage: list[tuple[str, str]] = []
    for kind in ("deltas", "params"):
        files: dict[int, Path] = {}
        shapes: dict[int, tuple[int, ...]] = {}
        for path in sorted((folder / kind).glob("step_*.npz")):
            step = STEP_FILE.fullmatch(path.name)
            if step is None:
                continue
            try:
                found = {n: array.shape for n, array in sorted(_in_proj(path).items())}
                if shapes not in ({}, found):
                    raise Damaged("differs from the file before it in its layers or their shapes")
                shapes, files[int(step[1])] = found, path
            except Damaged as damaged:
                damage.append((visible(str(path.relative_to(run.path))), str(damaged)))
        entity = Entity(run, name, folder, dict(sorted(files.items())), kind == "deltas", shapes,
                        not files or _says_layer(next(iter(files.values()))))
        if entity.changed_steps:
            return entity, damage
    reasons = "; ".join(f"{file} {reason}" for file, reason in damage)
    raise Damaged(reasons or f"no deltas/step_*.npz and fewer than two params/step_*.npz in "
                  f"{folder.relative_to(run.path.parent)}")


def _in_proj(path: Path) -> dict[int, np.ndarray]:
    """Each layer's in_proj, or its change, in a file. A key without a layer is layer 0."""
    found = {}
    try:
        with open_regular(path) as content, np.load(content) as file:
            for name in file.files:
                key = IN_PROJ.fullmatch(name)
                if key and file.zip.getinfo(f"{name}.npy").file_size > LARGEST_ARRAY:
                    raise InputError(f"{name} has more than {LARGEST_ARRAY} bytes")
                if key:
                    found[int(key["layer"] or 0)] = file[name]
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise Damaged(f"is damaged: {one_line(error).removeprefix(f'{path} ')}") from None
    if not found or not all(map(_is_matrix, found.values())):
        raise Damaged("has no in_proj that is a matrix of finite values")
    return found


def _says_layer(path: Path) -> bool:
    """Whether the keys of a file that has been read name layers."""
    with open_regular(path) as content, np.load(content) as file:
        return any(key["layer"] for name in file.files if (key := IN_PROJ.fullmatch(name)))


def _is_matrix(array: np.ndarray) -> bool:
    """Whether this is a matrix of numbers within float32, whose squares float64 can hold."""
    return bool(array.ndim == 2 and array.size and array.dtype.kind in "fiu"
                and np.abs(array).max() <= np.finfo(np.float32).max)  # false for nan

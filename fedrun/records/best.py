"""--keep best: the model with the lowest validation loss, beside the last one.

    best/model.safetensors    its step and loss are in the file's own metadata
         config.json          the run's
         tokenizer/

`generate`, `evaluate`, `export` and `--init_from` accept the folder in place of a run's. Which
model is kept is read from the model file alone, so a kill cannot make the file and a record of it
disagree. After a kill the file may belong to a step that the resumed run has yet to repeat: that
step yields the same model to the bit, and a different model is recognised by its loss.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedrun.common.files import write_json
from fedrun.common.log import WARNING, log
from fedrun.config import RunConfig
from fedrun.records.run_files import BEST
from fedrun.records.snapshots import save_model

_METADATA_KEY = "fedrun"


class BestModel:
    """Keeps the best of the models it is offered. They must be offered in the order of their steps.
    """

    def __init__(self, config: RunConfig, losses: Sequence[tuple[int, float]]) -> None:
        """losses: (step, validation loss) of the evaluations before a resumed run's checkpoint."""
        self.folder = config.run_dir / BEST
        self.kept = _read_step_and_loss(self.folder / "model.safetensors")
        self._unwritten: dict[str, Tensor] | None = None  # the best, while the disk is full
        if losses:
            step, loss = min(losses, key=lambda evaluation: evaluation[1])
            if self.kept is None or self.kept[1] > loss:
                log(f"--keep best: the best model so far, of step {step}, was not kept; the best "
                    "of the following steps will be", WARNING)
        shutil.copytree(config.run_dir / "tokenizer", self.folder / "tokenizer", dirs_exist_ok=True)
        write_json(self.folder / "config.json", config.to_dict())

    def offer(self, step: int, loss: float, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Keep the model of a step, given as named parameters, if its loss (nats per token) is the
        lowest so far.

        Raises OSError if the model cannot be written; the next offer tries again.
        """
        if self.kept is None or loss < self.kept[1] or (step == self.kept[0]
                                                        and loss != self.kept[1]):
            self.kept, self._unwritten = (step, loss), dict(tensors)
        if self._unwritten is None or self.kept is None:
            return
        try:
            # One metadata key: the library writes several in any order, and the bits would differ.
            metadata = json.dumps({"step": self.kept[0], "val_loss": self.kept[1]})
            save_model(self.folder / "model.safetensors", self._unwritten.items(),
                       {_METADATA_KEY: metadata})
        except OSError:
            self._unwritten = {name: t.clone() for name, t in self._unwritten.items()}
            raise
        self._unwritten = None


def _read_step_and_loss(path: Path) -> tuple[int, float] | None:
    """Step and loss of the kept model; None if there is no readable one."""
    with suppress(OSError, SafetensorError, KeyError, ValueError, TypeError):
        with safe_open(path, framework="pt") as file:
            metadata = json.loads(file.metadata()[_METADATA_KEY])
        return int(metadata["step"]), float(metadata["val_loss"])
    return None

"""--keep best: the model with the lowest validation loss, beside the last one.

    best/model.safetensors    its step and loss stand in the file itself, as metadata
         config.json          the run's
         tokenizer/

The folder takes the place of a run's wherever one is read: `generate`, `evaluate`, `export`,
`--init_from`. What is kept is known from the file alone, so no kill can leave file and record
apart. After a kill the file may be of a step that the resumed run has still to make again: it will
be the same model to the bit, and is told from another one by its loss.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedrun.common.files import write_json
from fedrun.config import RunConfig
from fedrun.records.run_dir import save_model
from fedrun.records.run_files import BEST

_KEY = "fedrun"


class BestModel:
    """Keeps the best of the models that it is offered, in the order of their steps."""

    def __init__(self, config: RunConfig, losses: Sequence[tuple[int, float]],
                 say: Callable[[str], None]) -> None:
        """losses: (step, validation loss) of what a resumed run has evaluated before."""
        self.folder = config.run_dir / BEST
        self.kept = _read(self.folder / "model.safetensors")
        self._unwritten: dict[str, Tensor] | None = None  # the best, while the disk is full
        if losses:
            step, loss = min(losses, key=lambda one: one[1])
            if self.kept is None or self.kept[1] > loss:
                say(f"fedrun: warning: --keep best: the best model so far, of step {step}, was not "
                    "kept; the best of those from here on is")
        shutil.copytree(config.run_dir / "tokenizer", self.folder / "tokenizer", dirs_exist_ok=True)
        write_json(self.folder / "config.json", config.to_dict())

    def offer(self, step: int, loss: float, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Keep the model of a step, named parameters, if its loss (nats a token) is the lowest.

        OSError where it cannot be written: it is tried again at the next offer.
        """
        if self.kept is None or loss < self.kept[1] or (step == self.kept[0]
                                                        and loss != self.kept[1]):
            self.kept, self._unwritten = (step, loss), dict(tensors)
        if self._unwritten is None or self.kept is None:
            return
        try:
            # Under one key: the library writes several in any order, and the bits would differ.
            told = json.dumps({"step": self.kept[0], "val_loss": self.kept[1]})
            save_model(self.folder / "model.safetensors", self._unwritten.items(), {_KEY: told})
        except OSError:
            self._unwritten = {name: t.clone() for name, t in self._unwritten.items()}
            raise
        self._unwritten = None


def _read(path: Path) -> tuple[int, float] | None:
    """Step and loss of the model that is kept; None where there is none that can be read."""
    with suppress(OSError, SafetensorError, KeyError, ValueError, TypeError):
        with safe_open(path, framework="pt") as file:
            told = json.loads(file.metadata()[_KEY])
        return int(told["step"]), float(told["val_loss"])
    return None

"""A run's folder as an object: settings, history, model, text, figures."""

from __future__ import annotations

import html
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from fedrun.common.errors import InputError, naming
from fedrun.common.files import read_json
from fedrun.common.terminal import visible
from fedrun.records.outcome import read_outcome
from fedrun.records.schema import CENTRAL, FEDERATED, HELD_OUT, SITE_VAL_PPL, read_field

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

    from fedrun.model.mamba2 import Mamba2LM
    from fedrun.model.pretrained import Pretrained
    from fedrun.model.transformers_lm import TransformersLM
    from fedrun.plots.run_folder import Axis


_FIRST_COLUMNS = (FEDERATED.step, CENTRAL.step, "train_ppl", FEDERATED.val_ppl, CENTRAL.val_ppl,
                  SITE_VAL_PPL)


class History(list[dict[str, Any]]):
    """The records of the evaluated steps, oldest first, as training_history.json has them."""

    def frame(self) -> pandas.DataFrame:
        """The same as a table, a row for each record; the step and the perplexities come first."""
        import pandas
        frame = pandas.DataFrame(list(self))
        first = [name for name in _FIRST_COLUMNS if name in frame]
        return frame[[*first, *(name for name in frame if name not in first)]]

    def __repr__(self) -> str:
        if not self:
            return "<History: nothing evaluated yet>"
        first, last = (read_field(record, "step") for record in (self[0], self[-1]))
        ppl = read_field(self[-1], "val_ppl")
        sites = f", {HELD_OUT} {_shown(self[-1][SITE_VAL_PPL])}" \
            if SITE_VAL_PPL in self[-1] else ""
        return (f"<History: {len(self)} evaluated, steps {first} to {last}; last validation "
                f"perplexity {_shown(ppl)}{sites}; .frame() is a table>")


class Run:
    """A run's folder, while the run lasts or after its end. Everything is read when it is asked
    for; `open_run` makes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __repr__(self) -> str:
        return f"fedrun.open_run({str(self.folder)!r})"

    @cached_property
    def config(self) -> dict[str, Any]:
        """The run's settings by the names of their flags, as config.json has them."""
        return read_json(self.folder / "config.json", dict)

    @property
    def history(self) -> History:
        """The evaluated steps so far; of a run without any, an empty list."""
        try:
            return History(read_json(self.folder / "training_history.json", list))
        except FileNotFoundError:
            return History()

    @property
    def outcome(self) -> str:
        """running, finished, stopped or failed; empty if the folder does not say."""
        return str(read_outcome(self.folder).get("outcome", ""))

    @property
    def reason(self) -> str:
        """Why the run stopped or failed, in one line; else empty."""
        return str(read_outcome(self.folder).get("reason", ""))

    @property
    def diverged(self) -> bool:
        """Whether the run failed because its loss or parameters were not finite any more."""
        return read_outcome(self.folder).get("kind") == "diverged"

    @property
    def perplexity(self) -> float | None:
        """The global model's validation perplexity at the last evaluation; None before the first.
        """
        return read_field(self.history[-1], "val_ppl") if self.history else None

    def model(self, client: int | None = None) -> Mamba2LM | TransformersLM:
        """The last good global model, float32, on the CPU. client: here and below, of a run with
        --personal, the one whose own model is meant, of the newest checkpoint."""
        return self._pretrained(client).build()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The run's tokenizer, as transformers has it."""
        from fedrun.data.tokenizer import load_without_custom_code
        from fedrun.library.tokenizers import need_tokenizer
        return load_without_custom_code(need_tokenizer(self._pretrained()))

    def generate(self, prompt: str, *, client: int | None = None, **options: Any) -> str:
        """The prompt and the model's continuation; options as in `generation.continue_text`."""
        from fedrun.library.generation import continue_text
        return continue_text(self._pretrained(client), prompt, **options)

    def evaluate(self, dataset: str | None = None, split: str | None = None, *,
                 client: int | None = None, **options: Any) -> dict[str, Any]:
        """Loss and perplexity on any text, by default on what was held out from the run's own;
        options as in `evaluation.evaluate`."""
        from fedrun.library.evaluation import evaluate
        return evaluate(self._pretrained(client), dataset, split, **options)

    def export(self, out: str | Path, to: str = "hf", *, client: int | None = None) -> Path:
        """Write the model for transformers (`hf`) or the original library (`mamba_ssm`) into the
        new or empty folder `out`, which is returned."""
        from fedrun.library.exporting import LOADS, export
        if to not in LOADS:
            raise InputError(f"to={to}: must be {' or '.join(LOADS)}")
        folder = Path(out).expanduser()
        with naming("out", folder):
            export(self._pretrained(client), to, folder)
        return folder

    def plot(self, x: Axis = "tokens") -> Figure:
        """A figure of the run's perplexities, train and validation, against tokens, steps, rounds,
        seconds or bytes. InputError if nothing has been evaluated yet."""
        from fedrun.plots.one_run import figure
        from fedrun.plots.run_folder import Axis, Damaged, read_run
        if x not in get_args(Axis):
            raise InputError(f"x={x}: must be one of {', '.join(get_args(Axis))}")
        try:
            return figure(read_run(self.folder), x)
        except Damaged as damaged:
            raise InputError(f"{self.folder}: {damaged}") from None

    def _pretrained(self, client: int | None = None) -> Pretrained:
        from fedrun.library.own_models import of_client
        from fedrun.model.pretrained import find_pretrained
        return of_client(find_pretrained(str(self.folder), "RUN"), client)

    def _repr_html_(self) -> str:
        """What a notebook shows: the outcome, the last perplexity, the settings."""
        last = self.history[-1:]
        facts = {"folder": self.folder, "outcome": self.outcome,
                 "evaluated step": read_field(last[0], "step") if last else "none yet",
                 "validation perplexity": "none yet" if self.perplexity is None
                 else f"{self.perplexity:.2f}"}
        if last and SITE_VAL_PPL in last[0]:
            facts[f"perplexity {HELD_OUT}"] = _shown(last[0][SITE_VAL_PPL])
        settings = {name: value for name, value in self.config.items() if name != "model"}
        return (_table(facts) + "<details><summary>settings</summary>" + _table(settings)
                + "</details>")


def _shown(perplexity: float | None) -> str:
    """A perplexity of a history, in which null stands for infinity."""
    return "not finite" if perplexity is None else f"{perplexity:.2f}"


def _table(values: dict[str, Any]) -> str:
    rows = "".join(f"<tr><td>{_cell(name)}</td><td>{_cell(value)}</td></tr>"
                   for name, value in values.items())
    return f"<table>{rows}</table>"


def _cell(value: Any) -> str:
    return html.escape(visible(str(value)))


def open_run(folder: str | Path) -> Run:
    """A run by its folder, or by its name in results/.

    Raises:
        InputError: there is no such folder, or it is not a run's.
    """
    path = Path(folder).expanduser()
    if not path.is_dir() and (Path("results") / path).is_dir():
        path = Path("results") / path
    try:
        if "method" not in Run(path).config:
            raise InputError(f"{path}: config.json is not a run's")
    except FileNotFoundError:
        raise InputError(f"{path}: no run there; must be a run's folder, or its name in "
                         "results/") from None
    return Run(path)

"""A notebook that trains, draws, and trains with a method that one of its cells defines."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

CELLS = ["""
import json
import fedrun
flags = json.loads({flags!r})
run = fedrun.train("fed_avg", run_name="plain", **flags)
run
""", """
figure = run.plot()
figure
""", """
from dataclasses import dataclass, field

@fedrun.strategy("fed_half")
@dataclass(frozen=True)
class FedHalf(fedrun.FedAvg):
    step: float = field(default=0.5, metadata={{"help": "How far of the way."}})

    def server_update(self, model, state, mean, context):
        model.add_(mean["delta"], alpha=self.step)

half = fedrun.train("fed_half", run_name="half", **flags)
whole = fedrun.train("fed_half", run_name="whole", step=1.0, **flags)
""", """
same = all((a == b).all() for a, b in zip(run.model().parameters(), whole.model().parameters()))
print(bool(same), half.perplexity != run.perplexity, half.config["step"])
"""]


@pytest.mark.slow
def test_a_notebook(tmp_path: Path, little_text: tuple[str, ...]) -> None:
    flags = dict(zip((flag.removeprefix("--") for flag in little_text[::2]), little_text[1::2],
                     strict=True)) | {"data_dir": str(tmp_path), "num_clients": 2, "rounds": 3}
    book = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell(cell.format(flags=json.dumps(flags))) for cell in CELLS])
    NotebookClient(book, timeout=100, kernel_name="python3").execute()
    first, drawn, _, last = (cell.outputs for cell in book.cells)
    assert "fedrun: round 3/3" in "".join(out.get("text", "") for out in first)
    assert "validation perplexity" in first[-1]["data"]["text/html"]
    assert "image/png" in drawn[-1]["data"]
    assert last[-1]["text"] == "True True 0.5\n"

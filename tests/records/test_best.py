"""--keep best: which model is kept, that every command accepts it, and that a kill changes nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fedrun import cli
from fedrun.flags import resolve
from fedrun.records import best as best_module
from fedrun.records.best import BestModel
from fedrun.records.snapshots import save_model
from fedrun.tools import evaluate, generate
from tests.support.disk import full
from tests.support.runs import Run, read_json

Losses = list[tuple[int, float]]


@pytest.fixture
def keeper(tmp_path: Path, caplog: pytest.LogCaptureFixture
           ) -> Callable[..., tuple[BestModel, list[str]]]:
    """keeper(losses): a BestModel as a start of the run makes it, and what it logs then."""
    config = resolve("fed_avg", {"data_dir": str(tmp_path), "run_name": "run", "keep": "best"})
    (config.run_dir / "tokenizer").mkdir(parents=True)

    def start(losses: Losses = []) -> tuple[BestModel, list[str]]:  # noqa: B006
        caplog.clear()
        return BestModel(config, losses), caplog.messages

    return start


def offer(best: BestModel, *losses: tuple[int, float]) -> None:
    for step, loss in losses:
        best.offer(step, loss, [("w", torch.tensor([float(step), loss]))])


def kept(best: BestModel) -> tuple[int, float]:
    """Step and loss of the model in the file."""
    path = best.folder / "model.safetensors"
    step, loss = load_file(path)["w"].tolist()
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["fedrun"])
    assert metadata == {"step": step, "val_loss": loss}
    return int(step), loss


def test_the_lowest_loss_is_kept_and_the_first_of_equal_ones(keeper: Any) -> None:
    best, logged = keeper()
    seen = []
    for evaluation in ((1, 5.0), (3, 3.0), (6, 4.0), (9, 3.0), (12, 2.5), (15, 3.5)):
        offer(best, evaluation)
        seen.append(kept(best)[0])
    assert seen == [1, 3, 3, 3, 12, 12]
    assert logged == []


def test_a_resumed_run_knows_what_is_kept(keeper: Any) -> None:
    offer(keeper()[0], (1, 5.0), (3, 3.0), (6, 4.0))
    best, logged = keeper([(1, 5.0), (3, 3.0), (6, 4.0)])
    offer(best, (9, 3.5))
    assert kept(best) == (3, 3.0)
    offer(best, (12, 2.5))  # killed here, after a checkpoint of step 6
    best, _ = keeper([(1, 5.0), (3, 3.0), (6, 4.0)])
    offer(best, (9, 3.5), (12, 2.5), (15, 2.75))
    assert kept(best) == (12, 2.5)
    best, _ = keeper([(1, 5.0), (3, 3.0), (6, 4.0)])
    offer(best, (9, 3.5), (12, 2.625))  # another model at that step
    assert kept(best) == (12, 2.625)
    assert logged == []


@pytest.mark.parametrize("damage", ["none", "cut", "no metadata"])
def test_a_best_model_that_was_not_kept_is_a_warning(keeper: Any, damage: str) -> None:
    best, _ = keeper()
    offer(best, (1, 5.0), (3, 3.0))
    path = best.folder / "model.safetensors"
    if damage == "none":
        path.unlink()
    elif damage == "cut":
        os.truncate(path, path.stat().st_size - 1)
    else:
        save_model(path, [("w", torch.zeros(2))])
    best, logged = keeper([(1, 5.0), (3, 3.0)])
    assert "--keep best: the best model so far, of step 3, was not kept" in logged[0]
    offer(best, (6, 4.0))
    assert kept(best) == (6, 4.0)


def test_a_full_disk_costs_no_best_model(keeper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    best, _ = keeper()
    offer(best, (1, 5.0))

    monkeypatch.setattr(best_module, "save_model", full)
    vector = torch.tensor([3.0, 3.0])
    with pytest.raises(OSError, match="No space"):
        best.offer(3, 3.0, [("w", vector)])
    vector.zero_()
    monkeypatch.setattr(best_module, "save_model", save_model)
    assert kept(best) == (1, 5.0)
    offer(best, (6, 4.0))
    assert kept(best) == (3, 3.0)


@pytest.mark.parametrize("method", ["fed_avg", pytest.param("central", marks=pytest.mark.slow)])
def test_a_run_keeps_its_best_model_as_a_folder_for_every_command(
        run_here: Run, method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = ("--num_clients", 2, "--lr", 0.05, "--warmup", 5, "--val_freq", 1,
             "--keep", "best")
    whole = run_here(method, *flags, "--rounds", 5)
    assert whole.code == 0, whole.output
    losses = [r["server_val_loss" if method == "fed_avg" else "val_loss"] for r in whole.history]
    step = 1 + losses.index(min(losses))
    assert 1 < step < 5  # the learning rate grows too large
    until = run_here(method, *flags, "--rounds", step, "--keep", "last", name="until")
    assert not (until.run_dir / "best").exists()
    best = whole.run_dir / "best"
    model = load_file(best / "model.safetensors")
    assert all(torch.equal(model[name], value) for name, value in until.model.items())
    assert any(not torch.equal(model[name], value) for name, value in whole.model.items())
    if method == "central":
        return
    printed: list[str] = []
    monkeypatch.setattr("builtins.print",
                        lambda *words, **_: printed.append(" ".join(map(str, words))))
    held = read_json(best / "config.json")
    assert evaluate.main([str(best), "--cache_dir", held["cache_dir"]]) == 0
    assert json.loads(printed[-1])["loss"] == pytest.approx(min(losses), abs=1e-6)
    assert generate.main([str(best), "--max_new_tokens", "3"]) == 0
    assert cli.main(["fed_avg", "--init_from", str(best), "--data_dir", str(tmp_path), "--run_name",
                     "run", "--overwrite"]) == 2
    assert (best / "model.safetensors").exists()


@pytest.mark.slow
def test_a_run_that_is_killed_between_best_model_and_history(
        run_here: Run, run: Run, little_text: tuple[str, ...], tmp_path: Path) -> None:
    flags = (*little_text, "--num_clients", 2, "--rounds", 6, "--val_freq", 1, "--keep", "best",
             "--checkpoint_freq", 2)
    whole = run_here("fed_avg", *flags, name="whole")
    script = tmp_path / "killed.py"
    script.write_text(
        "import os\nfrom fedrun.__main__ import main\nfrom fedrun.records.best import BestModel\n"
        "healthy = BestModel.offer\n"
        "def killed(best, step, *rest):\n    healthy(best, step, *rest)\n"
        "    if step == 5:\n        os._exit(9)\n"
        "BestModel.offer = killed\nmain()\n")
    killed = run("fed_avg", *flags, script=script)
    assert killed.code == 9
    assert killed.history[-1]["global_step"] == 4
    resumed = run_here("fed_avg", *flags)
    assert resumed.code == 0, resumed.output
    assert "was not kept" not in resumed.output
    assert resumed.bits == whole.bits
    ours, theirs = (run.run_dir / "best" / "model.safetensors" for run in (resumed, whole))
    assert ours.read_bytes() == theirs.read_bytes()

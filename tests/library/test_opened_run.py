"""A run's folder as an object, beside the commands that do the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import fedrun
from fedrun import cli
from fedrun.common.errors import InputError
from fedrun.common.perplexity import perplexity
from tests.support.folders import ours
from tests.support.runs import CORPUS, Outcome, Run


@pytest.fixture
def trained(run_here: Run) -> Outcome:
    done = run_here("fed_avg", "--rounds", 4, "--num_clients", 2, "--val_freq", 2)
    assert done.code == 0, done.output
    return done


def test_what_a_folder_holds(trained: Outcome, tmp_path: Path, capfd: pytest.CaptureFixture[str],
                             cache_dir: Path) -> None:
    run = fedrun.open_run(trained.run_dir)
    assert eval(repr(run), {"fedrun": fedrun}).folder == run.folder
    assert run.outcome == "finished"
    assert run.config["num_clients"] == 2
    assert [record["global_step"] for record in run.history] == [1, 2, 4]
    assert run.perplexity == trained.history[-1]["server_val_ppl"]
    frame = run.history.frame()
    assert frame["server_val_ppl"].tolist() == [r["server_val_ppl"] for r in trained.history]

    tensors = dict(run.model().named_parameters())
    for name, tensor in trained.model.items():
        assert torch.equal(tensors[name], tensor)
    assert run.tokenizer()("the import")["input_ids"]

    text = run.generate("The import statement", max_new_tokens=5, temperature=1.0, seed=3)
    assert text.startswith("The import statement")
    capfd.readouterr()
    for prompt in (["The import statement"], ["--prompt", "The import statement"]):
        assert cli.main(["generate", str(trained.run_dir), "--max_new_tokens", "5", *prompt,
                         "--temperature", "1", "--seed", "3"]) == 0
        assert capfd.readouterr().out == text + "\n"

    found = run.evaluate(cache_dir=cache_dir)
    capfd.readouterr()
    assert found["loss"] == pytest.approx(trained.history[-1]["server_val_loss"], rel=1e-3)
    assert found["perplexity"] == perplexity(found["loss"])
    assert cli.main(["evaluate", str(trained.run_dir), "--cache_dir", str(cache_dir)]) == 0
    assert json.loads(capfd.readouterr().out) == {"model": str(trained.run_dir)} | found
    assert cli.main(["evaluate", str(trained.run_dir), str(CORPUS), "--cache_dir", str(cache_dir)]
                    ) == 0
    assert json.loads(capfd.readouterr().out)["dataset"] == str(CORPUS)

    out = run.export(tmp_path / "hf")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in out.iterdir()}
    with pytest.raises(InputError, match="exists already"):
        run.export(out)
    with pytest.raises(InputError, match="hf or mamba_ssm"):
        run.export(tmp_path / "other", to="onnx")


def test_its_figure(tmp_path: Path) -> None:
    run = fedrun.open_run(ours(tmp_path))
    figure = run.plot()
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    validation, train = axes.lines
    drawn = [record["server_val_ppl"] for record in run.history]
    assert validation.get_ydata() == pytest.approx(drawn)
    assert train.get_ydata() == pytest.approx([record["train_ppl"] for record in run.history])
    assert axes.get_xlabel() == "training tokens seen"
    assert run.plot("rounds").axes[0].lines[0].get_xdata() == pytest.approx(
        [record["global_step"] for record in run.history])


def test_what_a_notebook_shows(tmp_path: Path) -> None:
    folder = ours(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dataset": "<script>\u202e"}))
    page = fedrun.open_run(folder)._repr_html_()
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    assert "\u202e" not in page
    assert "validation perplexity" in page


def test_before_the_first_evaluation_and_without_a_run(tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ours(tmp_path / "results")
    (folder / "training_history.json").unlink()
    monkeypatch.chdir(tmp_path)
    run = fedrun.open_run(folder.name)  # by its name in results/
    assert (run.history, run.perplexity) == ([], None)
    assert "none yet" in run._repr_html_()
    with pytest.raises(InputError):
        run.plot()
    for other in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="no run there"):
            fedrun.open_run(other)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="not a run's"):
        fedrun.open_run(tmp_path)

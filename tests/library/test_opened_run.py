"""A run's folder as an object, beside the commands that do the same."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

import fedrun
from fedrun import cli
from fedrun.common.errors import InputError
from fedrun.common.perplexity import perplexity
from fedrun.run import next_commands
from tests.support.folders import ours
from tests.support.runs import CORPUS, Outcome, Run
from tests.support.texts import text_file


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
    assert [*frame.columns[:3]] == ["global_step", "train_ppl", "server_val_ppl"]
    assert repr(run.history) == (
        "<History: 3 evaluated, steps 1 to 4; last validation perplexity "
        f"{trained.history[-1]['server_val_ppl']:.2f}; .frame() is a table>")

    # The console, the history and `watch` say the same of the last round.
    line = re.search(r"round 4/4  train ppl (\S+)  val ppl (\S+)  tokens/s (\S+)", trained.output)
    assert line
    assert line[1] == f"{trained.history[-1]['train_ppl']:.1f}"
    assert line[2] == f"{trained.history[-1]['server_val_ppl']:.1f}"
    assert cli.main(["watch", str(trained.run_dir)]) == 0
    watched = capfd.readouterr().out
    shown = re.search(r"([\d,]+) tokens/s", watched)
    assert shown
    assert int(shown[1].replace(",", "")) == pytest.approx(  # from seconds as they are written
        int(line[3].replace(",", "")), rel=0.02)
    assert "train, each round" in watched

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
    with pytest.raises(InputError, match=r"dataset: is of type list; must .*data= takes token"):
        run.evaluate([1, 2, 3])  # type: ignore[arg-type]


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
    with pytest.raises(InputError, match="x=epochs: must be one of tokens, steps, rounds"):
        run.plot("epochs")  # type: ignore[arg-type]


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
    assert "nothing evaluated" in repr(run.history)
    assert run.history.frame().empty
    assert "none yet" in run._repr_html_()
    with pytest.raises(InputError):
        run.plot()
    for other in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="no run there"):
            fedrun.open_run(other)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="not a run's"):
        fedrun.open_run(tmp_path)


def test_what_the_command_says_of_little_text_and_at_its_end(
        run_here: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags: dict[str, Any] = {"dataset": text_file(tmp_path), "tokenizer": "bpe:4000",
                             "val_fraction": 0.0075, "rounds": 1, "num_clients": 2}
    done = run_here("fed_avg", *(word for name, value in flags.items()
                                 for word in (f"--{name}", value)))
    assert done.code == 0, done.output
    assert re.search(r"bpe:4000 \(vocabulary of \d+; the text has no more merges\)", done.output)
    assert "validation is 1 sequence of 32 tokens" in done.output
    (following,) = re.findall("next: (.*)", done.output)
    for command in following.split("; "):
        words = shlex.split(command)
        assert words[0] == "fedrun"
        assert cli.main(words[1:]) == 0
    assert (tmp_path / "report.html").exists()
    capfd.readouterr()
    fedrun.train("fed_avg", data_dir=tmp_path, run_name="other", config="tiny",
                 sequence_length=32, **flags)
    assert "next: " not in capfd.readouterr().out  # a script knows what it does next
    assert next_commands(Path("results/a run")) == (
        "next: fedrun generate 'a run' \"The function\"; fedrun report")

"""Methods that are not in the package: registered, loaded, refused, compared."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import fedrun
from fedrun import cli
from fedrun.common.errors import InputError
from fedrun.config import FederatedConfig
from fedrun.flags import method_flags, methods, resolve
from fedrun.strategies import STRATEGIES, plugins
from tests.support.runs import Run, error_lines, fresh_python

PLUGIN = """
from dataclasses import dataclass
import fedrun

@fedrun.strategy("{name}")
@dataclass(frozen=True)
class Half(fedrun.FedAvg):
    \"\"\"Go half of the way.\"\"\"

    step: float = {step}
    \"\"\"How far.\"\"\"

    def server_update(self, model, state, mean, context):
        model.add_(mean["delta"], alpha=self.step)
"""


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The registry as it was before the test."""
    monkeypatch.setattr(plugins, "LOADED", [])
    before = dict(STRATEGIES)
    yield
    STRATEGIES.clear()
    STRATEGIES.update(before)


def write(folder: Path, name: str = "half", step: float = 0.5) -> Path:
    path = folder / f"{name}.py"
    path.write_text(PLUGIN.format(name=name, step=step), encoding="utf-8")
    return path


def test_the_package_is_imported_without_torch() -> None:
    heavy = ("torch", "transformers", "numpy", "yaml")
    assert fresh_python(f"import sys, fedrun; print([n for n in {heavy} if n in sys.modules])"
                        ).strip() == "[]"
    assert "False" in fresh_python("import sys, fedrun; fedrun.strategy; fedrun.FedAvg; "
                                   "print('torch' in sys.modules)")
    assert "False" in fresh_python("import sys, fedrun; fedrun.InputError; fedrun.FedrunError; "
                                   "fedrun.Diverged; print('torch' in sys.modules)")
    assert {"strategy", "FedAvg", "Strategy", "RoundRecord"} <= {*dir(fedrun)}
    assert {name for name in dir(fedrun) if not name.startswith("__")} == {*fedrun.__all__}
    assert all(hasattr(fedrun, name) for name in dir(fedrun))
    assert issubclass(fedrun.InputError, fedrun.FedrunError)
    assert issubclass(fedrun.Diverged, fedrun.FedrunError)
    with pytest.raises(AttributeError, match="has no attribute 'tarin'"):
        _ = fedrun.tarin


def test_a_file_and_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                             capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["half", "--plugin", str(write(tmp_path)), "--print_config"]) == 0
    assert "step: 0.5" in capsys.readouterr().out
    assert cli.main([f"--plugin={write(tmp_path)}", "--help"]) == 0
    assert re.search("half +Go half of the way.", capsys.readouterr().out)
    assert method_flags("half")["step"].help == "How far."
    write(tmp_path, "other_half", 0.25)
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["other-half", "--plugin", "other_half", "--print_config"]) == 0
    assert "step: 0.25" in capsys.readouterr().out
    sys.modules.pop("other_half")


@pytest.mark.parametrize(("content", "message"), [
    (None, "must be an existing .py file"),
    ("x = 1", "registers no method"),
    ("import nowhere_at_all", "ModuleNotFoundError at .*bad.py:1: No module"),
    ("\n\n1 / 0", "ZeroDivisionError at .*bad.py:3: division by zero"),
    ("def f(:", "SyntaxError"),
    (PLUGIN.format(name="fed_avg", step=1), "no method's of fedrun"),
    (PLUGIN.format(name="Half", step=1), "lower case"),
    (PLUGIN.format(name="plot", step=1), "plot is a command of fedrun"),
    (PLUGIN.format(name="half", step=1).replace("fedrun.FedAvg", "object"), "derived from"),
    (PLUGIN.format(name="half", step=1).replace("@dataclass(frozen=True)\n", ""), "a dataclass"),
    (PLUGIN.format(name="half", step=1).replace("step: float", "lr: float"), "field 'lr'"),
    (PLUGIN.format(name="half", step=1).replace("step: float = 1", "step: list = None"),
     "an int, float, bool, str or Literal")])
def test_what_cannot_be_a_method(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                 caplog: pytest.LogCaptureFixture, content: str | None,
                                 message: str) -> None:
    path = tmp_path / "bad.py"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert cli.main(["half", "--plugin", str(path)]) == 2
    (line,) = error_lines(capsys.readouterr().err)
    assert re.search(message, line), line


def test_a_class_without_a_source_file() -> None:
    """As in a notebook: help comes from the metadata, and a cell that is run again replaces it."""
    cell = """
@fedrun.strategy("cell")
@dataclass(frozen=True)
class Cell(fedrun.FedAvg):
    step: float = field(default=1.0, metadata={"help": "How far."})

    def server_update(self, model, state, mean, context):
        model.add_(mean["delta"], alpha=self.step * 2)
"""
    space: dict[str, Any] = {"fedrun": fedrun, "dataclass": dataclass, "field": field,
                             "__name__": "a_notebook"}
    sys.modules["a_notebook"] = type(sys)("a_notebook")
    digests = []
    try:
        for source in (cell, cell, cell.replace("* 2", "* 3")):
            exec(source, space)
            assert method_flags("cell")["step"].help == "How far."
            config = resolve("cell", {"step": 0.5})
            assert isinstance(config, FederatedConfig)
            assert type(config.strategy) is space["Cell"]
            digests.append(plugins.method_digest("cell"))
    finally:
        del sys.modules["a_notebook"]
    assert digests[0] == digests[1] != digests[2]
    assert plugins.method_digest("fed_avg") == plugins.method_digest("central") == ""


def test_installed_packages(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
                            tmp_path: Path) -> None:
    write(tmp_path, "installed_half")
    monkeypatch.syspath_prepend(tmp_path)
    points = [importlib.metadata.EntryPoint("broken", "no_such_module:X", plugins.ENTRY_POINTS),
             importlib.metadata.EntryPoint("installed_half", "installed_half:Half",
                                           plugins.ENTRY_POINTS)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    plugins.load_installed.cache_clear()
    assert methods()["installed_half"] == "Go half of the way."
    assert "the method broken of an installed package cannot be used" in caplog.text
    plugins.load_installed.cache_clear()
    sys.modules.pop("installed_half")


def test_an_update_that_is_returned_ends_the_run(run_here: Run, tmp_path: Path) -> None:
    """Only a change in place counts; a model that never moves would look like a finished run."""
    plugin = write(tmp_path)
    plugin.write_text(plugin.read_text().replace("model.add_(", "return model.add("))
    flags = ("--plugin", plugin, "--rounds", 2, "--num_clients", 2)
    done = run_here("half", *flags)
    assert done.code == 1
    assert "Half.server_update: returns a Tensor, which nobody uses" in done.output
    plugin.write_text(plugin.read_text().replace("model.add(", "model.add_("))
    assert run_here("half", *flags, "--overwrite").code == 0


def test_a_run_resumes_with_the_same_code_alone(run: Run, tmp_path: Path) -> None:
    """And it is asked for by name: nothing in the folder leads to the code."""
    plugin = write(tmp_path)
    flags = ("--num_clients", 2, "--checkpoint_freq", 1)
    first = run("half", "--plugin", plugin, *flags, "--rounds", 1)
    assert first.code == 0, first.output
    longer = (*flags, "--rounds", 2)
    assert "unknown command 'half'" in run("half", *longer).output
    plugin.write_text(plugin.read_text() + "# changed\n")
    changed = run("half", "--plugin", plugin, *longer)
    assert changed.code == 2
    assert "--plugin: the code of the method of this run was" in changed.output


def test_ranks_must_run_the_same_code(run: Run, tmp_path: Path) -> None:
    """A plugin that reads another file on each rank, as on machines that share no disk."""
    for rank in range(3):
        (tmp_path / str(rank)).mkdir()
        path = write(tmp_path / str(rank))
        path.write_text(path.read_text() + f"# {rank == 2}\n")
    fork = tmp_path / "fork.py"
    fork.write_text("import os, sys\n"
                    f"sys.path.insert(0, {str(tmp_path)!r} + '/' + os.environ['RANK'])\n"
                    "import half\n"
                    "__name__ = 'half'\n", encoding="utf-8")
    done = run("half", "--plugin", fork, "--rounds", 1, "--num_clients", 2, processes=3)
    assert done.code != 0
    assert "the code of the method (--plugin)" in done.output


def test_a_taken_name(tmp_path: Path) -> None:
    plugins.load_plugin(str(write(tmp_path)))
    with pytest.raises(InputError, match="another than"):
        plugins.strategy("half")(STRATEGIES["fed_avg"])

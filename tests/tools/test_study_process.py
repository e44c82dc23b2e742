"""A run of a study in processes of its own: what it gets, and what comes back of how it ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

import fedrun
from fedrun.common.errors import FedrunError, InputError
from fedrun.config import RunConfig
from fedrun.distributed.launch import Launch, detect
from fedrun.flags import config_of, resolve
from fedrun.strategies import STRATEGIES, plugins
from fedrun.tools import study, study_file, study_process
from fedrun.tools.study_process import Children, start
from tests.support.runs import read_json
from tests.support.studies import change, little_study

PLUGIN = """
import os
from dataclasses import dataclass
from typing import Literal
import fedrun

@fedrun.strategy("moody")
@dataclass(frozen=True)
class Moody(fedrun.FedAvg):
    mood: Literal["fine", "faulty", "killed"] = "fine"

    def server_update(self, model, state, mean, context):
        if self.mood == "killed":
            os.kill(os.getpid(), 9)
        if self.mood == "faulty":
            raise AssertionError("a fault of ours")
        model.add_(mean["delta"])
"""


class Recorded(subprocess.Popen[bytes]):
    """A process with another program in the place of a run."""

    program: ClassVar[str] = ""
    commands: ClassVar[list[list[str]]] = []
    configs: ClassVar[list[RunConfig]] = []
    env: ClassVar[dict[str, str]] = {}

    def __init__(self, command: list[str], **how: Any) -> None:
        self.commands.append(command)
        file = Path(command[command.index(study_process.FLAG) + 1])
        self.configs.append(config_of(json.loads(file.read_text())))
        self.env.clear()
        self.env.update(how["env"])
        super().__init__([sys.executable, "-c", self.program, str(file)], **how)


def test_a_run_is_no_rank_of_the_study_and_may_have_ranks_of_its_own(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
                        "TORCHELASTIC_RUN_ID": "none", "MASTER_PORT": "1",
                        "FEDRUN_REFUSED": "/x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    monkeypatch.setattr(subprocess, "Popen", Recorded)
    monkeypatch.setattr(study_process, "LOADED", ["my_method.py"])

    def started(config: RunConfig, gpus: str | None, workers: int) -> list[str]:
        assert Children(tmp_path, workers).run(config, gpus, "token") == (0, "")
        assert Recorded.configs[-1] == config
        command = Recorded.commands[-1]
        assert command[-1] == "--plugin=my_method.py"
        return command[2:command.index("study")]

    central, federated = resolve("central", {}), resolve("fed_avg", {})
    (tmp_path / f"{federated.name}.log").write_text("of a start that failed")
    assert started(federated, None, 1) == ["fedrun"]
    assert detect(Recorded.env) == Launch()
    assert not {"MASTER_PORT", "TORCHELASTIC_RUN_ID", "FEDRUN_REFUSED"} & set(Recorded.env)
    assert Recorded.env.get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")
    assert Recorded.env["FEDRUN_LAUNCHER"] == str(os.getpid())
    assert started(federated, "2,5", 2) == ["fedrun.torchrun", "--nproc-per-node", "3", "-m",
                                            "fedrun"]
    assert Recorded.env["CUDA_VISIBLE_DEVICES"] == "2,5"
    assert Recorded.env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == f"{federated.timeout:.0f}"
    colocated = resolve("fed_avg", {"server": "colocated"})
    assert started(colocated, "2,5", 2)[2] == "2"
    assert started(central, "2,5", 2) == ["fedrun"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("code", "error"), [(1, FedrunError), (-9, FedrunError), (2, InputError)])
def test_only_what_the_user_has_to_change_is_not_tried_again(
        tmp_path: Path, code: int, error: type[Exception]) -> None:
    """A launch script starts a study again after any other exit code than 2."""
    children = Children(tmp_path)
    children.run = lambda *_: (code, "why")  # type: ignore[method-assign]
    with pytest.raises(FedrunError, match="SIGKILL" if code < 0 else "why") as caught:
        start(resolve("central", {"data_dir": tmp_path}), None, children)
    assert type(caught.value) is error


Make = Callable[..., RunConfig]


@pytest.fixture
def make(tmp_path: Path, cache_dir: Path) -> Make:
    """make("fed_avg", rounds=3): the config of a run on a little text."""
    found = study_file.read(little_study(tmp_path, cache_dir), tmp_path, {})
    base = found.settings["averaged"].flags

    def made(method: str, **flags: Any) -> RunConfig:
        return resolve(method, {k: v for k, v in base.items() if k != "method"} | {
            "data_dir": tmp_path / "runs", "run_name": "one", "rounds": 2} | flags)
    return made


def test_why_a_run_was_refused(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                               ) -> None:
    """By a file: nothing that a run prints is looked at."""
    config = make("fed_avg", dataset="nowhere.txt")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    with pytest.raises(InputError, match=r"^--dataset nowhere\.txt: no such file") as refused:
        study_process.main(file)
    assert file.with_name("error.txt").read_text() == str(refused.value)
    with pytest.raises(InputError):  # another rank
        study_process.main(file)
    assert not (tmp_path / "runs").exists()

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    monkeypatch.setattr(Recorded, "program", "import pathlib, sys; print('all', file=sys.stderr); "
                        "pathlib.Path(sys.argv[1]).with_name('error.txt').write_text('why'); "
                        "sys.exit(2)")
    with pytest.raises(InputError, match=r"^study: one: why$"):
        start(config, None, Children(tmp_path / "queue"))
    assert (tmp_path / "queue" / "one.log").read_text() == "all\n"


@pytest.fixture
def moody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The path of a plugin, which is loaded."""
    path = tmp_path / "moody.py"
    path.write_text(PLUGIN)
    monkeypatch.setattr(plugins, "LOADED", [])
    monkeypatch.setattr(study_process, "LOADED", plugins.LOADED)
    before = dict(STRATEGIES)
    plugins.load_plugin(str(path))
    yield str(path)
    STRATEGIES.clear()
    STRATEGIES.update(before)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_fails_says_why(make: Make, moody: str, tmp_path: Path, workers: int) -> None:
    children = Children(tmp_path, workers)
    with pytest.raises(FedrunError, match=r"^study: one: .*a fault of ours.* is in ") as caught:
        start(make("moody", mood="faulty"), None, children)
    assert not isinstance(caught.value, InputError)
    assert "AssertionError: a fault of ours" in (tmp_path / "one.log").read_text()
    assert read_json(tmp_path / "runs" / "one" / "outcome.json")["kind"] == "error"
    with pytest.raises(InputError, match=r"^study: one: .*mood"):
        start(make("moody", mood="fine"), None, children)
    if workers == 1:
        with pytest.raises(FedrunError, match="SIGKILL"):
            start(make("moody", mood="killed", run_name="two"), None, children)


@pytest.mark.slow
def test_a_study_of_a_plugin_on_two_workers(tmp_path: Path, cache_dir: Path, moody: str) -> None:
    path = little_study(tmp_path, cache_dir)
    change(path, {}, report_seeds=[], extensions=0, grid={"lr": [1e-3]}, workers=2, settings={
        "central": {"method": "central", "rounds": 2},
        "mine": {"method": "moody", "num_clients": 2, "rounds": 2}})
    assert study.main([str(path), "--results", str(tmp_path)]) == 0
    run = fedrun.open_run(tmp_path / "little" / "runs" / "mine_lr_0.001_seed_0")
    assert run.outcome == "finished"
    environment = read_json(run.folder / "environment.json")
    assert environment["processes"] == 3
    assert environment["made_with"]["plugin"]

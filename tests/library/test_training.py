"""`fedrun.train` beside the command: the same runs, in a process that stays as it was."""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fedrun
from fedrun.common.errors import Diverged, InputError
from fedrun.common.log import LOGGER
from fedrun.flags import resolve
from fedrun.strategies import plugins
from tests.support.runs import Outcome, execute, torchrun, wait_until


@pytest.fixture
def flags(little_text: tuple[str, ...], tmp_path: Path) -> dict[str, Any]:
    """The settings of `run_here`, as keyword arguments."""
    pairs = zip(little_text[::2], little_text[1::2], strict=True)
    return {flag.removeprefix("--"): value for flag, value in pairs} | {
        "data_dir": tmp_path, "num_clients": 2, "rounds": 6, "val_freq": 2}


@pytest.fixture(autouse=True)
def unchanged_process(little_text: tuple[str, ...]) -> Iterator[None]:
    """The process is after each test what it was before, when the text was there."""
    def state() -> tuple[object, ...]:
        return ({*os.environ.items()} - {("PYTEST_CURRENT_TEST", os.environ.get(
            "PYTEST_CURRENT_TEST", ""))}, torch.get_num_threads(),
                torch.are_deterministic_algorithms_enabled(),
                tuple(map(signal.getsignal, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))),
                LOGGER.level)

    def threads() -> set[str]:
        return {thread.name for thread in threading.enumerate()}

    before, running = state(), threads()  # of which some, of earlier tests, may still end
    yield
    gc.collect()
    wait_until(lambda: threads() <= running, 10, lambda: str(threads() - running))
    for now, then in zip(state(), before, strict=True):
        changed = now ^ then if isinstance(now, set) and isinstance(then, set) else {now, then}
        assert now == then, changed


def outcome_of(run: fedrun.Run) -> Outcome:
    return Outcome(0, "", run.folder)


def test_a_run_from_another_with_the_same_settings(flags: dict[str, Any]) -> None:
    """It has a folder of its own, which is the one returned."""
    flags |= {"rounds": 1}
    first = fedrun.train("fed_avg", **flags)
    second = fedrun.train("fed_avg", init_from=str(first.folder), **flags)
    assert second.folder.name == f"federated_config_{first.folder.name}_lu_1_seed_0"
    assert second.config["init_from"] == str(first.folder)
    assert second.outcome == "finished"
    assert first.config["init_from"] is None


def test_the_run_of_the_command(flags: dict[str, Any], tmp_path: Path) -> None:
    seen: list[fedrun.RoundRecord] = []
    torch.set_num_threads(1)
    run = fedrun.train("fed_avg", on_round=seen.append, deterministic=True, run_name="ours",
                       **flags)
    command = [f"--{name}={value}" for name, value in flags.items()]
    code, output = execute([sys.executable, "-m", "fedrun", "fed_avg", *command, "--deterministic",
                            "--run_name", "theirs"])
    assert code == 0, output
    theirs = Outcome(code, output, tmp_path / "theirs")
    assert run.outcome == "finished"
    assert outcome_of(run).bits == theirs.bits
    assert [record.number for record in seen] == [1, 2, 3, 4, 5, 6]
    for field in dataclasses.fields(fedrun.RoundRecord):
        assert f"r.{field.name}: " in str(fedrun.train.__doc__)
    evaluated = {r["global_step"]: r["server_val_ppl"] for r in theirs.history}
    assert {r.number: r.val_ppl for r in seen if r.val_ppl is not None} == evaluated
    for record, event in zip(seen, [e for e in theirs.events if e["event"] == "round"],
                             strict=True):
        assert (record.train_ppl, record.lr, record.tokens) == (
            event["train_ppl"], event["lr"], event["tokens"])


@pytest.mark.parametrize(("method", "checkpoint_freq"), [
    ("fed_avg", 2), ("central", None),
    *(pytest.param(*each, marks=pytest.mark.slow)
      for each in (("fed_avg", 1), ("fed_avg", None), ("central", 1), ("central", 2)))])
def test_stopped_where_it_is_asked_to_and_resumed(flags: dict[str, Any], method: str,
                                                  checkpoint_freq: int | None) -> None:
    if method == "central":
        del flags["num_clients"]
    flags |= {"checkpoint_freq": checkpoint_freq}
    whole = fedrun.train(method, run_name="whole", **flags)
    seen: list[int] = []

    def stop_at_three(record: fedrun.RoundRecord) -> str | None:
        seen.append(record.number)
        return "stop" if record.number == 3 else None

    run = fedrun.train(method, on_round=stop_at_three, run_name="run", **flags)
    assert (run.outcome, seen) == ("stopped", [1, 2, 3])
    run = fedrun.train(method, on_round=stop_at_three, run_name="run", **flags)
    assert (run.outcome, seen) == ("finished", [1, 2, 3, 4, 5, 6])
    assert outcome_of(run).bits == outcome_of(whole).bits
    assert [r.get("server_val_loss", r.get("val_loss")) for r in run.history] == [
        r.get("server_val_loss", r.get("val_loss")) for r in whole.history]


def test_a_signal_ends_the_run_and_not_the_process(flags: dict[str, Any]) -> None:
    def interrupt(record: fedrun.RoundRecord) -> None:
        if record.number == 2:
            os.kill(os.getpid(), signal.SIGINT)

    run = fedrun.train("fed_avg", on_round=interrupt, **flags)
    assert run.outcome == "stopped"
    assert fedrun.train("fed_avg", **flags).outcome == "finished"


def test_an_error_of_the_callback_is_the_callers(flags: dict[str, Any]) -> None:
    for method in ("fed_avg", "central"):
        given = {k: v for k, v in flags.items() if method != "central" or k != "num_clients"}
        with pytest.raises(ZeroDivisionError):
            fedrun.train(method, on_round=lambda record: 1 / 0, **given)
        run = fedrun.open_run(resolve(method, given).run_dir)
        assert run.outcome == "failed"
        assert fedrun.train(method, overwrite=True, **given).outcome == "finished"


def test_a_run_that_diverges_raises(flags: dict[str, Any]) -> None:
    with pytest.raises(Diverged, match="may be too large"):
        fedrun.train("central", **{k: v for k, v in flags.items() if k != "num_clients"}
                     | {"lr": 1e30})
    with pytest.raises(Diverged, match="may be too large"):
        fedrun.train("fed_avg", **flags | {"lr": 1e30})


def test_a_config_and_a_plugin(flags: dict[str, Any], tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve("fed_avg", flags | {"rounds": 2})
    run = fedrun.train(config)
    assert run.folder == config.run_dir
    assert run.history[-1]["global_step"] == 2
    with pytest.raises(InputError, match="lr: belongs into the config"):
        fedrun.train(config, lr=1e-3)
    before = dict(fedrun.strategies.STRATEGIES)
    monkeypatch.setattr(plugins, "LOADED", [])
    path = tmp_path / "twice.py"
    path.write_text("from dataclasses import dataclass\nimport fedrun\n"
                    "@fedrun.strategy('twice')\n@dataclass(frozen=True)\n"
                    "class Twice(fedrun.FedAvg):\n    pass\n")
    other = fedrun.train("twice", plugin=str(path), **flags | {"rounds": 2})
    assert outcome_of(other).bits == outcome_of(run).bits
    monkeypatch.setattr("fedrun.strategies.STRATEGIES", before)


@pytest.mark.parametrize(("method", "wrong", "message"), [
    ("fed_avg", {"lrr": 1}, "unknown flag --lrr, did you mean lr"),
    ("fed_avg", {"lr": -1}, "--lr -1.0: must be > 0"),
    ("fed_avg", {"lr": None}, "--lr None: must be a number"),
    ("fed_avg", {"init_from": fedrun.FedAvg()}, "--init_from is of type FedAvg; must be text"),
    ("fed_avgg", {}, "unknown method 'fed_avgg', did you mean fed_avg"),
    (fedrun.FedAvg(), {}, r"method: is of type FedAvg; must be a name \(central, fed_avg, "),
    ("central", {"timeout": 3}, "--timeout: not used by central")])
def test_wrong_settings_are_the_errors_of_the_command(method: Any, wrong: dict[str, Any],
                                                      message: str) -> None:
    with pytest.raises(InputError, match=message):
        fedrun.train(method, **wrong)


def test_messages_go_to_who_listens(
        flags: dict[str, Any], capsys: pytest.CaptureFixture[str],
        caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Printed as by the command, unless the program has set up logging itself."""
    flags |= {"rounds": 1}
    monkeypatch.setattr(LOGGER, "handlers", [])
    with caplog.at_level(logging.INFO, "fedrun"):
        fedrun.train("fed_avg", run_name="a", **flags)  # pytest listens at the root
    assert capsys.readouterr().out == ""
    assert "round 1/1" in caplog.text
    monkeypatch.setattr(LOGGER, "propagate", False)
    monkeypatch.setattr(LOGGER, "handlers", [])
    fedrun.train("fed_avg", run_name="b", **flags)
    assert "fedrun: round 1/1" in capsys.readouterr().out


SCRIPT = """
import json, os, sys
import fedrun

flags = json.loads(sys.argv[1])
ended = []
for name in ("first", "second"):
    run = fedrun.train("fed_avg", run_name=name, **flags)
    ended.append(run.outcome)
stopped = fedrun.train("fed_avg", run_name="third", on_round=lambda r: "stop", **flags)
os.write(1, f"{ended} {stopped.outcome}\\n".encode())  # whole: print may write line and end apart
"""


@pytest.mark.slow
def test_a_script_under_torchrun(flags: dict[str, Any], tmp_path: Path) -> None:
    """Two runs and a third in the same processes, as a script of the user's has them."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    given = json.dumps({name: str(value) for name, value in flags.items()})
    code, output = execute([*torchrun(3), str(script), given])
    assert code == 0, output
    assert output.count("['finished', 'finished'] stopped") == 3
    alone = fedrun.train("fed_avg", run_name="alone", **flags)
    for name in ("first", "second"):
        assert Outcome(0, "", tmp_path / name).bits == outcome_of(alone).bits


@pytest.mark.slow
def test_a_script_that_goes_on_after_an_error(flags: dict[str, Any], tmp_path: Path) -> None:
    """Its ranks end as it says, though one run of theirs was refused on all of them."""
    script = tmp_path / "script.py"
    script.write_text("import json, os, sys, fedrun\n"
                      "try:\n"
                      "    fedrun.train('fed_avg', seed=int(os.environ['RANK']), run_name='run',\n"
                      "                 **json.loads(sys.argv[1]))\n"
                      "except Exception as error:\n"
                      "    print('caught', type(error).__name__, flush=True)\n")
    given = json.dumps({name: str(value) for name, value in flags.items()})
    code, output = execute([*torchrun(3), str(script), given])
    assert output.count("caught") == 3, output
    assert code == 0, output

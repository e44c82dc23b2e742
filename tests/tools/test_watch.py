"""Following a run in the terminal."""

from __future__ import annotations

import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedrun import cli
from fedrun.tools.watch import Follower, RunState, follow, screen, sparkline


def line(**values: Any) -> str:
    return json.dumps(values) + "\n"


def events(rounds: int) -> list[str]:
    lines = [line(event="start", unit="round", total=5)]
    for number in range(1, rounds + 1):
        clients = [{"client": k, "loss": 2.0 + k, "weight": 0.25 + 0.5 * k} for k in (0, 1)]
        lines.append(line(event="round", round=number, train_ppl=100 / number, tokens=512 * number,
                          seconds=2.0 * number, local_training_seconds=1.5, bytes=number * 10**6,
                          lr=5e-4, clients=clients, left_out=[1] if number == 2 else [],
                          tokens_per_second=256.0,
                          **({"val_ppl": 90 / number} if number % 2 else {})))
    return lines


def shown(state: RunState) -> str:
    text = io.StringIO()
    Console(file=text, width=100).print(screen(state))
    return text.getvalue()


def test_finished_run_is_shown_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "a_run"
    run.mkdir()
    (run / "events.jsonl").write_text("".join([*events(5), line(event="end", tokens=2560)]))
    assert cli.main(["watch", str(run)]) == 0
    text = capsys.readouterr().out
    for said in ("a_run", "round 5 of 5", "ended", "20.0", "18.0", "lowest 18.0", "2,560 tokens",
                 "256 tokens/s", "5.0 MB", "left out 1×"):
        assert said in text
    rows = [row.split() for row in text.splitlines() if row.split()[:1] in (["0"], ["1"])]
    assert rows[0][:3] == ["0", "7.4", "0.250"]  # e^2
    assert rows[1][:3] == ["1", "20.1", "0.750"]


def test_a_round_that_a_resumed_run_repeats_counts_once() -> None:
    state = RunState("run")
    for text in [*events(3), *events(3)[2:]]:  # stopped after round 3, gone on from round 1
        state.update(json.loads(text))
    assert state.number == 3
    assert "left out 1×" in shown(state)


def test_lines_are_taken_whole_and_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    follower, state = Follower(path), RunState("run")
    assert list(follower.new()) == []
    lines = events(3)
    path.write_text("".join(lines[:2]) + lines[2][:20])
    assert [e["event"] for e in follower.new()] == ["start", "round"]
    with path.open("a") as file:
        file.write(lines[2][20:] + "torn by a crash}\n" + lines[3])
    for event in follower.new():
        state.update(event)
    assert state.number == 3
    assert list(follower.new()) == []
    path.unlink()
    path.write_text(lines[0])  # the run was started anew
    assert [e["event"] for e in follower.new()] == ["start"]


def test_a_running_run_is_followed_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    def write() -> None:
        with path.open("w", buffering=1) as file:
            for text in [*events(4), line(event="end")]:
                file.write(text)
                time.sleep(0.05)

    writer = threading.Thread(target=write)
    writer.start()
    state = RunState("run")
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    follow(Follower(path), state, console, once=False)
    writer.join()
    assert state.ended
    assert list(state.train) == [1, 2, 3, 4]
    assert state.validation == {1: 90, 3: 30}


def test_a_run_that_waits_and_central_runs(tmp_path: Path) -> None:
    state = RunState("run")
    assert "waiting" in shown(state)
    state.update({"event": "step", "step": 7, "train_ppl": 3.0})  # no start event: no total
    assert "step 7" in shown(state)
    assert "client" not in shown(state)


def test_many_clients_are_cut(tmp_path: Path) -> None:
    state = RunState("run")
    state.update({"event": "round", "round": 1, "train_ppl": 2.0,
                "clients": [{"client": k, "loss": None, "weight": 0.0} for k in range(40)]})
    assert "and 24 more" in shown(state)


def test_a_sparkline_is_scaled_and_cut_to_its_width() -> None:
    assert sparkline([100, 10, 1], 48) == "█▅▁"
    assert sparkline([5, 5], 48) == "▁▁"
    assert sparkline([], 48) == ""
    assert len(sparkline(range(1, 1000), 48)) == 48
    assert sparkline([float("inf"), 4, 2], 48) == "█▁"


def test_a_folder_without_events_is_an_error(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["watch", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert cli.main(["watch", str(tmp_path), "--once"]) == 2
    assert "no events.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 10_000,
                                     b'{"event": "round", "round": 2}\n'])
def test_a_run_that_is_over_is_not_waited_for(content: bytes, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    """Its events do not say that it has ended; its outcome does."""
    (tmp_path / "events.jsonl").write_bytes(content)
    (tmp_path / "outcome.json").write_text(json.dumps({"outcome": "stopped", "step": 2}))
    assert cli.main(["watch", str(tmp_path)]) == 0
    assert ("events.jsonl is damaged: it does not say how the run ended; its outcome: stopped"
            in capsys.readouterr().err)

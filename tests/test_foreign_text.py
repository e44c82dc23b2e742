"""Text from others: no terminal or page obeys it, in any script and any locale."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fedrun import cli
from fedrun.common import terminal
from fedrun.common.terminal import say_text, shortened, visible
from fedrun.plots.runs import find_runs
from fedrun.tools import partition
from fedrun.tools.watch import RunState, screen
from tests.support import folders, hostile
from tests.support.hostile import NAMES, SHOWN, obeyed
from tests.support.runs import ROOT, read_history, read_json

# ---- in a terminal -------------------------------------------------------------------------------

def test_what_a_terminal_would_obey_is_shown() -> None:
    assert [visible(name) for name in NAMES] == list(SHOWN)
    assert visible("größe 中文 🙂 e\u0301\u200d") == "größe 中文 🙂 e\u0301\u200d"
    assert visible("a\tb\nc\r\n", keep="\n\t") == "a\tb\nc\\r\n"
    assert visible(os.fsdecode(b"caf\xc3\xa9 \xff")) == r"café \xff"
    assert visible("caf\udcc3\udca9 \udcc2\udc9b") == r"café \x9b", "as a C locale reads it"
    assert visible("\ud800") == r"\ud800"
    assert shortened("中文" * 20, 11) == "中文…中文"
    assert shortened("a" * 20, 20) == "a" * 20


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose name, settings, text and model's words are all hostile."""
    path = folders.ours(tmp_path, "fed_avg", hostile.ESCAPES, name=hostile.ESCAPES,
                        dataset=hostile.ESCAPES)
    history = read_history(path)
    folders.write(path / "training_history.json",
                  [record | {"generated": f"<i>{hostile.ESCAPES}\n2"} for record in history])
    folders.write(path / "environment.json", {"processes": hostile.ESCAPES,
                                              "device": hostile.ESCAPES})
    return folders.with_model(path, [hostile.ESCAPES, "\x1bc", "\r"])


def test_commands_print_nothing_that_a_terminal_obeys(run: Path, capsys: pytest.CaptureFixture[str]
                                               ) -> None:
    (run / "events.jsonl").write_text(json.dumps(
        {"event": "round", "round": 1, "unit": hostile.ESCAPES, "lr": hostile.ESCAPES}) + "\n")
    (run.parent / f"{hostile.ESCAPES}2").mkdir()
    (run.parent / f"{hostile.ESCAPES}2" / "config.json").write_text(f'"{hostile.ESCAPES}')
    for argv, shown in (
            (["watch", str(run), "--once"], 1), (["generate", str(run)], 20),
            (["report", "--data_dir", str(run.parent), "--skip_deltas"], 2),
            (["plot", "deltas", "--data_dir", str(run.parent)], 1),
            (["watch", str(run) + "3"], 1), (["generate", str(run) + "3"], 1),
            ([hostile.ESCAPES], 1), (["study", str(run) + "3"], 1),
            (["fed_avg", f"--{hostile.ESCAPES}"], 1), (["fed_avg", "--lr", hostile.ESCAPES], 1)):
        cli.main(argv)
        message = "".join(capsys.readouterr())
        assert not obeyed(message), argv
        assert message.count(r"\x1b") >= shown, argv


def test_a_result_is_itself_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "file").open("w+", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdout", file)
        say_text(hostile.ESCAPES)
    assert (tmp_path / "file").read_text(encoding="utf-8") == hostile.ESCAPES + "\n"
    reader, writer = os.pipe()
    with open(reader, encoding="utf-8") as pipe:
        with open(writer, "w", encoding="utf-8") as file:
            monkeypatch.setattr(sys, "stdout", file)
            say_text(hostile.ESCAPES)
        assert pipe.read() == SHOWN[1] + "\n"


def test_markup_is_not_interpreted() -> None:
    name = "[red]x[/red] [link=http://a.b]y[/link] :smile:"
    state = RunState(name)
    state.update({"event": "start", "unit": name, "total": 3})
    shown = io.StringIO()
    Console(file=shown, width=100, force_terminal=True).print(screen(state))
    assert name in shown.getvalue()


def test_a_model_card_holds_one_line_a_setting(run: Path, tmp_path: Path) -> None:
    held = read_json(run / "config.json")
    folders.write(run / "config.json", held | {"dataset": "a/b\n---\n# \ud800"})
    folders.write(run / "environment.json", {"corpus": ["pydocs"]})
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert not obeyed(card)
    assert "\n- a/b\\n---\\n# \\ud800\n" in card
    assert card.splitlines().count("---") == 2
    assert f"# {SHOWN[1]}" in card


# ---- in pages ------------------------------------------------------------------------------------

def test_pages_hold_the_text_of_others_as_text(run: Path) -> None:
    assert cli.main(["report", "--data_dir", str(run.parent), "--skip_deltas"]) == 0
    page = (run.parent / "report.html").read_text(encoding="utf-8")
    assert not obeyed(page)
    shown = SHOWN[1].replace("_", "_<wbr>")
    assert f">{shown}</a>" in page
    assert f"<blockquote>&lt;i&gt;{SHOWN[1]}\n2</blockquote>" in page
    assert f"<td>{SHOWN[1]}</td></tr>" in page, "the dataset, in the settings"
    assert f"<td>{SHOWN[1]} × {SHOWN[1]}</td>" in page, "the devices"


def test_topics_of_a_script_without_spaces_are_tokens() -> None:
    words = {1: "中", 2: "\ufffd", 3: " 文", 4: "中", 5: "\x1b", 6: " film", 7: " "}
    typical = np.array([[2, 1, 4, 3, 5], [2, 7, 2, 2, 2], [1, 6, 1, 1, 1]])
    data: Any = SimpleNamespace(
        load_tokenizer=lambda: SimpleNamespace(decode=lambda tokens: words[tokens[0]]),
        load_topics=lambda: SimpleNamespace(typical=typical))
    assert partition.topic_names(data) == [r"中, 文, \x1b", "#2, #7, #2", "film"]


# ---- locales -------------------------------------------------------------------------------------

def test_every_file_is_opened_in_an_encoding_of_ours() -> None:
    """The locale's would be ASCII under LC_ALL=C, and differs between machines."""
    wrong = []
    for path in sorted((ROOT / "fedrun").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = call.func.attr if isinstance(call.func, ast.Attribute) else \
                getattr(call.func, "id", "")
            if isinstance(call.func, ast.Attribute) and name == "open" and \
                    getattr(call.func.value, "id", "") in (
                        "os", "gzip", "lzma", "bz2", "archive", "SharedBuffer", "Leader",
                        "NoiseKey", "start", "states"):
                continue
            modes = [a.value for arg in call.args for a in ast.walk(arg)
                     if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            given = {keyword.arg for keyword in call.keywords}
            if name in ("read_text", "write_text") and "encoding" not in given:
                wrong.append(f"{path.name}:{call.lineno}")
            # Not methods of ours that are called open and take no arguments.
            if name in ("open", "fdopen") and (call.args or call.keywords) \
                    and "encoding" not in given and not any("b" in mode for mode in modes):
                wrong.append(f"{path.name}:{call.lineno}")
    assert wrong == []


PROGRAM = """
import sys
from fedrun import cli
from fedrun.common.terminal import make_printable
assert sys.flags.utf8_mode == 0 and sys.getfilesystemencoding() == "ascii", sys.flags
make_printable()
run, data_dir = sys.argv[1:]
for argv in (["watch", run, "--once"], ["generate", run, "--prompt", sys.argv[1]],
             ["report", "--data_dir", data_dir, "--skip_deltas"]):
    assert cli.main(argv) == 0, argv
"""


@pytest.mark.slow
def test_a_locale_of_ascii_takes_every_character(tmp_path: Path) -> None:
    run = folders.with_model(folders.ours(tmp_path, "central", "größe", name="größe 中"),
                             ["größe", "中"])
    (run / "events.jsonl").write_text('{"event": "round", "round": 1, "train_ppl": 3}\n')
    other = tmp_path / os.fsdecode(b"bad\xff")  # a name in no encoding
    folders.ours(tmp_path, "central", "tiny", seed=1, name="other").rename(other)
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", PROGRAM, str(run), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert b"gr??e" in done.stdout, "a pipe has the locale's characters"
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "größe 中" in page
    assert r"bad\xff" in page


def test_streams_take_every_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as out, \
            open(os.pipe()[1], "w", encoding="ascii") as pipe:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", pipe)
        terminal.make_printable()
        print("größe \udcff")
        print("größe \udcff", file=sys.stderr)
    assert (tmp_path / "out").read_bytes() == "größe \\udcff\n".encode()


# ---- models --------------------------------------------------------------------------------------

@pytest.mark.parametrize(("fill", "flags", "reason"), [
    (float("nan"), [], "its parameters are not finite"),
    (float("inf"), ["--temperature", "1"], "its parameters are not finite"),
    (3e38, ["--temperature", "1"], "its logits are not finite")])
def test_a_model_that_is_no_longer_finite_makes_no_text(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], fill: float, flags: list[str],
        reason: str) -> None:
    run = folders.with_model(folders.ours(tmp_path, "central", "tiny"), fill=fill)
    assert cli.main(["generate", str(run), "--prompt", "once", *flags]) == 2
    message = capsys.readouterr()
    assert message.out == ""
    assert message.err == (f"fedrun: error: RUN {run}: {reason}: the model has diverged and cannot "
                        "generate text\n")


@pytest.mark.usefixtures("warnings_are_errors")
def test_histories_with_numbers_that_are_not_finite(tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    run = folders.ours(tmp_path, "central", "tiny")
    for seed, spelt in ((1, "NaN"), (2, "Infinity"), (3, "null"), (4, "1e400")):
        other = folders.ours(tmp_path, "central", "tiny", seed=seed)
        history = read_history(other)
        for record in history[1:]:
            record |= dict.fromkeys(("val_ppl", "val_loss", "train_ppl", "seconds"), "@")
        (other / "training_history.json").write_text(json.dumps(history).replace('"@"', spelt))
        (other / "events.jsonl").write_text(
            '{"event": "step", "step": 1, "val_ppl": 8.5}\n'
            f'{{"event": "step", "step": 2, "val_ppl": {spelt}, "seconds": {spelt}}}\n')
        assert cli.main(["watch", str(other), "--once"]) == 0
        assert "lowest 8.5" in capsys.readouterr().out
    found = find_runs(tmp_path)
    assert [r.final.step for r in found.runs] == [folders.STEPS[-1], 1, 1, 1, 1]
    assert cli.main(["report", "--data_dir", str(tmp_path), "--skip_deltas"]) == 0
    assert "nan" not in re.sub(r"base64,[^\"]*", "",
                               (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert run.name in (tmp_path / "report.html").read_text(encoding="utf-8").replace("<wbr>", "")

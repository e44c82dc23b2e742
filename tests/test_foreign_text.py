"""Text of others: never mathematics in a figure, never obeyed by a terminal, in any script."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console

from fedrun import cli
from fedrun.common import terminal
from fedrun.common.terminal import say_text, shortened, visible
from fedrun.data.holdings import ShardStats
from fedrun.plots import fonts, style
from fedrun.plots.partition import partition_figure
from fedrun.plots.runs import find_runs
from fedrun.tools import partition
from fedrun.tools.watch import RunState, screen
from tests.support import folders, hostile
from tests.support.runs import ROOT

NAMES = (hostile.MATHEMATICS, hostile.ESCAPES)
SHOWN = (hostile.MATHEMATICS, r"e\x1b[31m\x1b]52;c;QUJD\x07\u202e\x9b\x85_")


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
    history = json.loads((path / "training_history.json").read_text())
    folders.write(path / "training_history.json",
                  [record | {"generated": f"<i>{hostile.ESCAPES}\n2"} for record in history])
    folders.write(path / "environment.json", {"processes": hostile.ESCAPES,
                                              "device": hostile.ESCAPES})
    return folders.with_model(path, [hostile.ESCAPES, "\x1bc", "\r"])


def obeyed(text: str) -> list[str]:
    return [character for character in hostile.OBEYED if character in text]


def test_commands_print_nothing_that_is_obeyed(run: Path, capsys: pytest.CaptureFixture[str]
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
        said = "".join(capsys.readouterr())
        assert not obeyed(said), argv
        assert said.count(r"\x1b") >= shown, argv


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


def test_markup_is_not_interpreted(monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    name = "[red]x[/red] [link=http://a.b]y[/link] :smile:"
    state = RunState(name)
    state.update({"event": "start", "unit": name, "total": 3})
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    console.print(screen(state))
    assert name in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_model_card_holds_one_line_a_setting(run: Path, tmp_path: Path) -> None:
    held = json.loads((run / "config.json").read_text())
    folders.write(run / "config.json", held | {"dataset": "a/b\n---\n# \ud800"})
    folders.write(run / "environment.json", {"corpus": ["pydocs"]})
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert not obeyed(card)
    assert "\n- a/b\\n---\\n# \\ud800\n" in card
    assert card.splitlines().count("---") == 2
    assert f"# {SHOWN[1]}" in card


# ---- in figures ----------------------------------------------------------------------------------

@pytest.fixture
def strict() -> Iterator[None]:
    """A warning, as of a character that no font has, is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Of objects that earlier tests have left to the collector.
        warnings.simplefilter("ignore", pytest.PytestUnraisableExceptionWarning)
        yield


def test_names_are_no_mathematics_in_the_report(tmp_path: Path, strict: None) -> None:
    """Which has every kind of figure but one."""
    for number, (method, config, updates) in enumerate((
            ("central", NAMES[0], 1), ("fed_avg", NAMES[0], 1), ("fed_avg", NAMES[0], 8),
            (f"_{NAMES[0]}", NAMES[0], 1), (f"_{NAMES[0]}", NAMES[1], 1))):
        run = folders.ours(tmp_path, method, config, updates, steps=(1, 30), name=f"$^_{number}")
        if method == "central" or number == 3:
            folders.save_steps(run if method == "central" else run / "server", steps=(1, 30))
    folders.ours(tmp_path, "fed_avg", NAMES[0], 8, steps=(1, 30), name="2", note="$^{_$\x1b")
    assert cli.main(["report", "--data_dir", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = {name: base64.b64decode(content).decode() for content, name in re.findall(
        r'base64,([^"]+)"[^>]*?\nalt="([^"]+)"', page)}
    assert {name.replace(SHOWN[0], "?") for name in found} == {
        "1_central_vs_fed_?", "2_lu_comparison_?", "3_method_comparison_?",
        "4_multi_config_comparison", "averaged_svd_evolution_?", "averaged_final_spectrum_?",
        "svd_evolution__?_?_lu_1", "svd_spectrum__?_?_lu_1", "perplexity", "how in_proj changed"}
    for svg in found.values():
        ElementTree.fromstring(svg)
        assert not obeyed(svg)
    for name, svg in found.items():
        if name not in ("perplexity", "how in_proj changed"):
            told = "".join(re.findall(r"<!--(.*?)-->", svg, re.DOTALL))
            assert SHOWN[0][:5] in told, name  # the text of a drawing's letters
    assert "$\\x1b" not in found["perplexity"]


def test_pages_hold_the_text_of_others_as_text(run: Path) -> None:
    assert cli.main(["report", "--data_dir", str(run.parent), "--skip_deltas"]) == 0
    page = (run.parent / "report.html").read_text(encoding="utf-8")
    assert not obeyed(page)
    shown = SHOWN[1].replace("_", "_<wbr>")
    assert f">{shown}</a>" in page
    assert f"<blockquote>&lt;i&gt;{SHOWN[1]}\n2</blockquote>" in page
    assert f"<td>{SHOWN[1]}</td></tr>" in page, "the dataset, in the settings"
    assert f"<td>{SHOWN[1]} × {SHOWN[1]}</td>" in page, "the devices"


def test_topics_and_data_sets_are_text(strict: None) -> None:
    held = [ShardStats(1, 10, 1, np.array([6, 4]), 0.1, 0.2)] * 2
    figure = partition_figure(held, [hostile.MATHEMATICS, "x" * 500], "$\\frac{" + "y" * 500)
    style.write(figure, io.BytesIO(), "png")
    told = [text.get_text() for text in figure.findobj(Text) if not text.get_parse_math()]
    assert f"A  {hostile.MATHEMATICS}" in told
    assert max(map(len, told)) <= 100


def test_our_own_symbols_are_drawn(strict: None, tmp_path: Path) -> None:
    from fedrun.plots import deltas, saved
    folders.save_steps(folders.ours(tmp_path, "central", "tiny", steps=(1,)), steps=(1, 30))
    made = deltas.figures(saved.find_entities(tmp_path, "server", False, None))
    figure = made["averaged_svd_evolution_tiny"]
    assert isinstance(figure, Figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "σ₁", "σ₂", "σ₃", "σ₄", "σ₅", "σ₆"]
    style.write(figure, io.BytesIO(), "svg")


def test_a_users_matplotlib_settings_do_not_bring_mathematics_back(strict: None) -> None:
    with matplotlib.rc_context({"text.usetex": True}), style.drawing():
        figure = style.figure(2, 2)
        figure.suptitle(hostile.MATHEMATICS)
    with matplotlib.rc_context({"text.usetex": True}):
        style.write(figure, io.BytesIO(), "svg")


@pytest.mark.parametrize("name", [
    "../../x", "a/b", "\x00\n", "w" * 5000, "中" * 300, hostile.ESCAPES, "..", ""])
def test_names_of_figures_are_names_of_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{style.file_name(f'1_{name}')}.png"
    path.write_bytes(b"")
    assert [p.parent for p in tmp_path.rglob("*.png")] == [tmp_path]
    assert style.file_name("1_" + "w" * 5000) != style.file_name("1_" + "w" * 5001)


# ---- scripts -------------------------------------------------------------------------------------

@pytest.fixture
def no_fallbacks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As on a machine with no fonts but matplotlib's own; those that a test adds. """
    monkeypatch.setattr(fonts, "_found", [])
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: added)
    bundled = str(matplotlib.get_data_path())
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [
        e for e in font_manager.fontManager.ttflist if e.fname.startswith(bundled)])
    for remembered in (fonts._fallbacks, fonts._characters, fonts._add_new_fonts):
        remembered.cache_clear()
    added: list[str] = []
    return added


def a_font(path: Path, family: str, characters: str) -> str:
    """A font in which these characters are squares."""
    pen = TTGlyphPen(None)
    for move, at in ((pen.moveTo, (0, 0)), (pen.lineTo, (0, 500)), (pen.lineTo, (500, 500)),
                     (pen.lineTo, (500, 0))):
        move(at)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    names = [".notdef", *(f"u{ord(c):x}" for c in characters)]
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): f"u{ord(c):x}" for c in characters})
    builder.setupGlyf(dict.fromkeys(names, square))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (600, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    builder.save(path)
    return str(path)


def title_of(name: str) -> tuple[str, Text]:
    with style.drawing():
        figure = style.figure(3, 2)
        figure.subplots().set_title(style.title("Methods", name))
    content = io.BytesIO()
    style.write(figure, content, "svg")
    style.write(figure, io.BytesIO(), "png")
    (title,) = [t for t in figure.findobj(Text) if "Methods" in t.get_text()]
    return title.get_text(), title


def test_characters_without_a_font_are_shown_as_their_codes(strict: None, no_fallbacks: list[str]
                                                            ) -> None:
    assert title_of("größe 中文 한")[0] == r"Methods, größe \u4e2d\u6587 \ud55c"


def test_installed_fonts_are_found_by_what_they_have(strict: None, no_fallbacks: list[str],
                                                     tmp_path: Path) -> None:
    no_fallbacks += [a_font(tmp_path / "one.ttf", "One of Chinese", "中"),
                     a_font(tmp_path / "both.ttf", "More of Chinese", "中文"),
                     a_font(tmp_path / "korean.ttf", "Korean Sans", "한"),
                     str(tmp_path / "broken.ttf")]
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    shown, title = title_of("größe 中文 한 猫")
    assert shown == r"Methods, größe 中文 한 \u732b"
    assert title.get_fontfamily()[1:] == ["More of Chinese", "Korean Sans"]
    assert title_of("plain")[0] == "Methods, plain"


def test_topics_of_a_script_without_spaces_are_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    class Data:
        class load_tokenizer:
            def decode(self, tokens: list[int]) -> str:
                return {1: "中", 2: "\ufffd", 3: " 文", 4: "中", 5: "\x1b", 6: " film", 7: " "}[
                    tokens[0]]

        class load_topics:
            typical = np.array([[2, 1, 4, 3, 5], [2, 7, 2, 2, 2], [1, 6, 1, 1, 1]])

    assert partition.topic_names(Data()) == [r"中, 文, \x1b", "#2, #7, #2", "film"]  # type: ignore


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
                    getattr(call.func.value, "id", "") in ("os", "gzip", "lzma", "bz2", "archive"):
                continue
            modes = [a.value for arg in call.args for a in ast.walk(arg)
                     if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            given = {keyword.arg for keyword in call.keywords}
            if name in ("read_text", "write_text") and "encoding" not in given:
                wrong.append(f"{path.name}:{call.lineno}")
            # Not methods of ours that are called open: those take no arguments.
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
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (f"fedrun: error: RUN {run}: {reason}: the model has diverged and cannot "
                        "generate text\n")


def test_histories_with_numbers_that_are_not_finite(tmp_path: Path, strict: None,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    run = folders.ours(tmp_path, "central", "tiny")
    for seed, spelt in ((1, "NaN"), (2, "Infinity"), (3, "null"), (4, "1e400")):
        other = folders.ours(tmp_path, "central", "tiny", seed=seed)
        history = json.loads((other / "training_history.json").read_text())
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

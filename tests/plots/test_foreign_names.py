"""Names of others in figures: never mathematics, in any script, and safe as names of files."""

from __future__ import annotations

import base64
import io
import re
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

from fedrun import cli
from fedrun.data.shard_stats import ShardStats
from fedrun.plots import fonts, style
from fedrun.plots.partition import partition_figure
from tests.support import folders, hostile
from tests.support.hostile import NAMES, SHOWN, obeyed

OF_WEIGHTS = ("how in_proj changed", "largest singular values", "all singular values")


@pytest.mark.usefixtures("warnings_are_errors")
def test_names_are_no_mathematics_in_the_report(tmp_path: Path) -> None:
    """Which has every kind of figure but one."""
    for number, (method, config, updates) in enumerate((
            ("central", NAMES[0], 1), ("fed_avg", NAMES[0], 1), ("fed_avg", NAMES[0], 8),
            (f"_{NAMES[0]}", NAMES[0], 1), (f"_{NAMES[0]}", NAMES[1], 1))):
        run = folders.ours(tmp_path, method, config, updates, steps=(1, 15, 30),
                           name=f"$^_{number}")
        if method == "central" or number == 3:
            folders.save_steps(run if method == "central" else run / "server", steps=(1, 15, 30))
    folders.ours(tmp_path, "fed_avg", NAMES[0], 8, steps=(1, 15, 30), name="2", note="$^{_$\x1b")
    assert cli.main(["report", "--data_dir", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = {name: base64.b64decode(content).decode() for content, name in re.findall(
        r'base64,([^"]+)"[^>]*?data-figure="([^"]+)"', page)}
    assert {name.replace(SHOWN[0], "?") for name in found} == {
        "0_all_runs", "1_central_vs_fed_?", "2_lu_comparison_?", "3_method_comparison_?",
        "4_multi_config_comparison", "5_configs_in_one_axes", "perplexity", *OF_WEIGHTS}
    for svg in found.values():
        ElementTree.fromstring(svg)
        assert not obeyed(svg)
    for name, svg in found.items():
        if name not in ("perplexity", *OF_WEIGHTS):
            told = "".join(re.findall(r"<!--(.*?)-->", svg, re.DOTALL))
            assert SHOWN[0][:5] in told, name  # the text of a drawing's letters
    assert "$\\x1b" not in found["perplexity"]


@pytest.mark.usefixtures("warnings_are_errors")
def test_topics_and_data_sets_are_text() -> None:
    held = [ShardStats(1, 10, 1, np.array([6, 4]), 0.1, 0.2)] * 2
    figure = partition_figure(held, [hostile.MATHEMATICS, "x" * 500], "$\\frac{" + "y" * 500)
    style.write(figure, io.BytesIO(), "png")
    told = [text.get_text() for text in figure.findobj(Text) if not text.get_parse_math()]
    assert f"A  {hostile.MATHEMATICS}" in told
    assert max(map(len, told)) <= 100


@pytest.mark.usefixtures("warnings_are_errors")
def test_our_own_symbols_are_drawn(tmp_path: Path) -> None:
    from fedrun.plots import deltas, saved
    folders.save_steps(folders.ours(tmp_path, "central", "tiny", steps=(1,)), steps=(1, 15, 30))
    made = deltas.figures(saved.find_entities(tmp_path, "server", False, None))
    figure = made["averaged_svd_evolution_tiny"]
    assert isinstance(figure, Figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "σ₁", "σ₂", "σ₃", "σ₄", "σ₅", "σ₆", "σ₇", "σ₈"]
    style.write(figure, io.BytesIO(), "svg")


@pytest.mark.usefixtures("warnings_are_errors")
def test_a_users_matplotlib_settings_do_not_bring_mathematics_back() -> None:
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


@pytest.mark.usefixtures("warnings_are_errors")
def test_characters_without_a_font_are_shown_as_their_codes(no_fallbacks: list[str]
                                                            ) -> None:
    assert title_of("größe 中文 한")[0] == r"Methods, größe \u4e2d\u6587 \ud55c"


@pytest.mark.usefixtures("warnings_are_errors")
def test_installed_fonts_are_found_by_what_they_have(no_fallbacks: list[str],
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

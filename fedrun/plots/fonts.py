"""Finds fonts for characters of any script, since names and topics may be in any.

matplotlib draws a box for a character that is in none of a text's fonts. `drawable` finds an
installed font that has it, or replaces the character by its code.
"""

from __future__ import annotations

import functools
import logging
import os

import matplotlib
from matplotlib import font_manager

_found: list[str] = []
"""Additional families that texts have needed so far. Adding one never changes other texts."""


def drawable(text: str) -> str:
    r"""`text` with each character that no installed font has replaced by its code, `\u4e2d`.

    Fonts that the rest of it needs are added to `families()`.
    """
    missing = {c for c in text if ord(c) > 126}.difference(*map(_characters, families()))
    if not missing:
        return text
    found, without = _fallbacks(frozenset(missing))
    _found.extend(found)
    return "".join(c.encode("unicode_escape").decode() if c in without else c for c in text)


def families() -> list[str]:
    """The font.family setting that can draw every text returned by `drawable` so far."""
    return [*matplotlib.rcParams["font.family"], *_found]


@functools.cache
def _characters(family: str) -> frozenset[str]:
    """The characters in a family's font; empty if the font cannot be opened."""
    try:
        font = font_manager.get_font(font_manager.findfont(
            font_manager.FontProperties(family=[family])))
        return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
    except (OSError, RuntimeError, ValueError):
        return frozenset()


@functools.cache
def _fallbacks(missing: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """Families that cover these characters, and the characters that no family has.

    Greedy: each family has the most of the characters left; among equals, one without serifs.
    """
    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns about each family without a regular weight
    try:
        _add_new_fonts()
        return _choose(missing)
    finally:
        log.setLevel(level)


def _choose(missing: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    chosen: list[str] = []
    entries = [e for e in font_manager.fontManager.ttflist if not e.name.startswith("Last Resort")]
    regular = {e.name for e in entries if e.weight == 400 and e.style == "normal"}
    for families in (regular, {e.name for e in entries} - regular):
        while missing:
            covered, _, best = max(((len(_characters(f) & missing), _plainness(f), f)
                                    for f in families), default=(0, 0, ""))
            if not covered:
                break
            chosen.append(best)
            missing -= _characters(best)
    return chosen, missing


def _plainness(family: str) -> int:
    return ("sans" in family.lower()) - ("mono" in family.lower())


@functools.cache
def _add_new_fonts() -> None:
    """Add fonts that were installed after matplotlib cached its list of fonts."""
    listed = {os.path.realpath(entry.fname) for entry in font_manager.fontManager.ttflist}
    for path in sorted(font_manager.findSystemFonts()):
        if os.path.realpath(path) in listed:
            continue
        try:
            font_manager.fontManager.addfont(path)
        except (OSError, RuntimeError, ValueError):
            continue

"""Characters and the fonts that have them: names and topics come in any script.

matplotlib draws a box for a character that none of a text's fonts has. `drawable` finds an
installed font for it, or writes its code in its place.
"""

from __future__ import annotations

import functools
import logging
import os

import matplotlib
from matplotlib import font_manager

_found: list[str] = []
"""Families that texts so far have needed beside the usual one; more of them change no other text.
"""


def drawable(text: str) -> str:
    r"""`text` as a figure in `families()` can show it: a character that no installed font has is
    written `\u4e2d`."""
    missing = {c for c in text if ord(c) > 126}.difference(*map(_characters, families()))
    if not missing:
        return text
    found, without = _fallbacks(frozenset(missing))
    _found.extend(found)
    return "".join(c.encode("unicode_escape").decode() if c in without else c for c in text)


def families() -> list[str]:
    """The font.family that every text made drawable so far can be drawn in."""
    return [*matplotlib.rcParams["font.family"], *_found]


@functools.cache
def _characters(family: str) -> frozenset[str]:
    """What text in this family can be drawn with; nothing where its font cannot be opened."""
    try:
        font = font_manager.get_font(font_manager.findfont(
            font_manager.FontProperties(family=[family])))
        return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
    except (OSError, RuntimeError, ValueError):
        return frozenset()


@functools.cache
def _fallbacks(missing: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """Families that have these characters, each the one with most of what is left, and without
    serifs where there is a choice; and the characters that none has."""
    log = logging.getLogger("matplotlib.font_manager")
    level = log.level
    log.setLevel(logging.ERROR)  # a line for each family that has no regular weight
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
    """Fonts that were installed after matplotlib listed them, which it does once."""
    listed = {os.path.realpath(entry.fname) for entry in font_manager.fontManager.ttflist}
    for path in sorted(font_manager.findSystemFonts()):
        if os.path.realpath(path) in listed:
            continue
        try:
            font_manager.fontManager.addfont(path)
        except (OSError, RuntimeError, ValueError):
            continue

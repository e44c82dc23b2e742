"""The part of `fedrun report` on a run's sites: who they were, and what it showed of their text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from markupsafe import Markup, escape

from fedrun.common.errors import one_line
from fedrun.common.files import DamagedFile, read_regular
from fedrun.common.terminal import visible
from fedrun.plots.run_folder import Run, sites_of
from fedrun.records.run_files import PRIVACY

LARGEST_PAGE = 1 << 16  # bytes; ours has 3,000


@dataclass(frozen=True)
class SitesPart:
    """What the page says of a run with sites."""

    members: list[tuple[str, str, str]]
    """The server and the sites, as `fedrun sites show` lists them: name, clients, fingerprint."""
    privacy: list[Markup]
    """The paragraphs of privacy.md in the run's folder."""
    missing: str
    """Why there are none; empty if there are."""


def sites_part(run: Run) -> SitesPart | None:
    """That of a run; None without sites."""
    if not run.settings.get("sites"):
        return None
    members = [(str(one.get("name", "")), str(one.get("clients", "")),
                str(one.get("fingerprint", ""))) for one in sites_of(run.environment)]
    try:
        text = read_regular(run.path / PRIVACY, LARGEST_PAGE).decode("utf-8", "replace")
        found, why = paragraphs(text), f"{PRIVACY} is empty"
    except FileNotFoundError:
        found, why = [], (f"there is no {PRIVACY} in its folder" if run.path.is_dir()
                          else f"its folder, with {PRIVACY}, is not here")
    except (OSError, DamagedFile) as error:
        found, why = [], f"its {PRIVACY} cannot be read: {one_line(error)}"
    return SitesPart(members, found, "" if found else why)


def paragraphs(text: str) -> list[Markup]:
    """The paragraphs of such a page but for its heading, as HTML; of Markdown they have **words**
    that matter and `code` alone."""
    made = []
    for part in re.split(r"\n\s*\n", visible(text, keep="\n\t")):
        if part.strip() and not part.startswith("# "):
            html = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", str(escape(part.strip())))
            made.append(Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", html)))
    return made

"""Files of sites and their texts, for tests that need no private key."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedrun.data.sites import SiteEntry, Sites, write_sites
from tests.support.runs import CORPUS

THREE: dict[str, dict[str, Any]] = {
    "north": {"clients": 2}, "south": {"partition": "documents", "rounded_to": 4},
    "east": {"clients": 2, "partition": "shuffled", "size_skew": 0.3}}
"""Some sites -> how each deals its text."""


def public(name: str) -> str:
    """The text of a public key of nobody."""
    raw = hashlib.sha256(name.encode()).digest()
    return f"ed25519:{base64.b64encode(raw[:31] + bytes([raw[31] & 0x3f])).decode()}"


def sites_of(dealing: dict[str, dict[str, Any]]) -> Sites:
    return Sites("trial", public("the server"), tuple(
        SiteEntry(name, public(name), **given) for name, given in dealing.items()))


def sites_file(folder: Path, dealing: dict[str, dict[str, Any]]) -> Path:
    path = folder / "sites.yaml"
    write_sites(path, sites_of(dealing))
    return path


def texts_of(folder: Path, names: Iterable[str], files: int = 4) -> str:
    """Write some files for each site, all different; the --site_data of a simulation."""
    names, documents = list(names), CORPUS.read_text(encoding="utf-8").split("\n\n")
    for number, name in enumerate(names):
        own = documents[number::len(names)][:60 + 20 * number]
        (folder / name).mkdir(parents=True)
        for n in range(files):
            (folder / name / f"{n}.txt").write_text("\n\n".join(own[n::files]), encoding="utf-8")
    return f"{folder}/{{site}}/*.txt"

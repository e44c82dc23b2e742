"""A study of seconds on a little text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.support.runs import ROOT, SMALL

ORIGINAL = ROOT / "configs" / "experiments" / "original.yaml"
WHOLE = """
reference: central
report_seeds: [1, 2]
prune: 1.1
extensions: 1
grid: {{lr: [0.001, 0.002]}}
base: {base}
settings:
  central: {{method: central, rounds: 4}}
  averaged: {{method: fed_avg, num_clients: 2, rounds: 4, client_moments: average}}
  slow: {{method: fed_avg, num_clients: 2, rounds: 4, grid: {{lr: [1e-6]}}}}
"""


def little_study(tmp_path: Path, cache_dir: Path) -> Path:
    """The path of a study's file; with --results tmp_path its folder is tmp_path/little."""
    from pydoc_data.topics import topics
    text = tmp_path / "little.txt"
    text.write_text("\n\n".join(topics[name] for name in sorted(topics)[:25]), encoding="utf-8")
    base = {k.removeprefix("--"): v for k, v in zip(SMALL[::2], SMALL[1::2], strict=True)}
    base |= {"dataset": str(text), "cache_dir": str(cache_dir), "val_freq": "1000",
             "checkpoint_freq": "none"}
    del base["lr"]
    path = tmp_path / "little.yaml"
    path.write_text(WHOLE.format(base=json.dumps(base)))
    return path


def change(path: Path, base: dict[str, Any], **keys: Any) -> None:
    """Replace keys of a study's file, and some of its base."""
    content = yaml.safe_load(path.read_text())
    content["base"] |= base
    path.write_text(yaml.safe_dump(content | keys))

"""Virtual environments of the other frameworks, built once per machine; two minutes each."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.common import ROOT

CACHE = Path("~/.cache/fedrun/benchmarks").expanduser()
PACKAGES = {"flower": ["flwr[simulation]==1.41.0"], "pfl": ["pfl==0.6.0"]}
# Our model code is imported from this checkout. It needs torch and numpy, which are there.


def python_of(peer: str) -> str:
    """The interpreter of a peer's environment, which is built if it is missing or outdated."""
    folder, ready = CACHE / peer, CACHE / peer / ".ready"
    wanted = PACKAGES[peer] + [our_torch()]
    if not ready.exists() or ready.read_text().split("\n") != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"building {folder} (only once)", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=120)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", *wanted], check=True,
                       timeout=1200, stdout=sys.stderr)
        ready.write_text("\n".join(wanted))
    return str(folder / "bin" / "python")


def our_torch() -> str:
    """Our requirement of torch in setup.cfg, so that all sides have the same torch."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    needed = setup["options"]["install_requires"].split()
    return next(line for line in needed if line.startswith("torch"))

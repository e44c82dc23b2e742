"""fedrun as if even and odd ranks were on two machines: python two_machines.py METHOD FLAG ..."""

from __future__ import annotations

import os
import sys
from typing import Any

from fedrun import cli
from fedrun.distributed import runtime


def pretend() -> None:
    """From here on, in this process."""
    patched: Any = runtime
    patched.machine_id = lambda: 1 + int(os.environ["RANK"]) % 2


if __name__ == "__main__":
    pretend()
    sys.exit(cli.main())

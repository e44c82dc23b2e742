"""fedrun as if its ranks were on two machines by turns: python two_machines.py METHOD FLAG ..."""

from __future__ import annotations

import os
import sys
from typing import Any

from fedrun import cli
from fedrun.distributed import runtime

if __name__ == "__main__":
    patched: Any = runtime
    patched.machine = lambda: 1 + int(os.environ["RANK"]) % 2
    sys.exit(cli.main())

"""`python -m fedrun ...` and the console script `fedrun`; the only place that exits."""

from __future__ import annotations

import os
import sys

from fedrun.cli import main


def run() -> None:
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # at once: destructors of process groups would wait for peers that are gone
    sys.exit()


if __name__ == "__main__":
    run()

"""python -m tests.pretended_cuda COMMAND ...: run a command on pretended GPUs."""

from __future__ import annotations

import sys

from tests.pretended_cuda.build import NotHere, main

if __name__ == "__main__":
    try:
        main()
    except (NotHere, RuntimeError, FileNotFoundError) as error:
        sys.exit(str(error))

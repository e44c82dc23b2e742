"""fedrun, with the bytes that this rank's data plane has sent in all rounds in the file COUNTED."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fedrun import protocol
from fedrun.__main__ import main

rounds = protocol.rounds


def counted(server: Any, worker: Any, runtime: Any, *others: Any) -> str:
    before = runtime.data_plane.bytes_sent
    found = rounds(server, worker, runtime, *others)
    Path(os.environ["COUNTED"]).write_text(str(runtime.data_plane.bytes_sent - before))
    return found


protocol.rounds = counted  # type: ignore[assignment]

if __name__ == "__main__":
    main()

"""The fixtures that several tests of this folder use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.launch_programs import PYTHON, SCONTROL, SRUN, Programs


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"python": PYTHON, "srun": SRUN, "scontrol": SCONTROL,
                       "nproc": "#!/bin/sh\necho 4\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (tmp_path / "config").write_text("num_clients: 6\nserver: dedicated\ndevice: auto\n")
    return Programs(folder, {
        "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python"),
        "CONFIG": str(tmp_path / "config"), "RUN_DIR": str(tmp_path / "run"), "GPUS": "0",
        "STEPS": str(tmp_path / "steps"), "REQUEUE": "1", "REFUSED": "0", "ALIVE": "n1 n2",
        "DEAF": ""})

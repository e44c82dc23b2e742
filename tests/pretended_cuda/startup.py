"""Gives a Python process the pretended GPUs: called at its start, it acts when torch is imported.

torch asks once whether there is CUDA, while it is imported, so the library with the device has to
be loaded before. What the library cannot do, since `torch.cuda` and NCCL are Python modules over
parts that a CPU build lacks, is replaced right after.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


def install(library: Path) -> None:
    """Have torch find the device in this library when it is imported."""
    sys.meta_path.insert(0, _Torch(library))


class _Torch(MetaPathFinder):
    """Finds torch where it is, and adds to its import."""

    def __init__(self, library: Path) -> None:
        self.library = library

    def find_spec(self, fullname: str, path: Sequence[str] | None,
                  target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        spec = PathFinder.find_spec("torch", None)
        if spec is None or spec.loader is None or spec.origin is None:
            return None
        lib = Path(spec.origin).parent / "lib"
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            for name in (lib / "libc10.so", lib / "libtorch_cpu.so", self.library):
                ctypes.CDLL(str(name), mode=ctypes.RTLD_GLOBAL)
            execute(module)
            from tests.pretended_cuda import cuda_module, nccl
            cuda_module.install()
            nccl.install()

        loader.exec_module = exec_module
        return spec

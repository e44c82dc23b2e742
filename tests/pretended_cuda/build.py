"""Builds the pretended device, once for each version of torch and of its source."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [Path(__file__).with_name(name) for name in ("device.cpp", "gpu_only.h", "state.h")]
FLAGS = ("-std=c++20", "-O0", "-fPIC", "-shared", "-w")
SECONDS = 400  # 15 to 40 on a free core
# Python imports a module of this name at its start, before torch can be imported.
SITE = """from pathlib import Path
from tests.pretended_cuda.startup import install
install(Path(__file__).with_name("device.so"))
"""


class NotHere(Exception):
    """This machine lacks what the device needs; the text says what."""


def environment(gpus: int = 8) -> dict[str, str]:
    """What to set for a process, and thereby for those that it starts, to see pretended GPUs.

    Raises:
        NotHere: no compiler, or a torch with CUDA of its own.
        RuntimeError: the build failed; the text says why.
    """
    path = [str(build()), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), "PRETENDED_GPUS": str(gpus)}


def build() -> Path:
    """The folder with the device and what loads it. Raises as `environment`."""
    version = importlib.metadata.version("torch")
    spec = importlib.util.find_spec("torch")  # does not import it
    assert spec is not None
    assert spec.origin is not None
    torch = Path(spec.origin).parent
    if (torch / "lib" / "libtorch_cuda.so").exists():
        raise NotHere(f"torch {version} has CUDA of its own")
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise NotHere("no C++ compiler: install g++")
    text = b"".join(source.read_bytes() for source in SOURCES)
    key = hashlib.sha256(text + " ".join((SITE, *FLAGS)).encode()).hexdigest()[:16]
    folder = Path.home() / ".cache" / "fedrun" / "pretended_cuda" / f"{version}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock", timeout=SECONDS + 60):
        if not (folder / "device.so").exists():
            (folder / "sitecustomize.py").write_text(SITE, encoding="utf-8")
            _compile(compiler, torch, folder / "device.so")
    return folder


def _compile(compiler: str, torch: Path, library: Path) -> None:
    include, lib = torch / "include", torch / "lib"
    built = library.with_suffix(".new")
    done = subprocess.run(
        [compiler, *FLAGS, f"-I{include}", f"-I{include}/torch/csrc/api/include",
         str(SOURCES[0]), "-o", str(built), f"-L{lib}", "-ltorch_cpu", "-lc10",
         f"-Wl,-rpath,{lib}"], capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr]
        raise RuntimeError("the pretended CUDA device could not be built:\n"
                           + "\n".join(errors[:20]))
    built.replace(library)


def main() -> None:
    """Run the command in the arguments in a process that sees pretended GPUs."""
    gpus = int(os.environ.get("PRETENDED_GPUS", "8"))
    os.execvpe(sys.argv[1], sys.argv[1:], {**os.environ, **environment(gpus)})

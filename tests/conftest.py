"""The fixtures that tests of several wings use."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from filelock import FileLock

from fedrun import cli
from fedrun.data.tokens import TokenData, prepare
from tests.pretended_cuda.build import NotHere, environment
from tests.support.prepared import run_ranks
from tests.support.runs import FLAGS, ROOT, SMALL, Outcome, Run, execute, torchrun


@pytest.fixture(autouse=True)
def environment_as_before() -> Iterator[None]:
    """What a test, or a command in its process, sets in the environment no later test inherits."""
    with patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenised text for all tests of this session, also of pytest's other processes."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def pydocs_tokens(cache_dir: Path) -> TokenData:
    """Real text with documents, sources and topics: about 4,000 sequences of 128 tokens."""
    return prepare("pydocs", "bpe:4096", 128, cache_dir)


@pytest.fixture(scope="module")
def signals_of_a_terminal() -> Iterator[None]:
    """Tests that are started under nohup, or in the background of a script, inherit signals that
    are ignored, and so would the processes that they start."""
    before = {number: signal.signal(number, handler) for number, handler in (
        (signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL))}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(cache_dir: Path, tmp_path: Path) -> Run:
    """run("fed_avg", "--rounds", 4, processes=3): a whole run on SMALL, in its own processes.

    Forked ones (`tests.support.prepared`), also of a `script` or with an `env`; with a launcher, or
    alone with a Python of its own, if `restarts` or `launcher` asks for it.
    """

    def run_it(method: str, *flags: object, processes: int = 1, name: str = "run",
               limit: float = 250, script: str | Path = "fedrun", restarts: int = 0,
               env: dict[str, str] | None = None, launcher: bool = False) -> Outcome:
        arguments = [method, *SMALL, "--data_dir", str(tmp_path), "--cache_dir", str(cache_dir),
                     "--run_name", name, *map(str, flags)]
        if launcher or restarts:
            program = [str(script)] if isinstance(script, Path) else ["-m", script]
            code, output = execute([*torchrun(processes, restarts), *program, *arguments], limit,
                                   env)
        else:
            code, output = run_ranks(processes, arguments, limit, script, env)
        return Outcome(code, output, tmp_path / name)

    return run_it


@pytest.fixture(scope="session")
def little_text(cache_dir: Path) -> tuple[str, ...]:
    """Flags for runs on so little text that evaluating it takes no time."""
    from pydoc_data.topics import topics
    path = cache_dir / "little.txt"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            path.write_text("\n\n".join(topics[name] for name in sorted(topics)[:25]),
                            encoding="utf-8")
    return (*SMALL, "--dataset", str(path), "--cache_dir", str(cache_dir))


@pytest.fixture
def run_here(little_text: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
             ) -> Run:
    """run_here("fed_avg", "--rounds", 3): a whole run in the process of the test.

    `after`: in a copy of that run's folder, since a process keeps the lock of a run's folder to its
    end, and another run in the folder itself would be the first one's restart.
    """

    def run_it(method: str, *flags: object, name: str | None = None,
               after: Outcome | None = None) -> Outcome:
        if after:
            name = name or f"{after.run_dir.name}_and_{len(list(tmp_path.iterdir()))}"
            shutil.copytree(after.run_dir, tmp_path / name)
        name = name or "run"
        code = cli.main([method, *little_text, "--data_dir", str(tmp_path), "--run_name", name,
                         *map(str, flags)])
        out, err = capfd.readouterr()
        return Outcome(code, out + err, tmp_path / name)

    return run_it


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Outcome:
    """The run that those that are killed are compared with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, output = run_ranks(1, ["fed_avg", *SMALL, *map(str, FLAGS), "--data_dir", str(folder),
                                 "--cache_dir", str(cache_dir), "--run_name", "run"], 250)
    assert code == 0, output
    return Outcome(code, output, folder / "run")


@pytest.fixture
def warnings_are_errors() -> Iterator[None]:
    """As the warning of a character that no font has."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Of objects that earlier tests have left to the collector.
        warnings.simplefilter("ignore", pytest.PytestUnraisableExceptionWarning)
        yield


@pytest.fixture(scope="session")
def official_python() -> Path:
    """A Python that has mamba-ssm's own kernels, in an environment that is made once."""
    folder = ROOT / ".venv-official"
    with FileLock(f"{folder}.lock"):
        if not (folder / ".ready").exists():
            subprocess.run([ROOT / "tests/official/make_venv.sh", sys.executable, folder],
                           check=True, timeout=300)
    return folder / "bin" / "python"


@pytest.fixture(scope="session")
def pretended_cuda() -> dict[str, str]:
    """The environment of a process that sees eight pretended GPUs. Where there is no compiler for
    them, tests are skipped, and with REQUIRE_PRETENDED_CUDA=1 they fail."""
    try:
        return environment()
    except NotHere as why:
        if os.environ.get("REQUIRE_PRETENDED_CUDA") == "1":
            pytest.fail(f"REQUIRE_PRETENDED_CUDA=1: {why}")
        pytest.skip(str(why))

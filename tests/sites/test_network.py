"""The network of launch/sites.md: what gets through between institutions and what does not, and a
run over it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.sites.capture import captured, streams
from tests.sites.institutions import OUTSIDE, TUNNEL, Institution, institutions
from tests.sites.search import Search, windows
from tests.support.runs import CORPUS, FLAGS, SMALL, Outcome

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SAID = b"What one institution says to another, and nobody else hears: 0123456789 abcdefghij."
LISTEN = """
import socket, sys
with socket.create_server(("", int(sys.argv[1]))) as server:
    print("ready", flush=True)
    server.settimeout(20)
    print(server.accept()[0].makefile().read())
"""
CONNECT = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3) as there:
    there.sendall(sys.argv[3].encode())
"""


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, Institution]]:
    with institutions() as made:
        yield made


def say(here: Institution, address: str, port: int) -> str:
    """Say SAID to an address; "" or why it could not be said."""
    code, output = here.run(sys.executable, "-c", CONNECT, address, port, SAID.decode())
    return output.splitlines()[-1] if code else ""


def test_institutions_hear_each_other_in_the_tunnel_alone(
        found: dict[str, Institution], tmp_path: Path) -> None:
    """Among sites by way of the server, at the ports of a run; outside nothing but ciphers."""
    search = Search()
    search.add("said", windows(SAID, 24, 1))
    with captured({name: one.machine for name, one in found.items()}, tmp_path) as files:
        for name, port in (("south", 40000), ("server", 29500)):
            before = len(found[name].said)
            listener = found[name].start(sys.executable, "-c", LISTEN, port)
            while "ready" not in found[name].said[before:]:
                assert listener.poll() is None
            assert say(found["north"], OUTSIDE[name], port) == "TimeoutError: timed out"
            assert say(found["north"], TUNNEL[name], port) == ""
            assert listener.wait(20) == 0
            assert SAID.decode() in found[name].said
        # The firewall lets no other ports through: somebody listening would hear nothing.
        assert say(found["north"], TUNNEL["south"], 22) == "TimeoutError: timed out"
        assert say(found["north"], TUNNEL["east"], 50000).startswith("ConnectionRefused")
    heard = {name: search.find_in(streams(file)) for name, file in files.items()}
    assert heard["east"] == {}
    for name in ("north", "south", "server"):
        places = {where.split(":")[0] for where in heard[name]}
        assert {place.split()[0] for place in places} == {"fedrun"}  # and never eth0
    assert "fedrun in 10.88.0.2" in {where.split(":")[0] for where in heard["south"]}


def test_institutions_neither_read_nor_see_each_other(found: dict[str, Institution]) -> None:
    secret = found["north"].give("text/letters.txt", SAID)
    assert found["north"].run("cat", secret) == (0, SAID.decode())
    sleeper = found["north"].start("sleep", 60)
    for other in ("server", "south"):
        code, output = found[other].run("cat", secret)
        assert code == 1
        assert "Permission denied" in output
        assert "sleep" not in found[other].run(
            sys.executable, "-c", "import psutil; print([p.name() for p in psutil.process_iter()])"
            )[1]
    found["north"].kill()
    assert sleeper.wait(10) != 0


def test_a_run_over_the_tunnel_has_the_bits_of_one_process(
        found: dict[str, Institution], undisturbed: Outcome, tmp_path: Path) -> None:
    """The server and three workers. They share a folder here, and so a user."""
    server = found["server"]
    (server.folder / "cache").mkdir()
    text = server.give("corpus.txt", CORPUS.read_bytes())
    small = [str(text) if word == str(CORPUS) else word for word in SMALL]
    flags = [*small, *map(str, FLAGS), "--device", "cpu", "--data_dir", server.folder / "results",
             "--cache_dir", server.folder / "results" / "cache", "--run_name", "run"]
    for one in found.values():
        one.user, one.folder = server.user, server.folder
    with captured({name: one.machine for name, one in found.items()}, tmp_path) as files:
        launchers = [one.start_rank("fed_avg", *flags) for one in found.values()]
        codes = [launcher.wait(200) for launcher in launchers]
        assert codes == [0, 0, 0, 0], "\n".join(one.said for one in found.values())
    run = Outcome(0, server.said, server.folder / "results" / "run")
    assert run.bits == undisturbed.bits
    # The captures hold what the server has received: the model, which travels as it is.
    model = np.concatenate([tensor.numpy().reshape(-1) for tensor in run.model.values()])
    search = Search()
    assert search.add("model", windows(model, 64, 64)) > 1000
    there = search.find_in(streams(files["server"]))
    assert {where.split(":")[0] for where in there} == {"fedrun in 10.88.0.2"}
    assert max(hits["model"] for hits in there.values()) > 0.9 * len(model) / 16

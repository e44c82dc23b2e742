"""How ranks find each other: the store that all of them reach, and who has come to it.

The store is torch's key-value server. It speaks in the clear and authenticates nobody: whoever
reaches it can write that a rank has failed, or take a rank's place. So it listens on the loopback
where one machine runs all ranks, and otherwise on the one address by which the machines reach it;
torch's own listens on all addresses.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import psutil
from torch._C._distributed_c10d import Store, TCPStore

from fedrun.common.errors import FedrunError
from fedrun.distributed.launch import Launch

LOOPBACK = "127.0.0.1"
SECONDS_OF_SILENCE = 10.0  # before a wait is explained
SECONDS_BETWEEN_LINES = 60.0
ANSWER = timedelta(seconds=15)  # the heartbeat looks for 6
_HERE = "here"
Result = TypeVar("Result")


class NotConnected(FedrunError, ConnectionError):
    """The ranks did not find each other; the message says why and what to do."""


def listen(address: str, port: int, one_machine: bool) -> socket.socket:
    """A socket that listens where the ranks look for the store; port 0 is any that is free.

    address: what others know this machine by (MASTER_ADDR); one machine takes the loopback.
    NotConnected, naming the variable, where that cannot be.
    """
    here = LOOPBACK if one_machine else _own_address(address)
    try:
        made = socket.create_server((here, port), backlog=1024, dualstack_ipv6=not here,
                                    family=socket.AF_INET6 if ":" in here or not here
                                    else socket.AF_INET)
        if one_machine:  # it can listen there even where nobody is reached
            socket.create_connection(made.getsockname(), timeout=5).close()
        return made
    except (OSError, OverflowError) as error:
        raise NotConnected(_why_not(error, here, port)) from None


def _why_not(error: OSError | OverflowError, address: str, port: int) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return (f"MASTER_PORT {port} is in use on {socket.gethostname()}: choose another (`ss "
                f"-ltnp 'sport = :{port}'` shows what uses it)")
    if number in (errno.EADDRNOTAVAIL, errno.ENETUNREACH) and address == LOOPBACK:
        return (f"the loopback interface ({LOOPBACK}), through which the processes of one machine "
                "find each other, is missing or down: `ip link set lo up`")
    if number == errno.EACCES:
        return f"MASTER_PORT {port} may not be used by this user: choose one above 1023"
    if number is None:
        return f"MASTER_PORT {port}: accepted is a port number from 1 to 65535"
    return f"MASTER_ADDR {address}, MASTER_PORT {port}: cannot listen there: {error}"


def _own_address(name: str) -> str:
    """This machine's address among those of a name; empty (all addresses) where it is none of them,
    as behind a translated address."""
    try:
        found = [str(info[4][0]) for info in socket.getaddrinfo(name, None)]
    except OSError as error:
        raise NotConnected(f"MASTER_ADDR {name}: {socket.gethostname()} cannot resolve this name "
                           f"({error}); give the address of the first machine") from None
    interfaces = psutil.net_if_addrs()
    mine = {a.address for addresses in interfaces.values() for a in addresses}
    if usable := [a for a in found if a in mine and not is_loopback(a)]:
        return usable[0]
    if not all(map(is_loopback, found)):
        print(f"fedrun: warning: MASTER_ADDR {name} ({found[0]}) is no address of "
              f"{socket.gethostname()}: the store listens on all addresses", file=sys.stderr,
              flush=True)
        return ""
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    for address in interfaces.get(chosen, []):
        if address.family == socket.AF_INET:
            return str(address.address)
    raise NotConnected(f"MASTER_ADDR {name} is {found[0]} on {socket.gethostname()} itself, which "
                       "other machines cannot reach: give its address in the network that connects "
                       "them, or set GLOO_SOCKET_IFNAME to the interface (`ip route` shows them)")


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def serve(listening: socket.socket, timeout: timedelta) -> TCPStore:
    """The store itself, in this process, behind a socket that listens."""
    address, port = listening.getsockname()[:2]
    return TCPStore(LOOPBACK if address == "::" else address, port, None, True, timeout,
                    wait_for_workers=False, multi_tenant=True,
                    master_listen_fd=listening.detach())


def reach(address: str, port: int, bound: timedelta, served_before: bool) -> TCPStore:
    """The store that another process serves, which may not have begun to.

    served_before: it was there before this process was started, so that a refusal means that it is
    gone. NotConnected where it is not reached within `bound`.
    """
    deadline, why = time.monotonic() + bound.total_seconds(), ""
    with patiently(lambda: f"for the store of rank 0 at {address}:{port}{why and f' ({why})'}"):
        while True:
            try:
                socket.create_connection((address, port), timeout=5).close()
                break
            except OSError as error:
                if served_before and isinstance(error, ConnectionRefusedError):
                    raise NotConnected(f"nothing listens at {address}:{port}: the launcher of rank "
                                       "0 has ended") from None
                why = str(error)
            if time.monotonic() > deadline:
                raise NotConnected(f"MASTER_ADDR {address}, MASTER_PORT {port}: rank 0's store was "
                                   f"not reached within {bound.total_seconds():g} s ({why})")
            time.sleep(0.2)
        try:
            return answered(lambda: TCPStore(address, port, None, False, bound,
                                             wait_for_workers=False), bound)
        except RuntimeError as error:
            raise NotConnected(f"MASTER_ADDR {address}, MASTER_PORT {port}: what listens there "
                               "does not answer as a store: it is stopped, or another program's "
                               f"({str(error).splitlines()[0]})") from None


def answered(call: Callable[[], Result], bound: timedelta) -> Result:
    """What a call to a store returns. RuntimeError where it does not within `bound`: most calls
    know no timeout, and whoever serves the store may be stopped. Its thread is left behind then."""
    outcome: list[Result | Exception] = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="fedrun-store", daemon=True)
    thread.start()
    thread.join(bound.total_seconds())
    if not outcome:
        raise RuntimeError(f"no answer within {bound.total_seconds():g} s")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def gather_all(store: Store, number: int, of: int, bound: timedelta, noun: str = "rank") -> None:
    """`roll_call`, and NotConnected where the store does not answer either."""
    try:
        answered(lambda: roll_call(store, number, of, bound, noun), bound + ANSWER)
    except RuntimeError as error:
        raise NotConnected("the store of rank 0 does not answer: what serves it, its launcher or "
                           f"itself, is stopped or gone ({str(error).splitlines()[0]})") from None


def roll_call(store: Store, number: int, of: int, bound: timedelta, noun: str = "rank") -> None:
    """All: wait until all have come. NotConnected, with those that have not, after `bound`.

    Schedulers start machines unevenly, so that waiting is normal; the lowest number that is here
    says whom it waits for.
    """
    began = time.monotonic()
    store.set(f"{_HERE}/{number}", "")
    store.add(_HERE, 1)

    def missing() -> list[int]:
        return [n for n in range(of) if not store.check([f"{_HERE}/{n}"])]

    def what() -> str:
        gone = missing()
        first = next(n for n in range(of) if n not in gone)
        return f"for {named(gone, noun)} of {of}" if gone and first == number else ""

    pause = 0.02
    with patiently(what):
        while store.add(_HERE, 0) < of:
            if time.monotonic() > began + bound.total_seconds():
                raise NotConnected(f"{named(missing(), noun)} of {of} did not come within "
                                   f"{bound.total_seconds():g} s: not started, stopped, or still "
                                   "reading text")
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
    if gone := missing():
        raise NotConnected(f"{of} came, but {named(gone, noun)} is not among them: each needs a "
                           f"number of its own, from 0 to {of - 1}")


def named(numbers: Iterable[int], noun: str = "rank") -> str:
    """Ranks in words: "rank 3", "ranks 1, 4-7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    text = ", ".join("-".join(map(str, run)) for run in runs)
    return f"{noun}{'s' if len(runs) > 1 or '-' in text else ''} {text}"


@contextmanager
def patiently(what: Callable[[], str]) -> Iterator[None]:
    """Say what a long wait is for, from a thread of its own: `what` makes the words, or "" to be
    silent this time."""
    over = threading.Event()

    def speak() -> None:
        pause = SECONDS_OF_SILENCE
        while not over.wait(pause):
            pause = SECONDS_BETWEEN_LINES
            try:
                words = answered(what, ANSWER)
            except RuntimeError:
                words = "for the store of rank 0, which does not answer"
            if words and not over.is_set():
                print(f"fedrun: waits {words}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=speak, name="fedrun-patience", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(SECONDS_OF_SILENCE)  # none may be inside the store when Python ends


def exposure(launch: Launch) -> str:
    """Rank 0: a warning where strangers reach the launcher's stores without need; mostly empty.

    Our parent is the launcher, and its sockets tell on which addresses it listens. torchrun's c10d
    rendezvous (--standalone; in new versions all starts on one machine without a port) keeps its
    state in a store of its own, under a key of this name, and unpickles it, which runs whatever is
    written there. The static rendezvous does not, but on one machine it is open without need too.
    """
    if launch.rank or not served_by_launcher():
        return ""
    ports: list[int] = []
    with suppress(psutil.Error, OSError):
        ports = [c.laddr.port for c in psutil.net_connections("tcp") if c.pid == os.getppid()
                 and c.status == psutil.CONN_LISTEN and c.laddr and not is_loopback(c.laddr.ip)]
    key = f"torch.rendezvous.{os.environ.get('TORCHELASTIC_RUN_ID', '')}"
    c10d = [port for port in ports if _holds(port, key)]
    if not c10d and (not ports or launch.local_world_size < launch.world_size):
        return ""
    can = "run code as you, end this run" if c10d else "end this run"
    return (f"torchrun's store listens on all addresses of {socket.gethostname()} (port "
            f"{(c10d or ports)[0]}): whoever reaches it can {can} or take part in it; start with "
            "`python -m fedrun.torchrun` instead of torchrun, without --standalone")


def _holds(port: int, key: str) -> bool:
    """Whether a store of this machine holds a key."""
    with suppress(RuntimeError):
        return TCPStore(LOOPBACK, port, None, False, timedelta(seconds=2),
                        wait_for_workers=False).check([key])
    return False


def served_by_launcher() -> bool:
    """Whether the launcher serves the store, from before it starts ranks until they have ended."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

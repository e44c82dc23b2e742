"""How ranks find each other: by a store that all of them connect to.

The store is torch's key-value server. It neither encrypts nor authenticates: whoever can connect to
it can report that a rank has failed, or take a rank's place. Therefore it listens on the loopback
if one machine runs all ranks, and otherwise only on the address by which the machines reach it.
torch's own stores listen on all addresses.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import psutil
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from fedrun.common.errors import FedrunError, InputError
from fedrun.common.log import WARNING, log
from fedrun.distributed.launch import Launch

LOOPBACK = "127.0.0.1"
SECONDS_OF_SILENCE = 10.0  # after which a wait is explained
SECONDS_BETWEEN_LINES = 60.0
STORE_TIMEOUT = timedelta(seconds=15)  # for one answer; looking for silent ranks takes 6 s
_HERE = "here"
_REFUSED = "refused"  # key in the store: why a rank that is not coming has ended
_LATE = "TORCH_GLOO_LAZY_INIT"
TIME_TO_DECLINE = timedelta(seconds=5)
SECONDS_BETWEEN_CALLS = 0.5  # at most, while ranks wait for each other
Result = TypeVar("Result")


class NotConnected(FedrunError, ConnectionError):
    """The ranks did not find each other; the message gives the reason and what to do."""


class PeersMissing(NotConnected):
    """Others did not come or are gone."""

    may_pass = True


class NoAnswer(FedrunError, RuntimeError):
    """A store did not answer in time."""


def listen(address: str, port: int, one_machine: bool) -> socket.socket:
    """A socket that listens where the ranks look for the store; port 0 is any free port.

    address: this machine's name or address for the others (MASTER_ADDR); not used on one machine,
    which takes the loopback. NotConnected, naming the variable, if the socket cannot listen.
    """
    here = LOOPBACK if one_machine else _own_address(address)
    try:
        made = socket.create_server((here, port), backlog=1024, dualstack_ipv6=not here,
                                    family=socket.AF_INET6 if ":" in here or not here
                                    else socket.AF_INET)
        if one_machine:  # listening works even on a loopback that is down; connecting does not
            socket.create_connection(made.getsockname(), timeout=5).close()
        return made
    except (OSError, OverflowError) as error:
        raise NotConnected(_why_not_listening(error, here, port)) from None


def _why_not_listening(error: OSError | OverflowError, address: str, port: int) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return (f"MASTER_PORT {port} is in use on {socket.gethostname()}: choose another (`ss "
                f"-ltnp 'sport = :{port}'` shows the program that uses it)")
    if number in (errno.EADDRNOTAVAIL, errno.ENETUNREACH) and address == LOOPBACK:
        return (f"the loopback interface ({LOOPBACK}), which connects the processes of one "
                "machine, is missing or down: `ip link set lo up`")
    if number == errno.EACCES:
        return f"MASTER_PORT {port}: this user may not listen there; must be > 1023"
    if number is None:
        return f"MASTER_PORT {port}: must be a port number from 1 to 65535"
    return f"MASTER_ADDR {address}, MASTER_PORT {port}: cannot listen there: {error}"


def _own_address(name: str) -> str:
    """The address, of those that a name resolves to, that belongs to this machine. Empty (listen on
    all addresses) if none does, as behind network address translation."""
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
        log(f"MASTER_ADDR {name} ({found[0]}) is not an address of {socket.gethostname()}: the "
            "store listens on all addresses", WARNING)
        return ""
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    for address in interfaces.get(chosen, []):
        if address.family == socket.AF_INET:
            return str(address.address)
    raise NotConnected(f"MASTER_ADDR {name} is {found[0]} on {socket.gethostname()} itself, which "
                       "other machines cannot reach: give its address in the network that "
                       "connects the machines, or set GLOO_SOCKET_IFNAME to the interface (`ip "
                       "route` shows them)")


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def serve(listening: socket.socket, timeout: timedelta) -> TCPStore:
    """Start the store in this process, on a listening socket."""
    address, port = listening.getsockname()[:2]
    return TCPStore(LOOPBACK if address == "::" else address, port, None, True, timeout,
                    wait_for_workers=False, multi_tenant=True,
                    master_listen_fd=listening.detach())


def reach(address: str, port: int, bound: timedelta, served_before: bool) -> TCPStore:
    """Connect to the store of another process, which may not serve it yet.

    served_before: the store was there before this process was started, so a refused connection
    means that it is gone. NotConnected if it is not reached within `bound`.
    """
    deadline, why = time.monotonic() + bound.total_seconds(), ""
    with explain_wait(lambda: f"for the store of rank 0 at {address}:{port}{why and f' ({why})'}"):
        while True:
            try:
                socket.create_connection((address, port), timeout=5).close()
                break
            except OSError as error:
                if served_before and isinstance(error, ConnectionRefusedError):
                    raise PeersMissing(f"nothing listens at {address}:{port}: the launcher of "
                                       "rank 0 has ended") from None
                why = str(error)
            if time.monotonic() > deadline:
                raise PeersMissing(f"MASTER_ADDR {address}, MASTER_PORT {port}: could not connect "
                                   f"to rank 0's store within {bound.total_seconds():g} s ({why})")
            time.sleep(0.2)
        try:
            return answered(lambda: TCPStore(address, port, None, False, bound,
                                             wait_for_workers=False), bound)
        except RuntimeError as error:
            raise PeersMissing(f"MASTER_ADDR {address}, MASTER_PORT {port}: what listens there "
                               "does not respond as a store: it is suspended, or another program "
                               f"({str(error).splitlines()[0]})") from None


def answered(call: Callable[[], Result], bound: timedelta,
             hopeless: Callable[[], bool] = lambda: False) -> Result:
    """Call a store and return its answer. NoAnswer if there is none within `bound`: most calls have
    no timeout of their own, and the process that serves the store may be stopped; or as soon as it
    is `hopeless`, which is asked often. The thread that made the call is then left behind."""
    outcome: list[Result | Exception] = []

    def run() -> None:
        try:
            outcome.append(call())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="fedrun-store", daemon=True)
    thread.start()
    deadline = time.monotonic() + bound.total_seconds()
    while thread.is_alive() and (left := deadline - time.monotonic()) > 0 and not hopeless():
        thread.join(min(left, 0.1))
    if not outcome:
        raise NoAnswer(f"no answer within {bound.total_seconds():g} s")
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def wait_for_all(store: Store, number: int, count: int, bound: timedelta,
                 noun: str = "rank") -> None:
    """All ranks: `roll_call`, but NotConnected also if the store does not answer."""
    try:
        answered(lambda: roll_call(store, number, count, bound, noun), bound + STORE_TIMEOUT)
    except RuntimeError as error:
        raise PeersMissing("the store of rank 0 does not answer: the process that serves it (rank "
                           "0 or its launcher) is stopped or gone "
                           f"({str(error).splitlines()[0]})") from None


def roll_call(store: Store, number: int, count: int, bound: timedelta, noun: str = "rank") -> None:
    """All ranks: wait until all are there. NotConnected, naming the missing ones, after `bound`.

    Schedulers start machines at different times, so waiting is normal. The lowest rank that is
    there prints which ones it waits for.
    """
    began = time.monotonic()
    store.set(f"{_HERE}/{number}", "")
    store.add(_HERE, 1)

    def missing() -> list[int]:
        return [n for n in range(count) if not store.check([f"{_HERE}/{n}"])]

    def what() -> str:
        gone = missing()
        first = next(n for n in range(count) if n not in gone)
        return (f"for {named(gone, noun)} of {count}, counted from 0"
                if gone and first == number else "")

    pause = 0.02
    with explain_wait(what):
        while store.add(_HERE, 0) < count:
            if store.check([_REFUSED]):
                # The process that serves the store may be this one.
                time.sleep(2 * SECONDS_BETWEEN_CALLS if number == 0 else 0)
                raise NotConnected(store.get(_REFUSED).decode())
            if time.monotonic() > began + bound.total_seconds():
                raise PeersMissing(f"{named(missing(), noun)} of {count}, counted from 0, did not "
                                   f"connect within {bound.total_seconds():g} s: not started, "
                                   "stopped, or still reading text")
            time.sleep(pause)
            pause = min(2 * pause, SECONDS_BETWEEN_CALLS)
    if not store.check([f"{_HERE}/{n}" for n in range(count)]):  # one question
        raise NotConnected(f"{count} connected, but not {named(missing(), noun)}: each needs a "
                           f"different number from 0 to {count - 1}")


@contextmanager
def connecting_late() -> Iterator[None]:
    """gloo's groups of the block connect two ranks when one of them first has something for the
    other, if `connects_late`.

    By default all connect with all when the group is made. Then every rank reads from the store
    what every other one has to say to each: of a thousand ranks eight gigabytes.
    """
    ours = _LATE not in os.environ and connects_late()
    if ours:
        os.environ[_LATE] = "1"
    try:
        yield
    finally:
        if ours:
            del os.environ[_LATE]


def connects_late() -> bool:
    """Whether there is one network interface, or what the user has set TORCH_GLOO_LAZY_INIT to. Of
    several, gloo takes another one for every other message, and `ControlPlane.meet` would not
    connect them all."""
    several = "," in os.environ.get("GLOO_SOCKET_IFNAME", "")
    return os.environ.get(_LATE, "0" if several else "1").lower() in ("1", "true", "yes", "y", "t")


def decline(launch: Launch, why: str) -> None:
    """A rank that cannot start, in place of its first connection: end the `roll_call` of those that
    wait for it with this line. Returns within seconds, also if rank 0 is not there yet."""
    with suppress(FedrunError, RuntimeError, KeyError):
        store = reach(os.environ["MASTER_ADDR"], port_of(os.environ["MASTER_PORT"]),
                      TIME_TO_DECLINE, served_before=False)
        answered(lambda: PrefixStore(prefix_of(launch, 0), store).set(_REFUSED, why),
                 TIME_TO_DECLINE)


def prefix_of(launch: Launch, connection: int) -> str:
    """What the keys of this connection of the ranks, counted from 0, begin with."""
    # With the way in which they connect: gloo ends a process whose peer connects in the other one.
    return f"attempt{launch.attempt}.{connection}.{'late' if connects_late() else 'at-once'}"


def port_of(text: str) -> int:
    """A port's number. InputError for what is none."""
    try:
        return int(text)
    except ValueError:
        raise InputError(f"MASTER_PORT {text}: must be a port number from 1 to 65535") from None


def named(numbers: Iterable[int], noun: str = "rank") -> str:
    """Ranks as text: "rank 3", "ranks 1, 4-7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    text = ", ".join("-".join(map(str, run)) for run in runs)
    return f"{noun}{'s' if len(runs) > 1 or '-' in text else ''} {text}"


@contextmanager
def explain_wait(what: Callable[[], str]) -> Iterator[None]:
    """While the block takes long, print what it waits for, from another thread.

    what: returns the text after "waiting ", or "" to print nothing this time.
    """
    over = threading.Event()

    def explain() -> None:
        pause = SECONDS_OF_SILENCE
        while not over.wait(pause):
            pause = SECONDS_BETWEEN_LINES
            try:
                text = answered(what, STORE_TIMEOUT)
            except RuntimeError:
                text = "for the store of rank 0, which does not answer"
            if text and not over.is_set():
                log(f"waiting {text}", WARNING)

    thread = threading.Thread(target=explain, name="fedrun-wait", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        # No thread may be inside the store during Python's shutdown.
        thread.join(SECONDS_OF_SILENCE)


def exposure(launch: Launch) -> str:
    """Rank 0: a warning if the launcher's stores are open to other machines without need, else "".

    The launcher is this process's parent, and its sockets show the addresses on which it listens.
    torchrun's c10d rendezvous (--standalone; in new versions any start on one machine without a
    port) keeps its state in a store of its own, under the key below, and unpickles it, which runs
    whatever code was written there. The static rendezvous does not unpickle, but on one machine it
    is open without need too.
    """
    if launch.rank or not served_by_launcher():
        return ""
    ports: list[int] = []
    with suppress(psutil.Error, OSError):
        ports = [c.laddr.port for c in psutil.net_connections("tcp") if c.pid == os.getppid()
                 and c.status == psutil.CONN_LISTEN and c.laddr
                 and c.laddr.ip in ("0.0.0.0", "::")]
    key = f"torch.rendezvous.{os.environ.get('TORCHELASTIC_RUN_ID', '')}"
    c10d = [port for port in ports if _holds(port, key)]
    if not c10d and (not ports or launch.local_world_size < launch.world_size):
        return ""
    can = "run code as you, end this run" if c10d else "end this run"
    return (f"torchrun's store listens on all addresses of {socket.gethostname()} (port "
            f"{(c10d or ports)[0]}): whoever connects to it can {can} or take part in it; start "
            "with `python -m fedrun.torchrun` instead of torchrun, without --standalone")


def _holds(port: int, key: str) -> bool:
    """Whether the store at this port of this machine holds a key."""
    with suppress(RuntimeError):
        return TCPStore(LOOPBACK, port, None, False, timedelta(seconds=2),
                        wait_for_workers=False).check([key])
    return False


def served_by_launcher() -> bool:
    """Whether the launcher serves the store, from before it starts the ranks until all have
    ended."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

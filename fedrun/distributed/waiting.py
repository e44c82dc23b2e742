"""Waiting for the other workers in a collective, so that a lost one is named.

gloo sees by itself that a peer is gone: its connection closes, or the group's timeout ends the
wait. NCCL sees neither between the GPUs of one machine. There a kernel spins on memory that the
lost peer will never write, and a host that waits for that kernel waits inside CUDA. So NCCL's
collectives are polled, and between the polls the host looks for ranks that failed or went silent.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fedrun.distributed.control_plane import ControlPlane, UnresponsiveRanks

SHORTEST_PAUSE, LONGEST_PAUSE = 5e-5, 1e-3  # seconds between two polls; they grow
# Most waits are for a worker that still trains, and looking for lost ranks loads the store: so not
# at once, and ever more seldom while none is silent.
SECONDS_BEFORE_LOOKING = 3.0
SECONDS_BETWEEN_LOOKS = 1.0, 30.0  # at first, at most
SHARE_OF_TIMEOUT = 0.9  # after which an error counts as the timeout's
SECONDS_FOR_REASON = 1.0  # two heartbeats


@dataclass(frozen=True)
class Travelling:
    """A sum that is on its way (`DataPlane.send`)."""

    parts: tuple[Tensor, ...]
    """The buffers whose elementwise sum it is, once it has arrived."""
    work: dist.Work | None
    """Its collective, on workers that wait for one."""
    since: float
    """When it was begun, by the monotonic clock."""


def wait_for(work: dist.Work | None, control: ControlPlane | None, polled: bool,
             since: float | None = None) -> None:
    """Workers: wait until a collective is done.

    work: None if it is done already. polled: see above; never without a control plane. since: when
    it was begun, by the monotonic clock; None: now. Raises UnresponsiveRanks if another rank has
    failed or is lost, or after the control plane's timeout.
    """
    if work is None:
        return
    if control is None:
        work.wait()
        return
    began = time.monotonic() if since is None else since
    try:
        if polled:
            _poll(work, control)
        work.wait()  # raises what went wrong; and the GPU's next kernels wait for the sum
    except (UnresponsiveRanks, torch.AcceleratorError):  # the latter is of this rank's own GPU
        raise
    except RuntimeError as error:
        # A connection that is closed shows at once, and the server must hear of it before the
        # launcher ends all ranks. Only after a timeout is there time to look who is silent.
        timed_out = time.monotonic() - began > SHARE_OF_TIMEOUT * control.timeout.total_seconds()
        lost = control.lost_peers() if timed_out else []
        if not lost:
            wait_for_reason(control, SECONDS_FOR_REASON)
        raise control.left_alone(str(error).splitlines()[0], lost) from error


def wait_for_reason(control: ControlPlane, seconds: float) -> None:
    """Give a rank that has failed, and says why, the time to be heard."""
    until = time.monotonic() + seconds
    while not control.peer_failed() and time.monotonic() < until:
        time.sleep(LONGEST_PAUSE)


def _poll(work: dist.Work, control: ControlPlane) -> None:
    began, pause = time.monotonic(), SHORTEST_PAUSE
    lookout: _Lookout | None = None
    try:
        while not work.is_completed():
            waited = time.monotonic() - began
            if control.peer_failed():
                raise control.left_alone()
            if lookout is None and waited > SECONDS_BEFORE_LOOKING:
                lookout = _Lookout(control)
            if lookout is not None and lookout.lost:
                raise control.left_alone(lost=lookout.lost)
            if waited > control.timeout.total_seconds():
                raise control.left_alone("it has taken longer than --timeout "
                                         f"({control.timeout.total_seconds():g} s)",
                                         control.lost_peers())
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE)
    finally:
        if lookout is not None:
            lookout.over.set()


class _Lookout:
    """Looks for lost ranks in a thread, since one look takes seconds.

    A rank counts as lost when two looks in a row find it silent: something that holds Python's
    lock for a few seconds also holds up its heartbeat.
    """

    def __init__(self, control: ControlPlane) -> None:
        self.lost: list[int] = []
        self.over = threading.Event()
        self._control = control
        # Left to itself at the end: it only waits, and does not call the store.
        threading.Thread(target=self._look, name="fedrun-lookout", daemon=True).start()

    def _look(self) -> None:
        before: set[int] = set()
        shortest, longest = SECONDS_BETWEEN_LOOKS
        pause = shortest
        while not self.over.wait(pause):
            silent = set(self._control.lost_peers())
            self.lost = sorted(before & silent)
            before, pause = silent, shortest if silent else min(2 * pause, longest)

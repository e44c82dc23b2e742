"""torchrun with a store that strangers do not reach.

    python -m fedrun.torchrun --nproc-per-node 5 -m fedrun fed_avg --num_clients 4

Flags, environment, restarts and log files are torchrun's (its static rendezvous). Of its own it has
the store: torchrun's listens on all addresses of the machine, and with --standalone the launcher
unpickles, that is, runs what it finds there. This one listens on the loopback, or where several
machines meet on the address of MASTER_ADDR, and nothing in it is code. What goes wrong is told in
one line; the exit code is 1 if a rank has failed, as torchrun's.
"""

from __future__ import annotations

import signal

from fedrun.common.errors import InputError

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the imports that follow

import argparse
import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from fedrun.common.limits import memory_limit, require_files, require_memory, shortage
from fedrun.distributed.stopping import (
    LAUNCHER,
    REFUSED,
    hangup_ignored,
    interruptible,
    outlive_terminal,
)

NAME = "fedrun"
SECONDS_FOR_MACHINES = 600  # that all take to appear, as torchrun has it


class NotRestarted(Exception):
    """A rank has ended because the user has to change something: the next would end alike."""


def main(argv: Sequence[str] | None = None) -> int:
    """Start the processes of this machine and wait for their end; the exit code."""
    try:
        require_memory()
        return launch(sys.argv[1:] if argv is None else argv)
    except Exception as error:
        told = isinstance(error, ValueError | ConnectionError)
        if not (why := str(error) if told else shortage(error)):
            raise
        print(f"launch: error: {' '.join(why.split())}", file=sys.stderr, flush=True)
        return 2


def launch(argv: Sequence[str]) -> int:
    """The same. ValueError and ConnectionError for what the user has to change."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if "LOGLEVEL" not in os.environ:  # what its lines say, ours do
        for name in ("multiprocessing.api", "agent.server.api"):
            logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    args = parse(argv)
    if args.nproc_per_node.isdecimal():  # else "gpu", "auto"
        require_files(int(args.nproc_per_node) * args.machines)
    register(args)
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's default, without its warning
    scratch = tempfile.TemporaryDirectory(prefix="fedrun-launch-", ignore_cleanup_errors=True)
    refused = Path(scratch.name) / "refused"
    os.environ[REFUSED] = str(refused)
    try:
        torchrun.run(args)
        return 0
    except NotRestarted:
        return 2
    except SignalException as error:
        print(f"launch: {error.sigval.name}: all processes have ended", file=sys.stderr, flush=True)
    except ChildFailedError as error:
        if refused.exists():
            return 2
        # All but the first are ended by SIGTERM.
        failed = {rank: failure for rank, failure in sorted(error.failures.items())
                  if failure.exitcode != -signal.SIGTERM} or error.failures
        for rank, failure in failed.items():
            how = f"by {failure.signal_name()}" if failure.exitcode < 0 else (
                f"with exit code {failure.exitcode}")
            hint = memory_limit() if failure.exitcode == -signal.SIGABRT else ""
            print(f"launch: rank {rank} (process {failure.pid}) ended {how}"
                  f"{hint and f': out of memory{hint}?'}", file=sys.stderr, flush=True)
    finally:
        scratch.cleanup()
    return 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """torchrun's flags; ValueError for those that choose another rendezvous, and where several
    machines are not told how to meet."""
    from torch.distributed import run as torchrun
    parser = torchrun.get_args_parser()
    parser.set_defaults(**{name: None for name in ("master_addr", "master_port")
                           if f"PET_{name.upper()}" not in os.environ})
    args = parser.parse_args(argv)
    if args.standalone or args.rdzv_backend != "static" or args.rdzv_endpoint:
        raise InputError("--standalone, --rdzv-backend and --rdzv-endpoint choose a rendezvous, "
                         "and this launcher has its own: leave them out")
    fewest, args.machines = torchrun.parse_min_max_nnodes(args.nnodes)
    if fewest != args.machines:
        raise InputError(f"--nnodes {args.nnodes}: accepted is one number")
    for name in ("master_addr", "master_port") if args.machines > 1 else ():
        if getattr(args, name) is None:
            raise InputError(f"--{name.replace('_', '-')}: not set, though there are "
                             f"{args.machines} machines: each has to be told where the first is")
    return args


def register(args: argparse.Namespace) -> None:
    """Make torchrun take our rendezvous, and signals as the shell has set them."""
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.elastic.rendezvous import (
        RendezvousHandler,
        RendezvousInfo,
        RendezvousParameters,
        rendezvous_handler_registry,
    )
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    from fedrun.distributed.connect import LOOPBACK, gather_all, listen, reach, serve

    class Rendezvous(StaticTCPRendezvous):
        """Static, behind a socket of our own."""

        def get_backend(self) -> str:
            return NAME

        def next_rendezvous(self) -> RendezvousInfo:
            if os.path.exists(os.environ[REFUSED]):
                raise NotRestarted
            if self._store is None:
                bound = timedelta(seconds=SECONDS_FOR_MACHINES)
                if self.rank == 0:
                    listening = listen(self.master_addr, self.master_port, self.world_size == 1)
                    self._store = serve(listening, bound)
                    self.master_addr, self.master_port = self._store.host, self._store.port
                else:
                    self._store = reach(self.master_addr, self.master_port, bound, False)
                gather_all(PrefixStore("machines", self._store), self.rank, self.world_size, bound,
                          "machine")
            return super().next_rendezvous()

    def create(parameters: RendezvousParameters) -> RendezvousHandler:
        return Rendezvous(address, port, machine, args.machines, parameters.run_id,
                          SECONDS_FOR_MACHINES)

    address, port, machine = args.master_addr or LOOPBACK, args.master_port or 0, args.node_rank
    rendezvous_handler_registry.register(NAME, create)
    # torchrun warns of an address or a number that its own static rendezvous would not see.
    args.rdzv_backend, args.rdzv_endpoint, args.node_rank = NAME, f"{address}:{port}", 0
    if args.rdzv_id == "none":  # a run that is restarted in place is known by it
        args.rdzv_id = uuid.uuid4().hex if args.machines == 1 else NAME
    args.signals_to_handle = wanted_signals(args.signals_to_handle)


def wanted_signals(names: str) -> str:
    """Of the signals that torchrun passes on those to take: without the hangup that `nohup` has had
    ignored, which torchrun would take back."""
    return ",".join(n for n in names.split(",") if n != "SIGHUP" or not hangup_ignored())


if __name__ == "__main__":
    outlive_terminal()
    sys.exit(interruptible(main))

"""torchrun with a store that is not open to other machines.

    python -m fedrun.torchrun --nproc-per-node 5 -m fedrun fed_avg --num_clients 4

Flags, environment, restarts and log files are those of torchrun (with its static rendezvous). Only
the store differs: torchrun's listens on all addresses of the machine, and with --standalone the
launcher unpickles what it finds there, which can run any code. This one listens on the loopback, or
with several machines on the address of MASTER_ADDR, and holds no code. Errors are one line each.
The exit code is 1 if a rank has failed, as torchrun's, or the machines did not find each other, and
2 if the user must change something.
"""

from __future__ import annotations

import signal

from fedrun.common.errors import FedrunError, InputError, one_line

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the imports that follow

import argparse
import logging
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from fedrun.common.limits import memory_limit, require_files, require_memory, shortage
from fedrun.common.log import print_log
from fedrun.distributed.launch import in_slurm_step, rendezvous
from fedrun.distributed.stopping import (
    LAUNCHER,
    REFUSED,
    die_with_launcher,
    hangup_ignored,
    interruptible,
    outlive_terminal,
)

NAME = "fedrun"
SECONDS_FOR_MACHINES = 600  # until all machines have connected; torchrun's value
SECONDS_TO_STOP = 600  # a round, and its checkpoint
SECONDS_TO_END = 3.0  # once no rank is left


class NotRestarted(FedrunError):
    """A rank ended because the user must change something; a restart would end in the same way."""


def main(argv: Sequence[str] | None = None) -> int:
    """Start the processes of this machine and wait for their end. Returns the exit code."""
    print_log()
    try:
        require_memory()
        return launch(sys.argv[1:] if argv is None else argv)
    except Exception as error:
        expected = isinstance(error, InputError | ConnectionError)
        if not (why := str(error) if expected else shortage(error)):
            raise
        _say(f"error: {' '.join(why.split())}")
        return 1 if isinstance(error, FedrunError) and error.may_pass else 2


def _say(line: str) -> None:
    print(f"launch: {line}", file=sys.stderr, flush=True)


def launch(argv: Sequence[str]) -> int:
    """`main` without its error messages.

    Raises:
        InputError: the user must change something.
        ConnectionError: the machines did not find each other.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what torch's store warns of, we say
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if "LOGLEVEL" not in os.environ:  # this launcher prints the same in fewer lines
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
    # From a signal until ranks that have not ended are killed; torchrun's default is 30 seconds.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_STOP))
    try:
        torchrun.run(args)
        return 0
    except NotRestarted:
        return 2
    except ValueError as error:  # a flag that torchrun rejects, such as --nproc-per-node gpu
        raise InputError(one_line(error)) from error
    except SignalException as error:
        _say(f"{error.sigval.name}: all processes have ended")
    except ChildFailedError as error:
        if refused.exists():
            return 2
        # torchrun ends all but the first one that failed by SIGTERM.
        failed = {rank: failure for rank, failure in sorted(error.failures.items())
                  if failure.exitcode != -signal.SIGTERM} or error.failures
        for rank, failure in failed.items():
            how = f"by {failure.signal_name()}" if failure.exitcode < 0 else (
                f"with exit code {failure.exitcode}")
            hint = memory_limit() if failure.exitcode == -signal.SIGABRT else ""
            _say(f"rank {rank} (process {failure.pid}) ended {how}"
                 f"{hint and f': out of memory{hint}?'}")
    finally:
        scratch.cleanup()
    return 1


def ranks_left() -> bool:
    """After a signal: whether ranks still run. torchrun forwards it to them and waits. Once there
    is none, it needs a moment to end, unless it waits for another machine."""
    import psutil
    if not (left := bool(psutil.Process().children())):
        time.sleep(SECONDS_TO_END)
    return left


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """torchrun's flags. In a SLURM step the address and port of the first machine are optional.
    InputError for flags that choose another rendezvous, or if that address or port is missing."""
    from torch.distributed import run as torchrun
    parser = torchrun.get_args_parser()
    parser.set_defaults(**{name: None for name in ("master_addr", "master_port")
                           if f"PET_{name.upper()}" not in os.environ})
    args = parser.parse_args(argv)
    if args.standalone or args.rdzv_backend != "static" or args.rdzv_endpoint:
        raise InputError("--standalone, --rdzv-backend and --rdzv-endpoint choose another "
                         "rendezvous than this launcher's own: leave them out")
    try:
        fewest, args.machines = torchrun.parse_min_max_nnodes(args.nnodes)
    except (ValueError, RuntimeError):
        fewest = args.machines = 0
    if fewest != args.machines or args.machines < 1:
        raise InputError(f"--nnodes {args.nnodes}: must be one number >= 1")
    if args.machines > 1:
        found = {name: str(value) for name, value in (
            ("MASTER_ADDR", args.master_addr), ("MASTER_PORT", args.master_port))
            if value is not None}
        if in_slurm_step(os.environ):
            found |= rendezvous({**os.environ, **found})
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in found:
                raise InputError(f"--{name.lower().replace('_', '-')}: not set; each of the "
                                 f"{args.machines} machines needs the address and port of the "
                                 "first")
        args.master_addr, args.master_port = found["MASTER_ADDR"], int(found["MASTER_PORT"])
    return args


def register(args: argparse.Namespace) -> None:
    """Make torchrun use our rendezvous, and the signals that this process does not ignore."""
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed.elastic.rendezvous import (
        RendezvousHandler,
        RendezvousInfo,
        RendezvousParameters,
        rendezvous_handler_registry,
    )
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    from fedrun.distributed.connect import LOOPBACK, listen, reach, serve, wait_for_all

    class Rendezvous(StaticTCPRendezvous):
        """torchrun's static rendezvous, with a store on our own socket."""

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
                wait_for_all(PrefixStore("machines", self._store), self.rank, self.world_size,
                             bound, "machine")
            return super().next_rendezvous()

    def create(parameters: RendezvousParameters) -> RendezvousHandler:
        return Rendezvous(address, port, machine, args.machines, parameters.run_id,
                          SECONDS_FOR_MACHINES)

    address, port, machine = args.master_addr or LOOPBACK, args.master_port or 0, args.node_rank
    rendezvous_handler_registry.register(NAME, create)
    # torchrun warns if --master-addr or --node-rank is given with a rendezvous other than its own.
    args.rdzv_backend, args.rdzv_endpoint, args.node_rank = NAME, f"{address}:{port}", 0
    if args.rdzv_id == "none":  # identifies a run that is restarted in place
        args.rdzv_id = uuid.uuid4().hex if args.machines == 1 else NAME
    args.signals_to_handle = wanted_signals(args.signals_to_handle)


def wanted_signals(names: str) -> str:
    """The signals that torchrun should forward, from its list of names: without SIGHUP if `nohup`
    made this process ignore it, since torchrun would handle it again."""
    return ",".join(n for n in names.split(",") if n != "SIGHUP" or not hangup_ignored())


if __name__ == "__main__":
    outlive_terminal()
    if LAUNCHER in os.environ:  # ranks of a study's run
        die_with_launcher()
    sys.exit(interruptible(main, ranks_left))

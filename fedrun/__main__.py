"""`python -m fedrun ...` and the console script `fedrun`."""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the imports that follow

import os
import sys
import threading

from fedrun.common.errors import explain
from fedrun.common.limits import TooLittle, require_memory, shortage
from fedrun.common.log import ERROR, log, print_log
from fedrun.common.terminal import make_printable
from fedrun.distributed.launch import detect
from fedrun.distributed.stopping import (
    HEARTBEAT,
    die_with_launcher,
    interruptible,
    outlive_terminal,
)


def main() -> None:
    make_printable()
    print_log(quiet=detect(os.environ).local_rank > 0)
    outlive_terminal()
    threading.excepthook = _in_a_thread
    if detect(os.environ).alone:
        code = interruptible(command)
    else:
        die_with_launcher()  # before the imports, which take seconds
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own waits for a collective's end
        code = command()
    sys.stdout.flush()
    sys.stderr.flush()
    in_store = any(thread.name == HEARTBEAT for thread in threading.enumerate())
    if code or in_store:
        os._exit(code)  # at once: destructors of process groups would wait for peers that are gone
    sys.exit()


def _in_a_thread(failed: threading.ExceptHookArgs) -> None:
    """What a library's thread has met is told as what our own code meets."""
    line = explain(failed.exc_value) if failed.exc_value else None
    if line is None:
        threading.__excepthook__(failed)
    else:
        log(line, ERROR)


def command() -> int:
    try:
        require_memory()
        from fedrun import cli
        return cli.main()
    except Exception as error:
        if why := str(error) if isinstance(error, TooLittle) else shortage(error):
            log(why, ERROR)
            return 1
        raise


if __name__ == "__main__":
    main()

"""Work on its way through several processes; what they make comes back in the order of the asking.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as WaitedTooLong
from queue import SimpleQueue
from typing import Generic

from fedrun.data.helper_process import Answer, Asked, HelperEnded, HelperProcess

ANSWER_SECONDS = 3600.0  # a process that has not answered for so long does not answer


class HelperPool(Generic[Asked, Answer]):
    """Processes that are asked, each for one piece of work at a time; to be closed."""

    def __init__(self, start: Callable[[], HelperProcess[Asked, Answer]], processes: int,
                 goes_on: Callable[[], bool] = lambda: False) -> None:
        """start: starts a process. goes_on: whether to wait on for one that has not answered for
        ANSWER_SECONDS."""
        self._goes_on = goes_on
        self._asked: deque[Future[Answer]] = deque()
        self._stack = contextlib.ExitStack()
        self._free = SimpleQueue[HelperProcess[Asked, Answer]]()
        self.most = 2 * processes
        """How many pieces of work may be asked for before the first is taken."""
        with self._stack:  # if a process does not start, the others end
            helpers = [self._stack.enter_context(start()) for _ in range(processes)]
            self._threads = ThreadPoolExecutor(processes)
            # The helpers end first, and with them what threads wait for.
            self._stack.callback(self._threads.shutdown, cancel_futures=True)
            for helper in helpers:
                self._stack.callback(helper.end)
                self._free.put(helper)
            self._helper = helpers[0]
            self._stack = self._stack.pop_all()

    def __len__(self) -> int:
        """Pieces of work that were asked for and not taken."""
        return len(self._asked)

    def ask(self, asked: Asked) -> None:
        """Ask for a piece of work."""
        self._asked.append(self._threads.submit(self._ask_helper, asked))

    def take(self) -> Answer:
        """The answer to what was asked first.

        Raises:
            HelperEnded: a process was killed, or does not answer; and what it raised.
        """
        first = self._asked.popleft()
        while True:
            try:
                return first.result(ANSWER_SECONDS)
            except WaitedTooLong:
                if first.done():  # a file system's own TimeoutError
                    raise
                if not self._goes_on():
                    raise HelperEnded(f"a process that {self._helper.does} has not answered for "
                                      f"{ANSWER_SECONDS:.0f} s; {self._helper.continues}"
                                      ) from None

    def _ask_helper(self, asked: Asked) -> Answer:
        helper = self._free.get()
        try:
            return helper.ask(asked)
        finally:
            self._free.put(helper)

    def close(self) -> None:
        """End the processes, and what they are doing."""
        self._stack.close()

"""Sample texts of evaluated models that training on GPUs does not wait for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from time import monotonic
from typing import Any

import torch

from fedrun.common.log import log


class SampleTexts:
    """Makes sample texts on a thread of its own, of as many evaluations as it has time for.

    A processor takes seconds for a text, in which GPUs train hundreds of rounds. Therefore none is
    begun while an earlier one is being made, nor until as much time has passed since as that one
    took: texts take at most half of one core, which may be a worker's too. The last evaluation has
    one in any case.
    """

    def __init__(self, threads: int, unit: str) -> None:
        """threads: of the thread's arithmetic; unit: what there is an evaluation of."""
        self._thread = ThreadPoolExecutor(1, "fedrun-text",
                                          initializer=lambda: torch.set_num_threads(threads))
        self._last: Future[None] | None = None
        self._ended, self._seconds = 0.0, 0.0  # of the last one, if it is complete
        self._unit, self._said = unit, False

    def offer(self, record: dict[str, Any], make: Callable[[], str], last: bool) -> None:
        """Have the record's `generated` made, or leave it as it is. Raises errors of the texts
        before.

        last: whether this is the last evaluation; then the one under way is waited for.
        """
        if self._last is not None and (last or self._last.done()):
            self._last.result()
        if last or self._free():
            self._last = self._thread.submit(self._make, record, make)
        elif not self._said:
            self._said = True
            log(f"a sample text takes longer than the {self._unit}s between evaluations: some "
                "evaluations have none")

    def _free(self) -> bool:
        return self._last is None or (
            self._last.done() and monotonic() >= self._ended + self._seconds)

    def _make(self, record: dict[str, Any], make: Callable[[], str]) -> None:
        began = monotonic()
        record["generated"] = make()
        self._ended = monotonic()
        self._seconds = self._ended - began

    def wait(self) -> None:
        """Wait until no text is being made. Raises its error."""
        if self._last is not None:
            self._last.result()

    def end_thread(self) -> None:
        """Make no more texts. One that is being made ends later, and nobody is told."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class Stopwatch:
    """Seconds in its `with` blocks so far, as any thread may read them."""

    def __init__(self) -> None:
        self._complete = 0.0
        self._began: float | None = None

    def __enter__(self) -> None:
        self._began = monotonic()

    def __exit__(self, *_: object) -> None:
        self._complete, self._began = self.seconds, None

    @property
    def seconds(self) -> float:
        began = self._began
        return self._complete + (0.0 if began is None else monotonic() - began)

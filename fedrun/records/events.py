"""What a run reports while it lasts: the progress of rank 0, and events.jsonl, whose numbers also
go to a tracker (trackers.py)."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from tqdm import tqdm

from fedrun.common.errors import FolderLost
from fedrun.common.files import check_claim, finite, on_disk
from fedrun.common.log import WARNING, log
from fedrun.config import RunConfig
from fedrun.records.history import normalised_weights
from fedrun.records.trackers import open_tracker, scalars
from fedrun.strategies.base import ClientReport


class Progress:
    """The progress of rank 0: a bar on a terminal, elsewhere a line for each evaluated step.

    The line has the numbers of the history. The bar moves between evaluations, so its train
    perplexity is that of one step, and is called so. Tokens a second: since this process began.
    """

    def __init__(self, unit: str, total: int, done: int = 0, tokens: int = 0, seconds: float = 0.0
                 ) -> None:
        """done, tokens, seconds: steps, tokens and time before the checkpoint that a run resumes
        from."""
        self.unit, self.total = unit, total
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, unit=unit, disable=not self.terminal,
                        dynamic_ncols=True)
        self.tokens_before, self.seconds_before = tokens, seconds
        self.evaluated = {"val ppl": "-"}

    def step(self, number: int, train_ppl: float | None, tokens: int, seconds: float,
             evaluated: Mapping[str, float] | None) -> None:
        """One step is done.

        train_ppl: of its batches; None if it is not shown. tokens, seconds: so far. evaluated: if
        it was, perplexities by what they are called: `train ppl`, on the batches since the
        evaluation before, `val ppl`, others of the global model, and what --dp has spent.
        """
        found = {name: f"{value:.4g}" if name == "epsilon" else f"{value:.1f}"
                 for name, value in (evaluated or {}).items()}
        train = {name: found.pop(name) for name in ("train ppl",) if name in found}
        self.evaluated = found or self.evaluated
        rate = (tokens - self.tokens_before) / max(seconds - self.seconds_before, 1e-9)
        others = self.evaluated | {"tokens/s": f"{rate:,.0f}"}
        trained = {} if train_ppl is None else {f"train ppl ({self.unit})": f"{train_ppl:.1f}"}
        self.bar.set_postfix(trained | others, refresh=False)
        self.bar.update()
        if evaluated is not None and not self.terminal:
            text = "  ".join(f"{name} {value}" for name, value in (train | others).items())
            log(f"{self.unit} {number}/{self.total}  {text}")

    def close(self) -> None:
        self.bar.close()


class Events:
    """events.jsonl: one JSON object per line, written during the run for whoever follows it. The
    numbers of every line also go to the run's tracker."""

    def __init__(self, config: RunConfig, unit: str, total: int, done: int = 0) -> None:
        """done: the steps, of `total`, before the checkpoint that a run resumes from. Their lines
        are kept."""
        self.path = path = config.run_dir / "events.jsonl"
        self.file = path.open("ab" if done else "wb", buffering=0)
        self._lock = threading.Lock()
        self._unwritten = b""  # while the disk is full
        self.tracker = open_tracker(config, done)
        self._last = (0, 0.0)  # tokens and seconds of the last line that has them
        if done and path.stat().st_size:
            self.add("resumed", after=done, unit=unit, total=total)
        else:
            self.add("start", unit=unit, total=total)

    def add(self, kind: str, **values: Any) -> None:
        """Add one line. `round` or `step` numbers it. `tokens` and `seconds` also give
        `tokens_per_second` since the line before."""
        if "tokens" in values:
            tokens, seconds = values["tokens"], values["seconds"]
            passed = seconds - self._last[1]
            if tokens > self._last[0] and passed > 0:
                values["tokens_per_second"] = (tokens - self._last[0]) / passed
            self._last = (tokens, seconds)
        event = finite({"event": kind, "time": time.time()} | values)
        line = json.dumps(event, allow_nan=False) + "\n"
        with self._lock:
            self._unwritten += line.encode()
        with suppress(OSError):  # a full disk delays lines, it does not stop the run
            self.write()
        step = values.get("round", values.get("step"))
        if self.tracker is not None and step is not None:
            check_claim(self.path)
            try:
                self.tracker.log(scalars(values), step)
            except OSError as error:
                log(f"--track: nothing more is sent: {error}", WARNING)
                self.tracker = None

    def write(self) -> None:
        """Write the lines that a full disk has rejected so far. Safe to call from any thread.

        Raises OSError, naming the file, if it fails again; a line written in part is completed at
        the next call.
        """
        with self._lock:
            try:
                while self._unwritten:
                    self._unwritten = self._unwritten[self.file.write(self._unwritten):]
            except OSError as error:
                raise on_disk(error, self.path) from None

    def close(self) -> None:
        with suppress(OSError):
            self.write()
        self.file.close()
        if self.tracker is not None:
            with suppress(FolderLost, OSError):
                check_claim(self.path)
                self.tracker.close()


def cohort_event(clients: Sequence[ClientReport]) -> list[dict[str, Any]]:
    """What an event records of each client of a round: its loss in nats per token (none with --dp
    example), its share of the weight, and, if they were measured, the norm of its update, its
    entropy, and how much of its update was used."""
    def measured(client: ClientReport) -> dict[str, float]:
        values = {"norm": client.norm, "entropy": client.entropy, "used": client.used}
        return {} if client.left_out else {n: v for n, v in values.items() if v is not None}

    return [{"client": client.client,
             "loss": None if client.left_out or not client.tokens
             else client.loss_sum / client.tokens,
             "weight": weight} | measured(client)
            for client, weight in zip(clients, normalised_weights(clients), strict=True)]

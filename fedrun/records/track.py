"""What a run tells while it runs: a progress line, a JSON line a round in events.jsonl, and the
same numbers to a tracker (--track), which is optional and an extra to install."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from tqdm import tqdm

from fedrun.common.errors import FolderLost, InputError
from fedrun.common.files import DamagedFile, check_claim, finite, on_disk, read_json, write_json
from fedrun.common.terminal import visible
from fedrun.config import RunConfig
from fedrun.records.history import normalised_weights
from fedrun.strategies.base import ClientReport

PROJECT = "fedrun"


class Progress:
    """The progress line of rank 0: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, unit: str, total: int, done: int = 0, tokens: int = 0) -> None:
        """`done` steps with `tokens` tokens lie behind a run that goes on."""
        self.unit, self.total = unit, total
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, unit=unit, disable=not self.terminal,
                        dynamic_ncols=True)
        self.started, self.tokens_before = time.monotonic(), tokens
        self.val_ppl: float | None = None

    def step(self, number: int, train_ppl: float, tokens: int, val_ppl: float | None) -> None:
        """One step is done: `tokens` seen so far; `val_ppl` where this step was evaluated."""
        evaluated = val_ppl is not None
        self.val_ppl = val_ppl if evaluated else self.val_ppl
        rate = (tokens - self.tokens_before) / max(time.monotonic() - self.started, 1e-9)
        shown = {"train ppl": f"{train_ppl:.1f}",
                 "val ppl": "-" if self.val_ppl is None else f"{self.val_ppl:.1f}",
                 "tokens/s": f"{rate:,.0f}"}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        if evaluated and not self.terminal:
            said = "  ".join(f"{name} {value}" for name, value in shown.items())
            self.say(f"{self.unit} {number}/{self.total}  {said}")

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        line = visible(line)
        if self.terminal:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, flush=True)

    def close(self) -> None:
        self.bar.close()


class Events:
    """events.jsonl: one JSON object a line, written as the run goes, for whoever follows it; and
    the numbers of every line to the run's tracker."""

    def __init__(self, config: RunConfig, unit: str, total: int, done: int = 0) -> None:
        """`done` of `total` steps lie behind a run that goes on: their lines are there."""
        self.path = path = config.run_dir / "events.jsonl"
        self.file = path.open("ab" if done else "wb", buffering=0)
        self._lock = threading.Lock()
        self._unwritten = b""  # what a full disk has not taken
        self.tracker = open_tracker(config, done)
        self._last = (0, 0.0)
        if done and path.stat().st_size:
            self.add("resumed", after=done, unit=unit, total=total)
        else:
            self.add("start", unit=unit, total=total)

    def add(self, kind: str, **values: Any) -> None:
        """One line. `round` or `step` numbers it; `tokens` and `seconds` give the tokens/s since
        the line before."""
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
        with suppress(OSError):  # on a full disk lines wait, the run does not
            self.write()
        step = values.get("round", values.get("step"))
        if self.tracker and step is not None:
            check_claim(self.path)
            try:
                self.tracker.log(scalars(values), step)
            except OSError as error:
                print(f"fedrun: warning: --track: nothing more is sent: {error}", flush=True)
                self.tracker = None

    def write(self) -> None:
        """Write the lines that wait. OSError, naming the file, where the disk does not take them;
        a line that it took in part is finished later. From any thread."""
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
        if self.tracker:
            with suppress(FolderLost, OSError):
                check_claim(self.path)
                self.tracker.close()


def cohort_event(clients: Sequence[ClientReport]) -> list[dict[str, Any]]:
    """What an event records of each client of a round: its loss in nats a token, its share of the
    weight, and, if they were measured, the norm of its update and its entropy."""
    def measured(client: ClientReport) -> dict[str, float]:
        values = {"norm": client.norm, "entropy": client.entropy}
        return {} if client.left_out else {n: v for n, v in values.items() if v is not None}

    return [{"client": client.client,
             "loss": None if client.left_out else client.loss_sum / client.tokens,
             "weight": weight} | measured(client)
            for client, weight in zip(clients, normalised_weights(clients), strict=True)]


# ---- trackers ------------------------------------------------------------------------------------

class Tracker(Protocol):
    """Where numbers go while a run runs."""

    def log(self, values: dict[str, float], step: int) -> None:
        """The numbers of one global step."""

    def close(self) -> None:
        """The run has ended."""


class TensorBoard:
    """Event files under the run's tensorboard/ folder: `tensorboard --logdir results`."""

    def __init__(self, config: RunConfig, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(config.run_dir / "tensorboard"), purge_step=done + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandbLikeTracker:
    """Weights & Biases, or Trackio, whose interface is the same where we use it.

    A resumed run goes on in the run that its earlier starts have told: tracker.json in the run's
    folder keeps its id there (of Trackio: its name). Rounds that are told twice have the same
    numbers; W&B ignores the second ones.
    """

    def __init__(self, package: str, config: RunConfig) -> None:
        self.package = importlib.import_module(package)
        path = config.run_dir / "tracker.json"
        known: dict[str, Any] = {}
        with suppress(OSError, DamagedFile):
            known = read_json(path, dict)
        common = {"project": PROJECT, "config": config.to_dict()}
        if package == "wandb":
            known["wandb"] = str(os.environ.get("WANDB_RUN_ID") or known.get("wandb")
                                 or secrets.token_hex(4))
            write_json(path, known)  # before it exists there: a kill in between costs nothing
            self.package.init(**common, name=config.name, id=known["wandb"], resume="allow",
                              allow_val_change=True)  # of settings that change no results
        else:
            # Only its own: a run of that name may be there from another folder.
            resume = "allow" if known.get(package) else "never"
            run = self.package.init(**common, name=str(known.get(package) or config.name),
                                    resume=resume)
            write_json(path, known | {package: run.name})

    def log(self, values: dict[str, float], step: int) -> None:
        self.package.log(values, step=step)

    def close(self) -> None:
        self.package.finish()


def check_tracker(config: RunConfig) -> None:
    """ValueError, saying what to install, where the package behind --track is missing."""
    if config.track != "none" and importlib.util.find_spec(config.track) is None:
        raise InputError(f"--track {config.track}: the package {config.track} is not installed: "
                         f"pip install 'fedrun[{config.track}]' (or pip install {config.track})")


def open_tracker(config: RunConfig, done: int) -> Tracker | None:
    """The tracker that --track names; None for none. `done` steps were told by an earlier start."""
    if config.track == "none":
        return None
    return (TensorBoard(config, done) if config.track == "tensorboard"
            else WandbLikeTracker(config.track, config))


_NAMES = {"train_ppl": "perplexity/train", "val_ppl": "perplexity/validation",
          "lr": "learning_rate", "tokens_per_second": "tokens_per_second"}


def scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an event under a tracker's names: perplexity/train, seconds/aggregation,
    client_0/weight, ...; what is no finite number is left out."""
    def named() -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if name == "clients":
                yield from ((f"client_{client['client']}/{what}", number) for client in value
                            for what, number in client.items() if what != "client")
            elif name == "left_out":
                yield name, len(value)
            elif name.endswith("_seconds"):
                yield f"seconds/{name.removesuffix('_seconds')}", value
            elif name not in ("round", "step"):
                yield _NAMES.get(name, "seconds/all" if name == "seconds" else name), value

    return {name: float(value) for name, value in named()
            if isinstance(value, (int, float)) and math.isfinite(value)}

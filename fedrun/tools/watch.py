"""`fedrun watch RUN`: follows a run's events.jsonl in the terminal, on this machine or another.

Shows progress, perplexities with a small curve, where the time goes, and a row for each client. For
a finished run it shows the last state and returns. It needs only that file.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedrun.common.errors import InputError
from fedrun.common.files import DamagedFile, number, open_regular, read_json, whole
from fedrun.common.log import WARNING, log
from fedrun.common.terminal import visible
from fedrun.flags import Parser
from fedrun.records.run_files import OUTCOME
from fedrun.records.schema import HELD_OUT, SITE_VAL_PPL

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 48
CLIENTS_SHOWN = 16
POLL_SECONDS = 0.3
READ_AT_ONCE = 1 << 20  # bytes
LONGEST_LINE = 1 << 26  # bytes, enough for a round of half a million clients
LARGEST = 1e18  # numbers from here on are not shown


class Follower:
    """Reads the events of a file that is still being written: each complete line once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        self.file_id: int | None = None
        self._part = b""
        """The beginning of a line whose end has not been read yet."""
        self._skipping = False
        """Whether that line is skipped, because it is longer than any event."""

    def new(self) -> Iterator[dict[str, Any]]:
        """The events added since the last call; all of them if the file was replaced.

        Raises OSError if the file cannot be read, DamagedFile if it is not a regular file.
        """
        try:
            file = open_regular(self.path)
        except FileNotFoundError:
            return
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self.file_id or status.st_size < self.offset:
                self.file_id, self.offset = status.st_ino, 0
                self._part, self._skipping = b"", False
            file.seek(self.offset)
            while piece := file.read(READ_AT_ONCE):
                self.offset += len(piece)
                for line in self._whole_lines(piece):
                    event = _event(line)
                    if event is not None:
                        yield event

    def _whole_lines(self, piece: bytes) -> Iterator[bytes]:
        first, *others = piece.split(b"\n")
        self._part += first
        for following in others:
            if not self._skipping:
                yield self._part
            self._part, self._skipping = following, False
        if len(self._part) > LONGEST_LINE:
            self._part, self._skipping = b"", True


def _event(line: bytes) -> dict[str, Any] | None:
    """The event in a line; None if a crash cut it off, or it is not an event at all."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None


@dataclass
class RunState:
    """What the events so far say about a run."""

    name: str
    total: int | None = None
    unit: str = "round"
    number: int = 0
    last: dict[str, float] = field(default_factory=dict)
    """Name -> its last finite value in an event."""
    train: dict[int, float] = field(default_factory=dict)
    """Global step -> train perplexity."""
    validation: dict[int, float] = field(default_factory=dict)
    at_sites: dict[int, float] = field(default_factory=dict)
    """Global step -> perplexity on what the sites hold out."""
    clients: dict[int, dict[str, float]] = field(default_factory=dict)
    """Client -> its last numbers, by name."""
    left_out: dict[int, set[int]] = field(default_factory=dict)
    """Client -> rounds that left out its update. A set, as a resumed run repeats some rounds."""
    counted: dict[int, dict[str, int]] = field(default_factory=dict)
    """With sites, round -> how many clients it left out, by reason."""
    rate: float = 0.0
    """Training tokens a second, from the start to the last round or step."""
    ended: bool = False

    def update(self, event: dict[str, Any]) -> None:
        """Add one event. Values of unexpected types are ignored."""
        kind = event.get("event")
        self.ended = kind == "end"
        self.last = _updated(self.last, event)
        if kind in ("start", "resumed"):  # the total changes when a run is trained further
            self.unit = "step" if event.get("unit", self.unit) == "step" else "round"
            self.total = whole(event.get("total"), low=1) or self.total
        step = whole(event.get(kind)) if kind in ("round", "step") else None
        if step is not None:
            self.unit, self.number = str(kind), step
            if self.last.get("seconds", 0) > 0:
                self.rate = self.last.get("tokens", 0) / self.last["seconds"]
            for store, name in ((self.train, "train_ppl"), (self.validation, "val_ppl"),
                                (self.at_sites, SITE_VAL_PPL)):
                if name in event:  # null is what JSON has for infinity
                    value = math.inf if event[name] is None else number(event[name])
                    if not math.isnan(value):
                        store[step] = value
            for client in _list(event.get("clients")):
                index = whole(client.get("client")) if isinstance(client, dict) else None
                if index is not None:
                    self.clients[index] = _updated(self.clients.get(index, {}), client)
            for index in map(whole, _list(event.get("left_out"))):
                if index is not None:
                    self.left_out.setdefault(index, set()).add(step)
            if isinstance(why := event.get("left_out_why"), dict):
                self.counted[step] = {visible(str(reason)): count for reason, found in why.items()
                                      if (count := whole(found)) is not None}


def _updated(known: dict[str, float], new: dict[str, Any]) -> dict[str, float]:
    """The known numbers with the new ones added; null removes one."""
    return {name: value for name, value in (known | new).items() if abs(number(value)) < LARGEST}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def main(argv: Sequence[str]) -> int:
    """Follow a run until it ends, or until Ctrl-C."""
    parser = Parser(prog="fedrun watch", allow_abbrev=False,
                    description="Follow a run in the terminal, or look at a finished one.")
    parser.add_argument("run", metavar="RUN", help="a run's folder, or its name in results/")
    parser.add_argument("--once", action="store_true", help="show the current state and exit")
    args = parser.parse_args(argv)
    folder = Path(args.run).expanduser()
    folder = folder if os.path.isdir(folder) else Path("results") / args.run
    if not os.path.isdir(folder):
        raise InputError(f"RUN {args.run}: no such folder, nor one of that name in results/")
    path = folder / "events.jsonl"
    if not os.path.exists(path) and (args.once
                                     or os.path.exists(folder / "training_history.json")):
        raise InputError(f"RUN {args.run}: it has no events.jsonl to follow")
    console = Console(markup=False, emoji=False)
    try:
        follow(Follower(path), RunState(visible(folder.resolve().name)), console, once=args.once)
    except OSError as error:
        raise InputError(f"RUN {args.run}: {path} cannot be read: {error.strerror}") from None
    return 0


def follow(follower: Follower, state: RunState, console: Console, once: bool) -> None:
    """Show the state, again and again until the run has ended; only then if there is no terminal.

    once: show the current state and return. Raises ValueError if the run's folder disappears.
    """
    with ExitStack() as stack:
        live = stack.enter_context(Live(console=console, auto_refresh=False)) \
            if console.is_terminal else None
        with suppress(KeyboardInterrupt):
            while True:
                ended = _outcome(follower.path.parent)
                for event in follower.new():
                    state.update(event)
                if live:
                    live.update(screen(state), refresh=True)
                if state.ended or once:
                    break
                if ended:  # and the events do not say so
                    log(f"{follower.path} is damaged: it does not say how the run ended; its "
                        f"outcome: {ended}", WARNING)
                    break
                if not os.path.isdir(follower.path.parent):
                    raise InputError(f"RUN {follower.path.parent}: the folder has been deleted or "
                                     "renamed")
                time.sleep(POLL_SECONDS)
    if not live:
        console.print(screen(state))


def _outcome(run_dir: Path) -> str:
    """How a run has ended, from its outcome.json; empty while it runs."""
    with suppress(OSError, DamagedFile):
        found = read_json(run_dir / OUTCOME, dict).get("outcome")
        return str(found) if found in ("finished", "stopped", "failed") else ""
    return ""


def screen(state: RunState) -> RenderableType:
    """Everything that is shown of a state."""
    parts: list[RenderableType] = [_head(state)]
    if state.train or state.validation:
        parts += [Text(), _perplexities(state)]
    if state.number:
        parts += [Text(), _totals(state)]
    if state.clients:
        parts += [Text(), _clients(state)]
    return Group(*parts)


def _head(state: RunState) -> RenderableType:
    progress = f"{state.unit} {state.number}" + (f" of {state.total}" if state.total else "")
    status = "ended" if state.ended else (
        "running" if state.number else "waiting for its first round")
    grid = Table.grid(padding=(0, 2))
    grid.add_row(Text(state.name, style="bold", overflow="fold"))
    line = Table.grid(padding=(0, 2))
    line.add_row(Bar(size=state.total or 1, begin=0, end=state.number if state.total else 0,
                     width=24, color="blue"), progress, Text(status, style="dim"))
    grid.add_row(line)
    return grid


def _perplexities(state: RunState) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    # The history's train perplexity is another: the mean since the evaluation before.
    for name, series in ((f"train, each {state.unit}", state.train),
                         ("validation", state.validation), (HELD_OUT, state.at_sites)):
        if series:
            values = [series[number] for number in sorted(series)]
            table.add_row(Text(name, style="dim"), _short(values[-1]),
                          Text(sparkline(values, CURVE_WIDTH), style="blue"),
                          Text(f"lowest {_short(min(values))}", style="dim"))
    return table


def _short(perplexity: float) -> str:
    return f"{perplexity:,.1f}" if perplexity < 1e9 else f"{perplexity:.3g}"


def _totals(state: RunState) -> RenderableType:
    last = state.last
    parts = [f"{last.get('tokens', 0):,} tokens"]
    if state.rate:
        parts.append(f"{state.rate:,.0f} tokens/s")
    if last.get("bytes"):
        parts.append(f"{last['bytes'] / 1e6:,.1f} MB exchanged")
    if last.get("lr") is not None:
        parts.append(f"learning rate {last['lr']:.3g}")
    seconds = [f"{name} {last[f'{key}_seconds']:.1f}" for name, key in
               (("training", "local_training"), ("aggregation", "aggregation"),
                ("evaluation", "evaluation")) if f"{key}_seconds" in last]
    if "seconds" in last:
        seconds.insert(0, f"{last['seconds']:.1f} s")
    totals = Text("  ".join(parts) + "\n" + "  ".join(seconds), style="dim")
    left_out: Counter[str] = Counter()
    for counts in state.counted.values():
        left_out.update(counts)
    if total := sum(left_out.values()):
        why = ", ".join(f"{reason}: {count}" for reason, count in left_out.items() if count)
        totals.append(f"\nclients left out {total}× ({why})", style="red")
    return totals


def _clients(state: RunState) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    shown = sorted(state.clients)[:CLIENTS_SHOWN]
    columns = ["client", "train ppl", "weight"]
    measured = [name for name in ("norm", "entropy")
                if any(name in state.clients[k] for k in shown)]
    for name in [*columns, *measured]:
        table.add_column(name, justify="right")
    table.add_column("")
    for index in shown:
        client = state.clients[index]
        loss = client.get("loss")
        ppl = "-" if loss is None else _short(math.exp(min(loss, 700)))
        count = len(state.left_out.get(index, ()))
        table.add_row(str(index), ppl, f"{client.get('weight', 0):.3f}",
                      *("-" if client.get(name) is None else f"{client[name]:.3f}"
                        for name in measured),
                      Text(f"left out {count}×", style="red") if count else "")
    rest = len(state.clients) - len(shown)
    return Group(table, Text(f"and {rest} more", style="dim")) if rest else table


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve of at most `width` characters, on a log axis from the lowest value to the highest. If
    there are more values, each character shows the (geometric) mean of several."""
    logs = [math.log(v) for v in values if v > 0 and math.isfinite(v)]
    count = min(width, len(logs))
    means = []
    for i in range(count):
        part = logs[i * len(logs) // count:(i + 1) * len(logs) // count]
        means.append(sum(part) / len(part))
    if not means:
        return ""
    low, span = min(means), max(means) - min(means)
    return "".join(BLOCKS[round((v - low) / span * (len(BLOCKS) - 1)) if span else 0]
                   for v in means)

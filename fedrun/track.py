"""What a run tells while it runs: a progress line, and one JSON line a round in events.jsonl."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Progress:
    """The progress line of rank 0: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, unit: str, total: int) -> None:
        self.unit, self.total = unit, total
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, unit=unit, disable=not self.terminal, dynamic_ncols=True)
        self.started = time.monotonic()
        self.val_ppl: float | None = None

    def step(self, number: int, train_ppl: float, tokens: int, val_ppl: float | None) -> None:
        """One step is done: `tokens` seen so far; `val_ppl` where this step was evaluated."""
        evaluated = val_ppl is not None
        self.val_ppl = val_ppl if evaluated else self.val_ppl
        rate = tokens / max(time.monotonic() - self.started, 1e-9)
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
        if self.terminal:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, flush=True)

    def close(self) -> None:
        self.bar.close()


class Events:
    """events.jsonl: one JSON object a line, written as the run goes, for whoever follows it."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8", buffering=1)

    def add(self, kind: str, **values: Any) -> None:
        self.file.write(json.dumps({"event": kind, "time": time.time()} | values) + "\n")

    def close(self) -> None:
        self.file.close()

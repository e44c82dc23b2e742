"""What each method makes of hostile clients: the final perplexity of a run, a method and an attack.

    python -m tests.benchmarks.attacks                              # all that is not made yet
    python -m tests.benchmarks.attacks --worlds 20:6 --rounds 20    # a part of it
    python -m tests.benchmarks.attacks --table                      # the table of what is made

Clients are the authors of `../shared/data/books/train`, several to a client; three thousandths of
each are held out for the perplexities. The last F of K are hostile: they train as the others do,
and send something else in place of the update d. All attacks stay within the round's bound, beyond
which a client is left out anyway:

    sign_flip   -d
    bound       the bound, with the sign of d turned
    noise       normal, with a standard deviation of a quarter of the bound
    boost       10 d
    shuffled    d of text whose tokens are shuffled
    little      "A Little Is Enough" (Baruch, Baruch & Goldberg 2019): in every element the mean of
                the honest updates of the round less 1.5 of their standard deviations

A line a run goes to runs.jsonl in --out when it is done, and table.md is written anew; runs that
are there are not made again. Each is a run of its own, in this process, one after the other. With
the perplexities stands what the last record says was used of an honest and of a hostile client's
update: by-author clients differ so much that a rule may throw out honest ones.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedrun import cli
from fedrun.aggregation.bounds import update_bound
from fedrun.common.files import read_json, write_atomic
from fedrun.federation.client import Client

BOOKS = Path("../shared/data/books/train")
OUT = Path("results/attacks")
METHODS: dict[str, tuple[str, ...]] = {
    "FedAvg": ("fed_avg", "--weighting", "uniform"),
    "FedAvg, clipped": ("fed_avg", "--weighting", "uniform", "--client_clip", "median"),
    "FedMedian": ("fed_median",), "FedTrimmedMean": ("fed_trimmed_mean",), "FedKrum": ("fed_krum",),
    "FedGeometricMedian": ("fed_geometric_median", "--weighting", "uniform")}
ROBUST = ("FedMedian", "FedTrimmedMean", "FedKrum")
ATTACKS = ("none", "sign_flip", "bound", "noise", "boost", "shuffled", "little")
WORLDS = ("8:1", "8:3", "20:6")  # clients: hostile ones
SHARED = ("--config", "tiny_1_layer", "--tokenizer", "bpe:1024", "--sequence_length", "32",
          "--batch_size", "4", "--lr", "4e-3", "--local_updates", "8", "--dtype", "fp32",
          "--partition", "by_source", "--val_fraction", "0.003", "--val_freq", "1000",
          "--checkpoint_freq", "none")
LR, STEPS = 4e-3, 8  # of SHARED
BOOST, LITTLE, NOISE = 10.0, 1.5, 0.25


class Setting(NamedTuple):
    """A run of the bench."""

    method: str
    attack: str
    world: str
    rounds: int

    @property
    def clients(self) -> int:
        return int(self.world.partition(":")[0])

    @property
    def hostile(self) -> int:
        """How many clients are, where there is an attack; as many are counted on without."""
        return int(self.world.partition(":")[2])

    @property
    def possible(self) -> bool:
        """Whether the method takes so many hostile clients at all."""
        return self.method != "FedKrum" or self.clients >= 2 * self.hostile + 3


def forged(attack: str, update: Tensor, honest: Sequence[Tensor], bound: float, seed: int
           ) -> Tensor:
    """What a hostile client sends in place of its update, (size,). honest: the round's."""
    if attack == "sign_flip":
        return -update
    if attack == "bound":
        return -update.sign() * bound
    if attack == "noise":
        drawn = torch.randn(len(update), generator=torch.Generator().manual_seed(seed))
        return drawn * (NOISE * bound)
    if attack == "boost":
        return BOOST * update
    if attack == "little":
        others = torch.stack(list(honest))
        return others.mean(0) - LITTLE * others.std(0)
    return update


@contextlib.contextmanager
def attacked(attack: str, clients: int, hostile: int) -> Iterator[None]:
    """In the block the last `hostile` of the clients are. They train after the others, so the
    honest updates of the round are known to them."""
    healthy, next_batch = Client.train, Client.next_batch
    honest: list[Tensor] = []
    bound = 0.999 * update_bound(STEPS, LR, 0.01, 0.9, 0.999)
    patched: Any = Client

    def is_hostile(client: Client) -> bool:
        return attack != "none" and client.index >= clients - hostile

    def train(client: Client, *args: Any, **how: Any) -> Any:
        before = client.flat.vector.clone()
        losses = healthy(client, *args, **how)
        update = client.flat.vector - before
        if client.index == 0:
            honest.clear()
        if not is_hostile(client):
            honest.append(update)
            return losses
        sent = forged(attack, update, honest, bound, 1000 * client.steps_done + client.index)
        client.flat.vector.copy_(before).add_(sent.clamp_(-bound, bound))
        return losses

    def shuffled(client: Client) -> Tensor:
        batch = next_batch(client)
        if is_hostile(client) and attack == "shuffled":
            made = torch.Generator().manual_seed(client.steps_done)
            order = torch.randperm(batch.numel(), generator=made)
            batch.copy_(batch.flatten()[order].view_as(batch))
        return batch

    patched.train, patched.next_batch = train, shuffled
    try:
        yield
    finally:
        patched.train, patched.next_batch = healthy, next_batch


def made(setting: Setting, cache: Path) -> dict[str, Any]:
    """Make a run; what is kept of it."""
    began = time.monotonic()
    method, *flags = METHODS[setting.method]
    if setting.method in ROBUST:
        flags += ["--byzantine", str(setting.hostile)]
    with tempfile.TemporaryDirectory() as folder:
        with attacked(setting.attack, setting.clients, setting.hostile):
            code = cli.main([method, *SHARED, *flags, "--dataset", str(BOOKS), "--num_clients",
                             str(setting.clients), "--rounds", str(setting.rounds), "--data_dir",
                             folder, "--cache_dir", str(cache), "--run_name", "run"])
        outcome = read_json(Path(folder) / "run" / "outcome.json", dict)
        if outcome["outcome"] == "stopped" or (code and outcome["kind"] != "diverged"):
            raise SystemExit(f"{setting}: {outcome}")
        history = [] if code else read_json(Path(folder) / "run" / "training_history.json", list)
    last = history[-1] if history else {}
    used = {client: share for client, _, share in last.get("client_used", [])}
    first = setting.clients - setting.hostile

    def mean(chosen: range) -> float | None:
        shares = [used[k] for k in chosen if k in used]
        return sum(shares) / len(shares) if shares else None

    return {**setting._asdict(), "perplexity": last.get("server_val_ppl"),
            "used_honest": mean(range(first)), "used_hostile": mean(range(first, setting.clients)),
            "seconds": round(time.monotonic() - began)}


def table(runs: Sequence[dict[str, Any]]) -> str:
    """All that is made, a table for each number of clients and of hostile ones."""
    found = {Setting(*(run[name] for name in Setting._fields)): run for run in runs}
    parts = []
    for world, rounds in dict.fromkeys((s.world, s.rounds) for s in found):
        clients, _, hostile = world.partition(":")
        parts += [f"{hostile} of {clients} clients hostile, {rounds} rounds. Final perplexity; in "
                  "parentheses the share used of an honest client's update, and of a hostile one's."
                  "\n", f"| method | {' | '.join(ATTACKS)} |", "|---" * (len(ATTACKS) + 1) + "|"]
        for method in METHODS:
            settings = [Setting(method, attack, world, rounds) for attack in ATTACKS]
            cells = [cell(found.get(s)) if s.possible else "refused" for s in settings]
            parts.append(f"| {method} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def cell(run: dict[str, Any] | None) -> str:
    """A run in the table."""
    if run is None:
        return ""
    value = run["perplexity"]
    shown = "diverged" if value is None else f"{value:.1f}" if value < 1e4 else f"{value:.1e}"
    if run["used_honest"] is None:
        return shown
    return f"{shown} ({run['used_honest']:.2f}, {run['used_hostile']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--hours", type=float, default=2.0, help="no run begins after these")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--worlds", default=",".join(WORLDS), help="clients:hostile, ...")
    parser.add_argument("--attacks", default=",".join(ATTACKS))
    parser.add_argument("--table", action="store_true", help="make no run")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    log, began = arguments.out / "runs.jsonl", time.monotonic()
    runs = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {Setting(*(run[name] for name in Setting._fields)) for run in runs}
    for setting in (Setting(method, attack, world, arguments.rounds)
                    for world in arguments.worlds.split(",")
                    for attack in arguments.attacks.split(",") for method in METHODS):
        if setting in done or not setting.possible or arguments.table:
            continue
        if time.monotonic() - began > 3600 * arguments.hours:
            break
        runs.append(made(setting, arguments.out / "cache"))
        with log.open("a") as file:
            file.write(json.dumps(runs[-1]) + "\n")
        write_atomic(arguments.out / "table.md", table(runs).encode())
    print(table(runs))


if __name__ == "__main__":
    main()

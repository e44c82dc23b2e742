"""What sizes of rows show of the text that they come from, beside the update of the same batches.

    python -m tests.benchmarks.leak_rows                      # the table
    python -m tests.benchmarks.leak_rows --out results/leak   # and write it there

With --client_moments average_rows a client adds to its update one number for each row of AdamW's
second moment: how large the row's gradients have been. Of the embedding that is a number for each
token. The rows of both are ranked as in leak.py: those of the update by how long they are, the
others by their size. Beside how many of a client's tokens come first is how well the ranking of
these says how often each occurs (Spearman's rank correlation, of the client's tokens alone).

An update is of one round. Moments last, so sizes are also held against all that the client has
trained on since the start. Terms are those of `leak.terms`: what `Worker.train` leaves in the
buffers that would be sent.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr

from fedrun.common.files import write_atomic
from fedrun.data.tokens import TokenData, prepare
from fedrun.federation.worker import Worker
from tests.benchmarks.common import machine
from tests.benchmarks.leak import (
    ALONE,
    CLIENTS,
    SUMS,
    Embedding,
    embedding_of,
    make_worker,
    measure,
    telling_end,
    terms,
)

ROWS = {"client_moments": "average_rows", "moments_every": "1", "grad_clip": 1.0, "eps": 1e-5}


class Shown(NamedTuple):
    """What one client adds in one round, or several of them together."""

    update: np.ndarray
    """(vocabulary, width): the embedding's rows of its term."""
    sizes: np.ndarray
    """(vocabulary, 1)."""
    now: np.ndarray
    """(vocabulary,): how often each token is in the batches of this round."""
    so_far: np.ndarray
    """(vocabulary,): in those of all rounds."""


class Row(NamedTuple):
    """A row of the table."""

    seen: str
    against: str
    """Whose, and of which rounds."""


Found = dict[Row, list[dict[str, float]]]
"""Of every sample: what `measure` returns of `update` and of `sizes`, and `often`."""


def place_of_sizes(worker: Worker) -> Embedding:
    """Where the sizes of the embedding's rows are in the buffer that is sent."""
    embedding = embedding_of(worker)
    before = sum(int(np.prod(part.shape[:-1])) for part in worker.flat.slices
                 if part.start < embedding.start)
    return Embedding(before, (embedding.shape[0], 1))


def counts(worker: Worker, client: int, first: int, last: int) -> np.ndarray:
    """(vocabulary,): how often each token is in a client's batches from step `first` up to
    `last`."""
    one = worker.clients[client]
    batches = [one.batches.read(step, one.sequences, one.shard) for step in range(first, last)]
    return np.bincount(np.concatenate(batches).ravel(), minlength=worker.data.vocab_size)


def shown(worker: Worker, number: int) -> list[Shown]:
    """Of each client, after the rounds before `number`."""
    embedding, sizes = embedding_of(worker), place_of_sizes(worker)
    updates = worker.config.local_updates
    assert worker.rows is not None
    made = []
    for client, term in zip(list(worker.clients), terms(worker, number), strict=True):
        last = number * updates
        made.append(Shown(embedding.rows(term.integers), sizes.rows(worker.rows.buffer.numpy()),
                          counts(worker, client, last - updates, last),
                          counts(worker, client, 0, last)))
    return made


def add(found: Found, row: Row, seen: Shown, often: np.ndarray) -> None:
    """A sample: what is seen, against tokens that occur so often, (vocabulary,)."""
    tokens = np.flatnonzero(often)
    sample: dict[str, float] = {}
    for name, rows in (("update", seen.update), ("sizes", seen.sizes)):
        sample |= {key.replace("norm", name): value for key, value in measure(rows, tokens).items()
                   if "distance" not in key}
        sample[f"often {name}"] = float(spearmanr(np.linalg.norm(rows[tokens], axis=1),
                                                  often[tokens]).statistic)
    found[row].append(sample)


def attacked(data: TokenData, local_updates: int, number: int, seeds: Sequence[int],
             sums: Sequence[int] = SUMS, **flags: object) -> Found:
    """All samples of round `number`, 2 or later, since the first one averages no rows; all clients
    train in each round before it."""
    found: Found = defaultdict(list)
    for seed in seeds:
        worker = make_worker(data, local_updates, seed, **ROWS, **flags)
        for before in range(1, number):
            plan = dataclasses.replace(worker.schedule.plan(before, 0.0), evaluate=False)
            worker.train(plan)
            worker.aggregate(plan)
        made = shown(worker, number)
        for count in (1, *sums):
            seen = ALONE if count == 1 else f"the sum of {count}"
            for start in range(0, len(made) - count + 1, count):
                group, stranger = made[start:start + count], made[(start + count) % len(made)]
                together = Shown(*map(np.add.reduce, zip(*group, strict=True)))
                for one in group:
                    add(found, Row(seen, "one client's, this round"), together, one.now)
                    add(found, Row(seen, "one client's, all rounds"), together, one.so_far)
                add(found, Row(seen, "a stranger's, this round"), together, stranger.now)
                add(found, Row(seen, "a stranger's, all rounds"), together, stranger.so_far)
    return found


# ---- the table -----------------------------------------------------------------------------------

HEADER = """\
| round | local updates | seen | against the tokens | tokens | of a guess | precision by updates \
| AUC | how often | precision by sizes | AUC | how often |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


def table(number: int, local_updates: int, found: Found) -> str:
    """Means over all samples."""
    lines = []
    for (seen, against), samples in found.items():
        cells = [f"{np.mean([one[name] for one in samples]):{form}}"
                 for name, form in (("tokens", ".0f"), ("guess", ".2f"))]
        for name in ("update", "sizes"):
            cells += [f"{np.mean(values):.2f}" for values in telling_end(name, samples)]
            cells.append(f"{np.mean([one[f'often {name}'] for one in samples]):.2f}")
        lines.append(" | ".join((f"| {number}", str(local_updates), seen, against, *cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--local_updates", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, nargs="+", default=[2, 9],
                        help="those whose terms are looked at")
    parser.add_argument("--cache_dir", type=Path, default=Path("~/.cache/fedrun"))
    parser.add_argument("--out", type=Path, help="folder for rows.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = prepare("pydocs", "bpe:4096", 128, arguments.cache_dir)
    lines = [f"`python -m tests.benchmarks.leak_rows`, {machine()}; `tiny`, {CLIENTS} clients, "
             f"`pydocs` with `bpe:4096`: {data.vocab_size:,} tokens; "
             f"seeds {arguments.seeds}"
             f"\n\n{HEADER}"]
    print(lines[0], flush=True)
    for number in arguments.rounds:
        for local_updates in arguments.local_updates:
            lines.append(table(number, local_updates,
                               attacked(data, local_updates, number, arguments.seeds)))
            print(lines[-1], flush=True)
    if arguments.out:
        write_atomic(arguments.out / "rows.md", ("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    main()

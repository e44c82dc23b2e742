"""What an update shows of the text that it was made of, to one who ranks the embedding's rows.

    python -m tests.benchmarks.leak                      # the table
    python -m tests.benchmarks.leak --out results/leak   # and write it there

The head's gradient pushes the row of every token that occurs in a batch another way than the rows
of all others, which move alike. So the rows of the tied embedding are ranked by how long their
change is, and by how far it is from the median row's, and as many as the batches have distinct
tokens are called theirs. Precision is how many of these are right, AUC the chance that a row of
the batches is ranked above one that is none. Whether
the longest rows are those of the batches or the shortest depends on how many clients and local
updates are summed, which who looks on knows, and can try on text of his own: each row of the table
is read from the end that shows more on the mean over all samples. The ranking finds the least that
there is to find: it knows nothing of language, nor of the model.

Terms are made as a run makes them: `Worker.train`, with `Client.train` and `ExactAggregator.add`,
leaves a client's integers in the buffer that would be sent. Those of several clients are summed as
the collective sums them. Masks are those of `fedrun.secure.masks`, between three sites. With
`--dp client` each update is clipped by `Noise.clip`, and a term or a sum has the noise of a round,
whose standard deviation is the multiplier times what one client can move a sum by. It is the same
for any number of summed clients: the rest of the cohort is missing, which counts as zero.

A sum is also held against the tokens of a client that is not in it (`a stranger`): what it shows
of anybody, because some words are everywhere. A sum hides a client in it as far as it shows no more
of that client than of the stranger.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fedrun.config import FederatedConfig
from fedrun.data.tokens import TokenData, prepare
from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.data_plane import DataPlane
from fedrun.distributed.launch import detect
from fedrun.distributed.runtime import Runtime
from fedrun.federation.noise import Noise
from fedrun.federation.worker import Worker
from fedrun.flags import resolve
from fedrun.model.names import EMBEDDING
from fedrun.privacy.client_level import ClientLevel
from fedrun.secure.identity import Identity
from fedrun.secure.noise import stream
from tests.benchmarks.common import machine
from tests.support.experiments import worker_of
from tests.support.sites import NAMES, Sites

CLIENTS = 72  # so that eight are strangers to the sum of 64
CLIP = 1.0  # shorter than any client's update here: all have the same length
MULTIPLIERS = (0.0, 0.001, 0.01, 0.1, 1.0)
COHORT = 1 / 9
SUMS = (3, 8, 64)
SITES = 3
ALONE = "a client's term"


class Term(NamedTuple):
    """What one client adds in one round."""

    integers: np.ndarray
    """(size + 1,) int32: the buffer that is sent."""
    tokens: np.ndarray
    """The distinct tokens of its batches, sorted."""


class Row(NamedTuple):
    """A row of the table. seen: without noise or with it, "a client's term, noise 0.1"."""

    seen: str
    against: str


Found = dict[Row, list[dict[str, float]]]
"""Of every sample: what `measure` returns."""


class Embedding(NamedTuple):
    """Where the rows of the tokens are in a term."""

    start: int
    shape: tuple[int, int]

    def rows(self, integers: np.ndarray) -> np.ndarray:
        """(vocabulary, width), in float64."""
        count, width = self.shape
        return integers[self.start:self.start + count * width].reshape(self.shape).astype(float)


# ---- the attack ----------------------------------------------------------------------------------

def scores(rows: np.ndarray) -> dict[str, np.ndarray]:
    """How much each row looks as if its token were in the batches, in two ways; rows: (n, width).
    """
    return {"norm": np.linalg.norm(rows, axis=1),
            "distance": np.linalg.norm(rows - np.median(rows, axis=0), axis=1)}


def precision(score: np.ndarray, tokens: np.ndarray) -> float:
    """The share of `tokens` (distinct) among as many rows of the largest score; of rows with equal
    scores at the end, the share that is expected in any order."""
    last = np.sort(score)[-len(tokens)]
    inside = np.isin(np.arange(len(score)), tokens)
    above, equal = score > last, score == last
    share = (len(tokens) - above.sum()) / equal.sum()
    return float((inside[above].sum() + share * inside[equal].sum()) / len(tokens))


def auc(score: np.ndarray, tokens: np.ndarray) -> float:
    """The chance that a row of `tokens` has a larger score than another row; half, if equal."""
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]  # from 1; the mean of those that are equal
    inside, outside = len(tokens), len(score) - len(tokens)
    return float((rank[tokens].sum() - inside * (inside + 1) / 2) / (inside * outside))


def measure(rows: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """Precision and AUC of both rankings from their upper end, precision from their lower end
    (`from below`), and the precision of a guess."""
    found = {"tokens": float(len(tokens)), "guess": len(tokens) / len(rows)}
    for name, score in scores(rows).items():
        found |= {f"precision {name}": precision(score, tokens), f"AUC {name}": auc(score, tokens),
                  f"precision {name} from below": precision(-score, tokens)}
    return found


def telling_end(name: str, samples: Sequence[Mapping[str, float]]
                ) -> tuple[list[float], list[float]]:
    """Precision and AUC of all samples of one ranking, from the end that shows more on the mean."""
    areas = [one[f"AUC {name}"] for one in samples]
    if np.mean(areas) >= 0.5:
        return [one[f"precision {name}"] for one in samples], areas
    return [one[f"precision {name} from below"] for one in samples], [1 - a for a in areas]


# ---- what it is tried on -------------------------------------------------------------------------

def make_worker(data: TokenData, local_updates: int, seed: int, **flags: object) -> Worker:
    """A worker with all clients, at the start of a run."""
    config = resolve("fed_avg", {
        "config": "tiny", "num_clients": CLIENTS, "local_updates": local_updates, "lr": 4e-3,
        "rounds": 1000, "seed": seed, "dtype": "fp32", "device": "cpu",
        "sequence_length": data.train.shape[1], **flags})
    assert isinstance(config, FederatedConfig)
    runtime = Runtime(detect({}), torch.device("cpu"), (0,), ControlPlane(), DataPlane())
    return worker_of(config, data, runtime)


def embedding_of(worker: Worker) -> Embedding:
    """Without the rows that only pad the vocabulary."""
    part, = (part for part in worker.flat.slices if part.name == EMBEDDING)
    return Embedding(part.start, (worker.data.vocab_size, part.shape[1]))


def terms(worker: Worker, number: int) -> Iterator[Term]:
    """Each client's term of round `number`, which is not finished."""
    plan = worker.schedule.plan(number, 0.0)
    for client in worker.clients.values():
        alone = dataclasses.replace(plan, cohort=[client.index],
                                    weights=[1 / len(worker.clients)], evaluate=False)
        before = int(worker.store.checkout(client.index)["steps_done"])
        batches = [client.batches.read(step, client.sequences, client.shard)
                   for step in range(before, before + worker.config.local_updates)]
        reports = worker.train(alone).clients  # none with --dp
        assert not any(report.left_out for report in reports)
        yield Term(worker.aggregator.buffer.numpy().copy(), np.unique(batches))


def masked(made: Sequence[Term]) -> np.ndarray:
    """What the first of three sites sends, whose terms these are."""
    with tempfile.TemporaryDirectory(prefix="fedrun-benchmark-") as folder:
        sites = Sites({name: Identity.create(Path(folder) / name) for name in NAMES[:SITES]})
        return sites.agree().masked([term.integers for term in made])[0]


def attack(made: Sequence[Term], embedding: Embedding, found: Found,
           sums: Sequence[int] = SUMS) -> None:
    """Add all samples of the terms of one round."""
    def add(seen: str, against: str, rows: np.ndarray, tokens: np.ndarray) -> None:
        found[Row(seen, against)].append(measure(rows, tokens))

    for k, term in enumerate(made):
        rows, stranger = embedding.rows(term.integers), made[(k + 1) % len(made)]
        add(ALONE, "its own", rows, term.tokens)
        add(ALONE, "a stranger's", rows, stranger.tokens)
    for count in sums:
        for start in range(0, len(made) - count + 1, count):
            group, stranger = made[start:start + count], made[(start + count) % len(made)]
            rows = embedding.rows(np.add.reduce([term.integers for term in group]))
            everybody, seen = [term.tokens for term in group], f"the sum of {count}"
            add(seen, "all of theirs", rows, np.unique(np.concatenate(everybody)))
            for tokens in everybody:
                add(seen, "one client's", rows, tokens)
            add(seen, "a stranger's", rows, stranger.tokens)
    for start in range(0, len(made) - SITES + 1, SITES):
        group = made[start:start + SITES]
        rows = embedding.rows(masked(group))
        add("a masked term", "its own", rows, group[0].tokens)


def make_private(data: TokenData, local_updates: int, seed: int, noise: float, **flags: object
                 ) -> tuple[Worker, ClientLevel]:
    """A worker with all clients, which clips their updates, and the mechanism of its rounds; noise:
    the multiplier."""
    worker = make_worker(data, local_updates, seed, weighting="uniform", dp="client", dp_clip=CLIP,
                         dp_noise=noise, dp_delta=1e-5, **flags)
    level = ClientLevel(CLIP, noise, worker.config.cohort_size, worker.flat.size)
    worker.noise = Noise(level, worker.runtime.data_plane, None)
    return worker, level


def attack_noised(made: Sequence[Term], embedding: Embedding, levels: Sequence[ClientLevel],
                  seed: int, found: Found, sums: Sequence[int] = SUMS) -> None:
    """Add all samples of clipped terms under the noise of these mechanisms, which have one grid; of
    sums against the tokens of one client, as in a term against its own."""
    keys = np.random.default_rng(seed)

    def noised(integers: np.ndarray, level: ClientLevel) -> np.ndarray:
        rows = embedding.rows(integers)
        if level.noise:
            drawn = level.sampler.sample(stream(keys.bytes(32), 0), rows.size)
            rows += drawn.reshape(rows.shape)
        return rows

    for level in levels:
        behind = f"clip {level.clip:g}, noise {level.noise:g}"
        for count in (1, *sums):
            seen = f"{'the sum of ' + str(count) if count > 1 else ALONE}, {behind}"
            for start in range(0, len(made) - count + 1, count):
                group, stranger = made[start:start + count], made[(start + count) % len(made)]
                rows = noised(np.add.reduce([term.integers for term in group]), level)
                for term in group:
                    own = Row(seen, "its own" if count == 1 else "one client's")
                    found[own].append(measure(rows, term.tokens))
                found[Row(seen, "a stranger's")].append(measure(rows, stranger.tokens))


def attacked_private(data: TokenData, local_updates: int, seeds: Sequence[int],
                     multipliers: Sequence[float] = MULTIPLIERS, sums: Sequence[int] = SUMS,
                     **flags: object) -> Found:
    """All samples of the first round with --dp client; multiplier 0 is the clip alone."""
    found: Found = defaultdict(list)
    for seed in seeds:
        worker, noisiest = make_private(data, local_updates, seed, max(multipliers), **flags)
        levels = [dataclasses.replace(noisiest, noise=z) for z in multipliers]
        assert {level.scale for level in levels} == {noisiest.scale}
        attack_noised(list(terms(worker, 1)), embedding_of(worker), levels, seed, found, sums)
    return found


def attacked(data: TokenData, local_updates: int, number: int, seeds: Sequence[int],
             sums: Sequence[int] = SUMS, **flags: object) -> Found:
    """All samples of round `number`. In each round before it a ninth of the clients train."""
    found: Found = defaultdict(list)
    for seed in seeds:
        worker = make_worker(data, local_updates, seed, cohort=COHORT if number > 1 else None,
                             **flags)
        for before in range(1, number):
            plan = dataclasses.replace(worker.schedule.plan(before, 0.0), evaluate=False)
            worker.train(plan)
            worker.aggregate(plan)
        attack(list(terms(worker, number)), embedding_of(worker), found, sums)
    return found


# ---- the table -----------------------------------------------------------------------------------

HEADER = """\
| round | local updates | seen | against the tokens | tokens | precision by norm | AUC \
| by distance | AUC | of a guess |
|---|---|---|---|---|---|---|---|---|---|"""


def table(number: int, local_updates: int, found: Mapping[Row, list[dict[str, float]]]) -> str:
    """Means over all samples, with the standard deviation of what the ranking finds."""
    lines = []
    for (seen, against), samples in found.items():
        def mean(name: str, samples: list[dict[str, float]] = samples) -> float:
            return float(np.mean([one[name] for one in samples]))

        both = " | ".join(f"{np.mean(values):.2f} ± {np.std(values):.2f}"
                          for name in ("norm", "distance") for values in telling_end(name, samples))
        lines.append(f"| {number} | {local_updates} | {seen} | {against} | {mean('tokens'):.0f} "
                     f"| {both} | {mean('guess'):.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--local_updates", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, nargs="+", default=[1],
                        help="those whose terms are looked at")
    parser.add_argument("--cache_dir", type=Path, default=Path("~/.cache/fedrun"))
    parser.add_argument("--out", type=Path, help="folder for table.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = prepare("pydocs", "bpe:4096", 128, arguments.cache_dir)
    given = " ".join(f"--{name} {' '.join(map(str, getattr(arguments, name)))}"
                     for name in ("seeds", "rounds"))
    lines = [f"`python -m tests.benchmarks.leak {given}`, {machine()}; `tiny`, {CLIENTS} "
             f"clients, `pydocs` with `bpe:4096`: {data.vocab_size:,} tokens\n\n{HEADER}"]
    print(lines[0], flush=True)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    for number in arguments.rounds:
        for local_updates in arguments.local_updates:
            found = attacked(data, local_updates, number, arguments.seeds)
            if number == 1:
                found |= attacked_private(data, local_updates, arguments.seeds)
            lines.append(table(number, local_updates, found))
            print(lines[-1], flush=True)
            if arguments.out:
                text = "\n".join(lines) + "\n"
                (arguments.out / "table.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

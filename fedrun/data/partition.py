"""Partitions: which client owns which sequences of the train split.

Every sequence belongs to exactly one client. A partition depends on the corpus, the seed and its
own settings alone, not on ranks or the number of processes.
"""

from __future__ import annotations

import hashlib
import heapq
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from fedrun.common.errors import InputError
from fedrun.data.given import OF_A_CLIENT
from fedrun.data.text_options import COLUMN, GIVEN
from fedrun.data.tokens import TokenData


@dataclass(frozen=True)
class Shards:
    """Which sequences of the train split each client owns: what it trains on, what it holds out.

    One array for each client: indices of rows of `data.train`, int64, ascending; with sites, of
    rows of the text of the client's site.
    """

    train: list[np.ndarray]
    holdout: list[np.ndarray] = field(default_factory=list)
    texts: list[np.ndarray] = field(default_factory=list)
    """With sites, for each client the sequences of its site's text, (n, sequence_length)."""
    held_out: list[np.ndarray] = field(default_factory=list)
    """With --site_holdout, for each site whose text is here the sequences that none of its clients
    owns, (n, sequence_length)."""
    agreed: list[int] = field(default_factory=list)
    """The number of sequences that each client trains on, where this rank has only some clients'
    text; empty where it has all."""

    @classmethod
    def deal(cls, data: TokenData, *, num_clients: int, partition: str, alpha: float,
             size_skew: float, seed: int, holdout: float, batch_size: int,
             rounded_to: int = 1, rows: np.ndarray | None = None,
             flag: str = "--entropy_holdout") -> Shards:
        """Deal the sequences out as `client_shards` does, then hold out the end of each shard.

        holdout: fraction of each shard that is not trained on; 0 for none. batch_size: sequences
        that every client must have to train on. rounded_to: each shard loses its end, down to a
        multiple of this. rows: of the sequences to deal out, ascending; None: all. flag: which asks
        for the holdout. InputError as `client_shards`, and for a shard of which nothing can be held
        out or too little is left to train on.
        """
        parts = [split_holdout(shard[:len(shard) - len(shard) % rounded_to], holdout)
                 for shard in client_shards(data, num_clients, partition, alpha, size_skew, seed,
                                            rows)]
        for client, (train, held) in enumerate(parts):
            size = len(train) + len(held)
            if holdout and size and not len(held):
                raise InputError(
                    f"{flag} {holdout:g}: must be >= {1 / size:.2g}, or nothing of "
                    f"client {client}'s shard of {size} sequences is held out")
            if len(train) < batch_size:
                remedies = [f"--batch_size <= {len(train)}"] if len(train) else []
                remedies += ["a smaller --size_skew"] if size_skew else []
                remedies += ["a smaller rounded_to"] if rounded_to > 1 else []
                remedies += ["a smaller --site_holdout"] if rows is not None else []
                fewer = "leave the client out" if partition == GIVEN else "fewer --num_clients"
                raise InputError(
                    f"--partition {partition}: client {client} would train on {len(train)} "
                    f"sequences, fewer than a batch of {batch_size}; use "
                    f"{' or '.join([*remedies, fewer])}")
        return cls([train for train, _ in parts], [held for _, held in parts])

    @property
    def sizes(self) -> list[int]:
        """The number of sequences that each client trains on."""
        return self.agreed or [len(shard) for shard in self.train]

    def text_of(self, client: int, data: TokenData) -> np.ndarray:
        """The sequences that a client's indices are into. data: the run's, without sites."""
        return self.texts[client] if self.texts else data.train

    def digest(self) -> str:
        """16 hex digits of a SHA-256 over all shards, for comparing ranks and resumed runs."""
        hashed = hashlib.sha256()
        for part in (*self.train, *self.holdout):
            hashed.update(b"%d sequences\n" % len(part))
            hashed.update(part.tobytes())
        return hashed.hexdigest()[:16]


def split_holdout(shard: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Split off the last `fraction` of a shard: (what to train on, what to hold out)."""
    held = int(len(shard) * fraction)
    return shard[:len(shard) - held], shard[len(shard) - held:]


def drawn_rows(n_sequences: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a share of the sequences, rounded down: (the others, the drawn ones), ascending."""
    count = int(n_sequences * Fraction(str(share)))  # a share as it was typed
    drawn = _generator(seed, "site_holdout").permutation(n_sequences)[:count]
    return np.setdiff1d(np.arange(n_sequences), drawn), np.sort(drawn)


def client_shards(data: TokenData, n_clients: int, partition: str, alpha: float, size_skew: float,
                  seed: int, rows: np.ndarray | None = None) -> list[np.ndarray]:
    """The sequences of each client, for a value of --partition.

    contiguous, shuffled and dirichlet give each client exactly its share of the sequences (see
    `shard_sizes`). documents, by_source and column:NAME keep documents or sources whole, come as
    close to the shares as that allows, and give every client at least one. given is who brought
    what, of data that was given client by client.

    Args:
        rows: of the sequences to deal out, int64, ascending; None: all
    Returns:
        for each client: indices of rows of data.train, int64, ascending
    Raises:
        InputError: there are fewer sequences, documents or sources than clients, or no sources.
    """
    rows = np.arange(len(data.train)) if rows is None else rows
    n_sequences = len(rows)
    if partition in ("contiguous", "shuffled", "dirichlet"):
        _require_enough("sequence", n_sequences, n_clients, partition)
    sizes = shard_sizes(n_sequences, n_clients, size_skew, seed)
    random = _generator(seed, partition)
    if partition == "contiguous":
        owner = np.repeat(np.arange(n_clients), sizes)
    elif partition == "shuffled":
        owner = random.permutation(np.repeat(np.arange(n_clients), sizes))
    else:
        documents = data.load_documents()
        document = documents.of_sequences(*data.train.shape)[rows]
        if partition == "dirichlet":
            topic = data.load_topics().of_document[document]
            owner = deal_topics(topic, document, sizes, alpha, random)
        elif partition == "documents":
            owner = deal_whole(document, sizes, partition, random)
        elif partition == GIVEN:
            if documents.kind != OF_A_CLIENT or len(documents) != n_clients:
                raise InputError(f"--partition {GIVEN}: is the partition of data that was given to "
                                 "fedrun.train client by client; must be another one here")
            owner = document
        else:
            assert partition == "by_source" or partition.startswith(COLUMN)
            if not documents.sources:
                raise InputError(
                    f"--partition by_source: {data.fingerprint['dataset']} has no sources (each "
                    f"document is {documents.kind}); must be contiguous, shuffled, dirichlet or "
                    "documents, unless you make sources: a folder of text files for each, or a "
                    f"column with their names ({COLUMN}NAME)")
            owner = deal_whole(documents.source[document], sizes, partition, None)
    bounds = np.cumsum(np.bincount(owner, minlength=n_clients))[:-1]
    return list(np.split(rows[np.argsort(owner, kind="stable")], bounds))


def shard_sizes(n_sequences: int, n_clients: int, size_skew: float, seed: int) -> np.ndarray:
    """The number of sequences that each client should get; their sum is n_sequences.

    Without skew the sizes differ by at most one. With skew they are proportional to draws from a
    log-normal distribution whose logarithm has the standard deviation `size_skew`: the unbalanced
    clients of Acar et al. (2021, "Federated Learning Based on Dynamic Regularization", section 4).

    Returns:
        int64, (n_clients,)
    """
    if size_skew == 0:
        return np.diff(np.arange(n_clients + 1) * n_sequences // n_clients)
    shares = size_skew * _generator(seed, "sizes").standard_normal(n_clients)
    return apportion(n_sequences, np.exp(shares - shares.max()))


def apportion(total: int, shares: np.ndarray) -> np.ndarray:
    """Integers proportional to `shares` whose sum is `total`, by the largest remainder method.

    Returns:
        int64, the shape of `shares`
    """
    quotas = total * (shares / shares.sum())
    whole: np.ndarray = np.floor(quotas).astype(np.int64)
    missing = total - int(whole.sum())
    assert 0 <= missing <= len(whole)
    most_cut = np.argsort(whole - quotas, kind="stable")
    whole[most_cut[:missing]] += 1
    return whole


def deal_whole(unit: np.ndarray, sizes: np.ndarray, partition: str,
               random: np.random.Generator | None) -> np.ndarray:
    """Assign whole units (documents or sources) to clients.

    The units are taken in random order or, without `random`, from the largest on. First each client
    gets one unit, in descending order of the clients' sizes; then each unit goes to the client
    that is furthest below its size. With equal sizes, no client differs from its size by more than
    the size of the largest unit.

    Args:
        unit: the unit of each sequence, (n_sequences,)
        sizes: the number of sequences that each client should get, (n_clients,)
    Returns:
        int64, (n_sequences,): the client that owns each sequence
    Raises:
        InputError: there are fewer units than clients.
    """
    units, unit = np.unique(unit, return_inverse=True)
    unit_sizes = np.bincount(unit)
    _require_enough("document" if partition == "documents" else "source", len(units), len(sizes),
                    partition)
    order = random.permutation(len(units)) if random else np.argsort(-unit_sizes, kind="stable")
    clients = np.argsort(-sizes, kind="stable")
    owner_of_unit = np.empty(len(units), dtype=np.int64)
    owner_of_unit[order[:len(sizes)]] = clients
    surplus = [(int(unit_sizes[one] - sizes[client]), int(client))
               for one, client in zip(order, clients, strict=False)]
    heapq.heapify(surplus)
    for one in order[len(sizes):]:
        lowest, client = surplus[0]
        owner_of_unit[one] = client
        heapq.heapreplace(surplus, (lowest + int(unit_sizes[one]), client))
    owner: np.ndarray = owner_of_unit[unit]
    return owner


def deal_topics(topic: np.ndarray, document: np.ndarray, sizes: np.ndarray, alpha: float,
                random: np.random.Generator) -> np.ndarray:
    """Assign sequences so that each client's mix of topics is a draw from Dirichlet(alpha p).

    p is the mix of topics of the corpus. The scheme of Hsu, Qi & Brown (2019, "Measuring the
    Effects of Non-Identical Data Distribution for Federated Visual Classification", section 3.1),
    without replacement: clients draw in random order, and a topic that is used up drops out of the
    mixes of later clients. The documents of a topic are assigned one after the other in random
    order, so that few are split between clients.

    Args:
        topic, document: of each sequence, (n_sequences,)
        sizes: the number of sequences that each client gets, (n_clients,)
    Returns:
        int64, (n_sequences,): the client that owns each sequence
    """
    _, topic = np.unique(topic, return_inverse=True)
    left = np.bincount(topic)
    prior = left / left.sum()
    rank = random.permutation(document.max() + 1)
    queue = np.lexsort((rank[document], topic))  # sequences by topic, then by document
    first = np.cumsum(left) - left  # position in the queue of each topic's next sequence
    owner = np.empty(len(topic), dtype=np.int64)
    for client in random.permutation(len(sizes)):
        taken = _take(sizes[client], random.dirichlet(alpha * prior), left)
        for begin, count in zip(first, taken, strict=True):
            owner[queue[begin:begin + count]] = client
        first, left = first + taken, left - taken
    return owner


def _take(size: int, mix: np.ndarray, left: np.ndarray) -> np.ndarray:
    """How many of `size` sequences to take of each topic: proportional to `mix` while they last."""
    taken = np.zeros_like(left)
    while taken.sum() < size:
        mix = np.where(left > taken, mix, 0.0)
        if not mix.sum() > 0:  # the client's topics are used up: take from the others
            mix = (left - taken).astype(np.float64)
        taken = taken + np.minimum(apportion(size - taken.sum(), mix), left - taken)
    return taken


def _require_enough(what: str, available: int, n_clients: int, partition: str) -> None:
    if available < n_clients:
        raise InputError(
            f"--num_clients {n_clients}: must be <= {available}: --partition {partition} gives "
            f"every client a {what}, and the train split has only {available}")


def _generator(seed: int, purpose: str) -> np.random.Generator:
    """Independent random numbers for each purpose; batches use yet other seeds."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *purpose.encode()])))

"""What the first worker of a site, its leader, has for secure sums: the keys of this start, and the
journal of all rounds that the site took part in.

At every start the leaders agree on fresh keys over the control plane, through the server: first
each sends a nonce, then, having those of all, an offer that it has signed over all that decides the
sums (`secure.masks`). What the server changes on the way does not verify.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from fedrun.common.errors import FedrunError, explain
from fedrun.data.partition import Shards
from fedrun.data.sites import IDENTITY, Sites
from fedrun.data.tokens import TokenData
from fedrun.distributed.control_plane import ControlPlane
from fedrun.federation.messages import RoundPlan

if TYPE_CHECKING:
    from fedrun.secure.identity import Identity
    from fedrun.secure.masks import Mask

JOURNAL = "journal"  # in a site's folder


class RoundRefused(FedrunError):
    """This round's sum is not made. Every worker raises one, after the same collectives."""


class JournalRefused(RoundRefused):
    """This site's journal does not let the sum happen."""

    code = "journal"


class KeysRefused(FedrunError):
    """The sites have not agreed on keys."""

    code = "masks"


class MadeAhead:
    """A mask that a thread makes beside the training, so that the sum has only to add it: the same
    integers, as long as the vector in memory until then. The cipher takes pieces of some 30
    microseconds, in which `cryptography` releases Python's global lock, and older ones hold it."""

    def __init__(self, mask: Mask, size: int, bits: int, thread: Executor) -> None:
        """For a vector of `size` integers of 32 or 64 bits."""
        self._mask = mask
        self._made: Future[np.ndarray] | None = thread.submit(_made, mask, size, bits)

    def add_to(self, vector: np.ndarray) -> None:
        """Add the mask in place, as `Mask.add_to` does; it is made now if the thread has not begun.
        TypeError for a vector of another size or type, Replayed the second time."""
        ahead, self._made = self._made, None
        if ahead is None or ahead.cancel():
            self._mask.add_to(vector)
            return
        made = ahead.result()
        if (made.shape, made.dtype) != (vector.shape, vector.dtype):  # numpy would repeat or cast
            raise TypeError(f"{vector.dtype}, {vector.shape}: the mask is of {made.dtype}, "
                            f"{made.shape}")
        np.add(vector, made, out=vector)


def _made(mask: Mask, size: int, bits: int) -> np.ndarray:
    vector = np.zeros(size, f"i{bits // 8}")
    mask.add_to(vector)
    return vector


class Leader:
    """A site's keys and its journal."""

    def __init__(self, name: str, identity: Identity, folder: Path, sites: Sites, run: str,
                 seed: int, text: str) -> None:
        """folder: the site's. run: the run's id. text: `digest_of_text` of the site's clients.
        InputError if the key is not the one that the file of the sites has."""
        from fedrun.secure.identity import public_key
        from fedrun.secure.journal import Journal
        from fedrun.secure.masks import Session

        self.name, self.sites, self.run = name, sites, run
        self._seed, self._text = seed, text
        self.session = Session(name, identity, {entry.name: public_key(entry.key)
                                                for entry in sites.sites})
        self._journal = Journal(folder / JOURNAL)
        self._pool = ThreadPoolExecutor(1, "fedrun-site")
        self._model: Future[str] | None = None
        self._ahead: dict[tuple[int, str, int], MadeAhead] = {}

    @classmethod
    def open(cls, name: str, folder: Path, sites: Sites, run: str, seed: int, shards: Shards,
             data: TokenData) -> Self:
        """Of the site with this name, whose clients have their shards, or parts of `data`."""
        from fedrun.secure.identity import Identity

        text = digest_of_text((shards.train[k], shards.text_of(k, data))
                              for k in sites.clients_of(name))
        return cls(name, Identity.load(folder / IDENTITY), folder, sites, run, seed, text)

    def begin(self, model: Tensor) -> None:
        """Take the digest of the global model, (size,), while clients train from it."""
        self._model = self._pool.submit(digest_of, model)

    def record(self, plan: RoundPlan, steps: int, sums: int = 0) -> None:
        """On return the round is in the journal, on the disk. JournalRefused if it must not be.

        steps: that the run's clients have made before the round. sums: `Strategy.reweighted`; such
        sums follow from the plan and each other, and are repeated as they were, but no other number
        of them is made of the same updates, nor the one with planned weights besides.
        """
        from fedrun.secure.journal import Sum

        assert self._model is not None
        # Without the learning rate and the like: a run that differs in little would show, without
        # one of the sites, nearly the same sum of the others.
        start = _digest("start", self._model.result(), self._text, self._seed, steps)
        terms = f"{', '.join(self.sites.names)}: " + _digest(
            "terms", plan.cohort, plan.weights, self.sites.digest(), self._text,
            *([sums] if sums else []))
        try:
            self._journal.record(Sum(self.run, plan.round, "update", start, terms))
        except (FedrunError, OSError) as error:
            raise JournalRefused(explain(error)) from error

    def make_ahead(self, number: int, name: str, size: int, bits: int) -> None:
        """Begin to make the site's mask for a sum of this round, in place of any that was made
        ahead and not asked for."""
        mask = self.session.mask(number, name, bits)
        self._ahead = {(number, name, bits): MadeAhead(mask, size, bits, self._pool)}

    def mask(self, number: int, name: str, bits: int) -> Mask | MadeAhead:
        """The site's mask for a sum of this round, of integers of 32 or 64 bits. It is of all sites
        of this start, and once made, ahead or now, never made again."""
        return self._ahead.pop((number, name, bits), None) or self.session.mask(number, name, bits)

    def close(self) -> None:
        """End the thread, after what it does at the moment."""
        self._ahead = {}
        self._pool.shutdown(wait=False, cancel_futures=True)


def agree(control: ControlPlane, leader: Leader | None, plan: bytes) -> None:
    """All ranks: make the keys of this start. KeysRefused on all of them if they are refused at a
    site.

    leader: on the leaders. plan: there, the digest of all that decides the sums: settings, sizes,
    sites, versions, first model.
    """
    nonces = _exchange(control, {} if leader is None else {"nonce": leader.session.nonce.hex()})
    mine: dict[str, str] = {}
    if leader is not None:
        with _refusing(mine):
            found = {name: bytes.fromhex(said["nonce"]) for name, said in nonces.items()}
            public, signature = leader.session.offer(leader.run, found, plan)
            mine |= {"public": public.hex(), "signature": signature.hex()}
    offers = _exchange(control, mine)
    mine = {}
    if leader is not None:
        with _refusing(mine):
            leader.session.agree({
                name: (bytes.fromhex(said["public"]), bytes.fromhex(said["signature"]))
                for name, said in offers.items()})
    _exchange(control, mine)


def _exchange(control: ControlPlane, mine: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """All ranks: what the leader of each site says. KeysRefused if one of them refuses."""
    assert control.membership is not None
    everyone: list[dict[str, str]] = control.share(control.gather(mine))
    said = {name: everyone[rank] for name, rank in control.membership.leaders.items()}
    for name, words in said.items():
        if "refused" in words:
            raise KeysRefused(f"--secure_sum: {name} refuses the keys: {words['refused']}")
    return said


@contextmanager
def _refusing(mine: dict[str, str]) -> Iterator[None]:
    """Put the reason into the message if this site refuses. It names sites and public keys."""
    try:
        yield
    except FedrunError as error:
        mine["refused"] = str(error)
    except (KeyError, TypeError, ValueError):
        mine["refused"] = "what the server passes on is no key"


def digest_of(vector: Tensor) -> str:
    """SHA-256 in hex of a vector's bytes."""
    # As bytes, since numpy has no bf16.
    raw = vector.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


def digest_of_text(clients: Iterable[tuple[np.ndarray, np.ndarray]]) -> str:
    """SHA-256 in hex of the sequences that a site's clients train on: for each client its indices
    and the sequences that they are of."""
    digest = hashlib.sha256()
    for shard, sequences in clients:
        digest.update(len(shard).to_bytes(8))
        for part in np.array_split(shard, max(1, len(shard) // 4096)):
            digest.update(np.ascontiguousarray(sequences[part]).data)
    return digest.hexdigest()


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()

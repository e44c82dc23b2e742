"""How the server and the sites prove to each other who they are, before anything of the run is
sent.

    hello        all -> server   a rank's site and 32 fresh random bytes, its nonce
    transcript   server -> all   what all have said, the run and the attempt, signed by the server
    proof        all -> server   the transcript with the own rank, signed by the site
    verdict      server -> all   who was refused

A signature over the transcript is over every rank's nonce, so that none of another start serves
here. Public keys are those in the file of the sites. Connections are not bound to the signatures:
who forwards all of them can still change what is sent later.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fedrun.common.errors import FedrunError, InputError
from fedrun.distributed.connect import named

if TYPE_CHECKING:
    from fedrun.secure.identity import Identity

VERSION = 1
_NONCE = re.compile(r"[0-9a-f]{64}")
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # sites name folders after it
_LONGEST_TEXT = 1000  # characters of what another rank says that are printed


class HandshakeFailed(FedrunError, RuntimeError):
    """Somebody could not prove who they are, or would not believe another; the same on all
    ranks."""

    on_all_ranks = True


class Messages(Protocol):
    """What is needed of a control plane, which knows the result."""

    rank: int
    world_size: int

    def share(self, message: Any = None) -> Any: ...

    def gather(self, message: Any) -> list[Any] | None: ...


@dataclass(frozen=True)
class Membership:
    """Who takes part in a run of several owners, as they have proved."""

    run: str
    """The run's ID."""
    sites: tuple[str, ...]
    """The site of each rank; "" for the server, rank 0."""
    names: tuple[str, ...] = ()
    """The sites in the order of their file; by default in that of their ranks."""

    def workers_of(self, site: str) -> tuple[int, ...]:
        """The ranks of a site, in order."""
        return tuple(rank for rank, owner in enumerate(self.sites) if owner == site)

    @property
    def leaders(self) -> dict[str, int]:
        """The first rank of each site, in the order of their file."""
        names = self.names or dict.fromkeys(filter(None, self.sites))
        return {name: self.workers_of(name)[0] for name in names}

    def host(self, rank: int, local_rank: int) -> str:
        """What the others call the machine of a rank: by its site's name, or NAME/3 for another
        machine of the site, whose first worker is the third of the site."""
        site = self.sites[rank]
        before = sum(worker < rank - local_rank for worker in self.workers_of(site))
        return f"{site or 'server'}{f'/{before + 1}' if before else ''}"


@dataclass(frozen=True)
class Proof:
    """Who this rank is, and what it knows of the others."""

    identity: Identity
    name: str
    """Of this rank's site; "" for the server."""
    sites: Mapping[str, bytes]
    """The sites' public keys, in the order of their file."""
    server: bytes
    """The server's public key."""
    run: str = ""
    """The run's ID; sites learn it from the server."""

    def __post_init__(self) -> None:
        """InputError if this rank has another key than the others expect."""
        if self.identity.public != (self.sites.get(self.name) if self.name else self.server):
            raise InputError(f"--site_dir: its key is not the one of {self.name or 'the server'} "
                             "in the file of the sites (--sites): `fedrun sites key` prints the "
                             "one, `fedrun sites show` the other")


def prove(control: Messages, proof: Proof, attempt: str) -> Membership:
    """All ranks: prove who they are, and see who the others are. Nothing else was sent before.

    attempt: a name of this start, the same on all ranks. Raises HandshakeFailed, naming who was
    refused, or who refuses whom.
    """
    nonce, wrong, signed, signature = os.urandom(32).hex(), "", b"", b""
    hellos = control.gather({"site": proof.name, "nonce": nonce})
    transcript = control.share(hellos and _transcript(hellos, proof, attempt))
    try:
        signed = _checked(transcript, control, proof, attempt, nonce)
        signature = proof.identity.sign("proof", signed, str(control.rank))
    except FedrunError as error:
        wrong = str(error)
    answers = control.gather({"refuses": wrong, "signature": signature.hex()})
    verdict = control.share(None if answers is None else _refused(
        answers, transcript["members"], signed, proof))
    if wrong or verdict != "":  # whoever has found something wrong believes no verdict
        raise HandshakeFailed(f"the handshake failed: {_printable(verdict) or wrong}")
    return Membership(transcript["run"], tuple(site for _, site, _ in transcript["members"]),
                      tuple(proof.sites))


def _transcript(hellos: Sequence[Any], proof: Proof, attempt: str) -> dict[str, Any]:
    """Server: what all ranks have said, signed. What is wrong with it is found by all of them."""
    said = [hello if isinstance(hello, dict) else {} for hello in hellos]
    made = {"version": VERSION, "run": proof.run, "attempt": attempt, "sites": _pinned(proof),
            "members": [[rank, _printable(hello.get("site")), _printable(hello.get("nonce"))]
                        for rank, hello in enumerate(said)]}
    return made | {"signature": proof.identity.sign("transcript", _signed(made, proof)).hex()}


def _pinned(proof: Proof) -> list[list[str]]:
    return [[name, key.hex()] for name, key in proof.sites.items()]


def _signed(transcript: Mapping[str, Any], proof: Proof) -> bytes:
    """What a transcript and this rank's file of the sites say, as the bytes that are signed."""
    from fedrun.secure.identity import frame
    return frame(f"handshake {VERSION}", transcript["run"], transcript["attempt"],
                 frame(proof.server, *proof.sites.keys(), *proof.sites.values()),
                 *(frame(str(rank), site, nonce) for rank, site, nonce in transcript["members"]))


def _checked(transcript: Any, control: Messages, proof: Proof, attempt: str, nonce: str) -> bytes:
    """What this rank signs. A FedrunError says what is wrong with the transcript."""
    from fedrun.secure.identity import verify
    said = transcript if isinstance(transcript, dict) else {}
    _require(said.get("version") == VERSION, "the server speaks another version of the handshake "
             f"than {VERSION}: the same fedrun everywhere")
    _require(said.get("sites") == _pinned(proof), "the server has other sites or keys in its file "
             "of the sites (--sites), or another order: compare `fedrun sites show`")
    members: Any = said.get("members")
    _require(isinstance(members, list) and all(
        isinstance(member, list) and [type(value) for value in member] == [int, str, str]
        for member in members), "the server sends no list of the members")
    _require_all(members, control.world_size, proof.sites)
    _require(members[control.rank] == [control.rank, proof.name, nonce],
             f"{_who(control.rank, proof.name)} stands in the server's transcript with another "
             "name or nonce than its own")
    run = said.get("run")
    _require(isinstance(run, str) and _RUN.fullmatch(run) and said.get("attempt") == attempt,
             "the server's transcript is of another start")
    signed = _signed(said, proof)
    verify("the server", proof.server, _bytes(said.get("signature")), "transcript", signed)
    return signed


def _require_all(members: Sequence[tuple[int, str, str]], count: int, sites: Mapping[str, bytes]
                 ) -> None:
    """HandshakeFailed unless these, (rank, site, nonce), are the server and all sites, with nobody
    else."""
    found = [f"{_who(rank, site)} is not in the file of the sites (--sites)"
             for rank, site, _ in members if site and site not in sites]
    found += [f"rank {rank} belongs to no site" for rank, site, _ in members[1:] if not site]
    found += [f"{_who(0, site)} belongs to a site: rank 0 must be the server"
              for _, site, _ in members[:1] if site]
    found += [f"{name}: no rank of this site is here" for name in sites
              if name not in [site for _, site, _ in members]]
    owners = dict[str, list[int]]()
    for rank, site, nonce in members:
        owners.setdefault(nonce, []).append(rank)
        if not _NONCE.fullmatch(nonce):
            found.append(f"{_who(rank, site)} has sent no nonce")
    found += [f"{named(ranks)}: a nonce that was used before" for ranks in owners.values()
              if len(ranks) > 1]
    if [rank for rank, _, _ in members] != list(range(count)):
        found.append(f"the server names {len(members)} members, and {count} are here")
    _require(not found, "; ".join(found))


def _refused(answers: Sequence[Any], members: Sequence[tuple[int, str, str]], signed: bytes,
             proof: Proof) -> str:
    """Server: who does not sign, or not with the key of its site; empty if all do."""
    from fedrun.secure import ForgedSignature
    from fedrun.secure.identity import verify
    found = dict[str, list[str]]()
    for (rank, site, _), answer in zip(members, answers, strict=True):
        said = answer if isinstance(answer, dict) else {}
        if refuses := _printable(said.get("refuses")):
            found.setdefault(refuses, []).append(_who(rank, site))
        elif signed and site:
            try:
                verify(_who(rank, site), proof.sites[site], _bytes(said.get("signature")), "proof",
                       signed, str(rank))
            except ForgedSignature as error:
                found[str(error)] = [_who(0, "")]
    return "; ".join(f"{text} (say{'s' if len(who) == 1 else ''} {', '.join(who)})"
                     for text, who in found.items())


def _require(condition: object, otherwise: str) -> None:
    if not condition:
        raise HandshakeFailed(otherwise)


def _who(rank: int, site: str) -> str:
    return f"{_printable(site)} (rank {rank})" if site else f"rank {rank}"


def _printable(text: object) -> str:
    """What another rank says, as a part of a line for a terminal."""
    return "".join(filter(str.isprintable, str(text or "")))[:_LONGEST_TEXT]


def _bytes(text: object) -> bytes:
    """Bytes from hexadecimal digits; none from anything else."""
    try:
        return bytes.fromhex(str(text))
    except ValueError:
        return b""

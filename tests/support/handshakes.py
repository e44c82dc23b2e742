"""Handshakes of real ranks, each of which one of them, or who forwards its messages, spoils.

Started as a program on COUNT ranks: python -m tests.support.handshakes. Rank 0 prints what each
rank got, as JSON: its membership, or the line that it ends with.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from fedrun.distributed.control_plane import ControlPlane
from fedrun.distributed.handshake import HandshakeFailed, Proof, prove
from fedrun.secure.identity import Identity

COUNT = 5
NAMES = ("", "north", "south", "east", "north")
"""Of the ranks where nothing else is said."""
RUN, ATTEMPT = "0f" * 16, "attempt0.0"


def identity_of(name: str) -> Identity:
    return Identity(hashlib.sha256(f"{name}'s key".encode()).digest())


SITES = {name: identity_of(name).public for name in ("north", "south", "east")}


class Stranger(Proof):
    """Of one who runs a program of their own, which does not look at the file of the sites
    first."""

    def __post_init__(self) -> None:
        pass


def honest(rank: int) -> Proof:
    name = NAMES[rank]
    return Proof(identity_of(name), name, SITES, identity_of("").public, "" if rank else RUN)


def stranger(name: str, key: str, rank: int = 1) -> Proof:
    return Stranger(identity_of(key), name, SITES, identity_of("").public, "" if rank else RUN)


class Relay:
    """Between one rank and the others."""

    def __init__(self, control: ControlPlane, case: Case) -> None:
        self.control, self.case, self.rank = control, case, control.rank
        self.world_size = control.world_size
        self.received, self.sent = list[Any](), list[Any]()

    def share(self, message: Any = None) -> Any:
        message = json.loads(json.dumps(self.control.share(message)))
        change = self.case.received.get(self.rank, {}).get(len(self.received), _same)
        self.received.append(change(message))
        return self.received[-1]

    def gather(self, message: Any) -> list[Any] | None:
        change = self.case.sent.get(self.rank, {}).get(len(self.sent), _same)
        self.sent.append(message)
        return self.control.gather(change(json.loads(json.dumps(message))))


def _same(message: Any) -> Any:
    return message


Changes = Mapping[int, Mapping[int, Callable[[Any], Any]]]
"""By rank, and then by the number of the message."""
HELLO = TRANSCRIPT = 0
PROOF = VERDICT = 1


@dataclass(frozen=True)
class Case:
    """expected: a part of what all ranks end with; empty if all are accepted."""

    expected: str
    proofs: Mapping[int, Proof] = field(default_factory=dict)
    received: Changes = field(default_factory=dict)
    sent: Changes = field(default_factory=dict)
    nonces: Mapping[int, bytes] = field(default_factory=dict)
    attempts: Mapping[int, str] = field(default_factory=dict)


def put(*path: int | str, value: Any) -> Callable[[Any], Any]:
    """A change: another value at a place of a message."""
    def change(message: Any) -> Any:
        place = message
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        return message
    return change


def add_member(message: Any) -> Any:
    message["members"].append([COUNT, "south", "00" * 32])
    return message


def change_bit(message: Any) -> Any:
    """Of the signature."""
    first = int(message["signature"][0], 16)
    return message | {"signature": f"{first ^ 1:x}{message['signature'][1:]}"}


def at(rank: int, number: int, change: Callable[[Any], Any]) -> Changes:
    return {rank: {number: change}}


def in_transcript(*path: int | str, value: Any, rank: int = 2) -> Changes:
    return at(rank, TRANSCRIPT, put(*path, value=value))


def not_signed(owner: str, what: str, key: str) -> str:
    from fedrun.secure.identity import public_text
    return (f"{owner}: its {what} is not signed by {public_text(identity_of(key).public)}, or not "
            "for this start")


SOUTH, SERVER = not_signed("south (rank 2)", "proof", "south"), not_signed(
    "the server", "transcript", "")
NOT_ITS_OWN = "stands in the server's transcript with another name or nonce than its own"
WITHHELD = "a verdict that is withheld"
OTHER_START = "the server's transcript is of another start"
OTHER_FILE = ("the server has other sites or keys in its file of the sites (--sites), or another "
              "order: compare `fedrun sites show` (")
NOTHING = "the server sends no list of the members"
PATH = Proof(identity_of(""), "", SITES, identity_of("").public, "../../run")


def cases(before: Mapping[str, Any]) -> dict[str, Case]:
    """before: the transcript and this rank's proof of an earlier handshake, if there was one."""
    def old(what: str) -> Callable[[Any], Any]:
        return lambda message: before.get(what, message)

    return {
        "accepted": Case(""),
        # Somebody who is not who they say.
        "forged": Case(SOUTH, {2: stranger("south", "mallory")}),
        "signed by another site": Case(SOUTH, {2: stranger("south", "east")}),
        "no signature": Case(SOUTH, sent=at(2, PROOF, put("signature", value=""))),
        "a signature of numbers": Case(SOUTH, sent=at(2, PROOF, put("signature", value=[7]))),
        "a changed signature": Case(SOUTH, sent=at(2, PROOF, change_bit)),
        "no proof": Case(SOUTH, sent=at(2, PROOF, lambda _: None)),
        "wrong server": Case(SERVER, {0: stranger("", "mallory", 0)}),
        "a server with a site's key": Case(SERVER, {0: stranger("", "north", 0)}),
        # Who is there.
        "unknown site": Case("mars (rank 4) is not in the file of the sites",
                             {4: stranger("mars", "mars")}),
        "missing site": Case("east: no rank of this site is here", {3: honest(2)}),
        "a member too many": Case("rank 4 belongs to no site", {4: stranger("", "mars")}),
        "a second server": Case("rank 4 belongs to no site", {4: stranger("", "")}),
        "a server of a site": Case("north (rank 0) belongs to a site: rank 0 must be the server",
                                   {0: stranger("north", "north", 0)}),
        "a member of another site": Case(not_signed("east (rank 4)", "proof", "east"),
                                         {4: stranger("east", "north")}),
        # Nonces and signatures of another start.
        "one nonce twice": Case("ranks 1, 3: a nonce that was used before",
                                nonces={1: b"7" * 32, 3: b"7" * 32}),
        "a nonce replayed": Case("ranks 0, 3: a nonce that was used before",
                                 nonces={0: b"7" * 32, 3: b"7" * 32}),
        "no nonce": Case("east (rank 3) has sent no nonce", sent=at(3, HELLO, put(
            "nonce", value="00"))),
        "an old transcript": Case(f"south (rank 2) {NOT_ITS_OWN}",
                                  received=at(2, TRANSCRIPT, old("transcript"))),
        "an old proof": Case(SOUTH, sent=at(2, PROOF, old("proof"))),
        "another attempt": Case(OTHER_START, attempts={2: "attempt1.0"}),
        # One who forwards messages, and changes them.
        "another run": Case(SERVER, received=in_transcript("run", value="f0" * 16)),
        "another run for all": Case(SERVER, received={
            rank: {TRANSCRIPT: put("run", value="f0" * 16)} for rank in range(1, COUNT)}),
        "a run that is a path": Case(OTHER_START, {0: PATH}),
        "a run that is a number": Case(OTHER_START, received=in_transcript("run", value=7)),
        "another member": Case(SERVER, received=in_transcript("members", 4, 1, value="east")),
        "another nonce": Case(SERVER, received=in_transcript("members", 4, 2, value="ab" * 32)),
        "one's own nonce": Case(f"south (rank 2) {NOT_ITS_OWN}",
                                received=in_transcript("members", 2, 2, value="ab" * 32)),
        "one's own site": Case(f"north (rank 4) {NOT_ITS_OWN}", received=in_transcript(
            "members", 4, 1, value="south", rank=4)),
        "a hello that is changed": Case(f"south (rank 2) {NOT_ITS_OWN}", sent=at(2, HELLO, put(
            "nonce", value="ab" * 32))),
        "one more member": Case("the server names 6 members, and 5 are here",
                                received=at(2, TRANSCRIPT, add_member)),
        "other sites": Case(OTHER_FILE, received=in_transcript("sites", 0, 1, value="ab" * 32)),
        "other order": Case(OTHER_FILE, {3: replace(honest(3), sites=dict(reversed(
            SITES.items())))}),
        "another version": Case("another version of the handshake", received=in_transcript(
            "version", value=2)),
        WITHHELD: Case(SERVER, received={2: {
            TRANSCRIPT: put("run", value="f0" * 16), VERDICT: lambda _: ""}}),
        # What is no message of ours.
        "no transcript": Case("another version", received=at(2, TRANSCRIPT, lambda _: [])),
        "no members": Case(NOTHING, received=in_transcript("members", value={"a": 1})),
        "members of other types": Case(NOTHING, received=in_transcript("members", 1, value=[
            1, ["north"], {}])),
        "no hello": Case("rank 3 belongs to no site", sent=at(3, HELLO, lambda _: "hello")),
        "a name for a terminal": Case("[2Jmars\ufffd (rank 4) is not in the file", {4: stranger(
            "\x1b[2Jmars\u202e\n\ufffd", "mars")}),
    }


def attempt(case: Case, control: ControlPlane) -> tuple[Any, Relay]:
    """One rank's part in a handshake: what it ends with, and what it has received and sent."""
    rank, relay = control.rank, Relay(control, case)
    nonce = case.nonces.get(rank)
    urandom = os.urandom if nonce is None else (lambda _: nonce)
    try:
        with patch.object(os, "urandom", urandom):
            found = prove(relay, case.proofs.get(rank, honest(rank)),
                          case.attempts.get(rank, ATTEMPT))
    except HandshakeFailed as error:
        return str(error), relay
    return [found.run, found.sites, found.leaders], relay


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    control = ControlPlane(dist.new_group(), timeout=timedelta(seconds=60))
    _, first = attempt(Case(""), control)
    before = {"transcript": first.received[0], "proof": first.sent[1]}
    results = {name: control.gather(attempt(case, control)[0])
               for name, case in cases(before).items()}
    control.share()
    dist.destroy_process_group()
    if control.rank == 0:
        sys.stdout.write(f"results {json.dumps(results)}\n")


if __name__ == "__main__":
    main()

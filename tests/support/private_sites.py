"""Runs with --dp between sites of their own, and what is the same for clients and for sequences."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.real_sites import NAMES, Institutions, Ranks
from tests.support.runs import FAULTY, Outcome, assert_equal, error_lines, without_clocks
from tests.support.windows import Pieces, windows

FAULTS = "tests.support.site_faults"
KILLS = [("kill", "reduced:2", FAULTY, 2), ("kill", "record:2", FAULTY, 0),
         ("unpaid", "2", FAULTS, 3)]
"""A fault, when it strikes, the module that has it, and at which rank; in the last case the others
have charged a round that the one which is killed has not."""
REFUSALS = {
    "full": ("the noise cannot be drawn, or what it costs not be written down",
             "No space left on device"),
    "spent": ("it would cost more than --max_epsilon",
              "round 2: it would cost more than --max_epsilon")}
"""By the fault: what the server says of a site, and what its own log does."""


@contextmanager
def three_institutions() -> Iterator[Institutions]:
    """In a folder that other users can reach, which those of pytest are not."""
    with tempfile.TemporaryDirectory(prefix="fedrun-sites-") as folder:
        yield Institutions(Path(folder))


def open_folder(institutions: Institutions, name: str) -> Path:
    """One that everybody may write."""
    made = institutions.root / name
    made.mkdir()
    made.chmod(0o777)
    return made


def logs(institutions: Institutions) -> dict[str, bytes]:
    """What each site has written down of its noise."""
    return {site: (institutions.root / site / "site" / "privacy.log").read_bytes()
            for site in NAMES}


def recorded(institutions: Institutions, flags: Sequence[object]) -> Ranks:
    """A run whose ranks record what they send, and what they must not."""
    env = {"RECORD": str(open_folder(institutions, "messages")),
           "SECRETS": str(open_folder(institutions, "secrets"))}
    run = institutions.train(*flags, name="undisturbed", limit=300,
                             module="tests.support.recorded_shares",
                             env=dict.fromkeys(("server", *NAMES), env))
    assert run.server.code == 0, "\n".join(run.printed)
    return run


def require_nothing_sent(institutions: Institutions) -> None:
    """Of what the ranks of a `recorded` run must not send, nor the server keep."""
    sent = {path.name: path.read_bytes() for path in (institutions.root / "messages").iterdir()}
    kept = [path.read_bytes() for path in (institutions.root / "server").rglob("*")
            if path.is_file() and path.name != "identity.pem"]
    for rank, site in enumerate(NAMES, 1):
        secrets = (institutions.root / "secrets" / f"rank{rank}").read_bytes()
        pieces = {piece for piece in windows(secrets, 32, 32) if len(set(piece)) > 16}
        assert len(pieces) > 1000
        searched = [Pieces(wanted) for wanted in (pieces, *institutions.private_pieces(site))]
        key = (institutions.root / site / "site" / "noise.key").read_bytes().strip()
        for content in (*sent.values(), *kept):
            for wanted in searched:
                assert not wanted.found(content)
            assert key not in content
        # The same search finds what is there.
        assert searched[0].found(secrets[1_000_001:1_100_000])


def require_repeated(institutions: Institutions, undisturbed: Ranks, flags: Sequence[object],
                     kind: str, at: str, module: str, rank: int) -> None:
    """A run that is killed, with new logs beside the same keys, ends in the same bits and logs."""
    before = logs(institutions)
    for site in NAMES:
        (institutions.root / site / "site" / "privacy.log").unlink()
    name = f"{kind}_{at.replace(':', '_')}"
    fault = {"FAULT": kind, "FAULT_AT": at, "FAULT_RANK": str(rank), "FAULT_ROUND": at,
             "FAULT_ONCE": str(open_folder(institutions, name) / "once")}
    struck = ("server", *NAMES)[rank]
    env = {struck: fault} if module == FAULTS else dict.fromkeys(("server", *NAMES), fault)
    killed = institutions.train(*flags, name=name, module=module, env=env, limit=300)
    assert killed.server.code != 0
    again = institutions.train(*flags, name=name, limit=300)
    assert again.server.code == 0, "\n".join([*killed.printed, *again.printed])
    assert_equal(again.server, undisturbed.server)
    assert logs(institutions) == before


def require_refused(institutions: Institutions, kind: str, *flags: object) -> None:
    """The second round of a run ends for all, because south refuses it; why, its own log says
    alone."""
    run = institutions.train(*flags, name=kind, module=FAULTS, limit=300, env={
        "south": {"FAULT": kind, "FAULT_ROUND": "2"}})
    assert run.server.code == 1, "\n".join(run.printed)
    (line,) = error_lines(run.printed[0])
    said, own = REFUSALS[kind]
    assert line.endswith(f"round 2: site south: {said} (its own log says more)")
    assert own in run.printed[2]
    assert own not in run.printed[0] + run.printed[1] + run.printed[3]


def simulated(institutions: Institutions, flags: Sequence[object]) -> Outcome:
    """A simulation of the sites: it has the same bits in 1, 3 and 5 processes, and one log, which
    says so once."""
    flags = (*flags, "--dp_dir", institutions.root / "keys")
    alone = institutions.simulate(*flags, name="alone")
    assert alone.code == 0, alone.output
    log = institutions.root / "keys" / "privacy.log"
    before = log.read_bytes()
    assert before.count(b"\n") == 3
    for processes in (3, 5):
        other = institutions.simulate(*flags, name=f"of_{processes}", processes=processes)
        assert other.code == 0, other.output
        assert other.bits == alone.bits
        assert without_clocks(other) == without_clocks(alone)
        assert log.read_bytes() == before
    return alone

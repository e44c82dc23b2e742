"""The journal of a site: which sums it took part in, so that none is repeated with other terms.

The same sum over two sets of clients shows, by subtraction, the terms of those in only one of them.
So each is on disk before anything of it is sent, and refused with other terms: in the same round
of a run, and in any run where this site's clients start from the same.
"""

from pathlib import Path
from typing import Any, NamedTuple

from fedrun.secure import RoundChanged
from fedrun.secure.chain import Chain


class Sum(NamedTuple):
    """One of a round's sums, as this site knows it."""

    run: str
    round: int
    sum: str
    start: str  # digest of what this site's clients start from: model, text, seed, steps made
    terms: str  # who takes part: the sites, and a digest of the cohort and its weights

    def names(self) -> list[tuple[str, ...]]:
        return [(self.sum, self.run, str(self.round)), (self.sum, self.start)]


class Journal(Chain[Sum]):
    """The file of all sums."""

    purpose = b"journal"

    def __init__(self, path: Path) -> None:
        self._known: dict[tuple[str, ...], Sum] = {}
        super().__init__(path)

    def parse(self, values: list[Any]) -> Sum:
        return Sum(*values)

    def keep(self, entry: Sum) -> None:
        self._known |= dict.fromkeys(entry.names(), entry)

    def record(self, entry: Sum) -> None:
        """On return the sum is on the disk, and may be sent. RoundChanged or DamagedFile if it must
        not be; OSError if the disk fails; Busy after a minute if another process does not end."""
        with self.up_to_date():
            known = [self._known.get(key) for key in entry.names()]
            if others := [one for one in known if one and one.terms != entry.terms]:
                raise RoundChanged(f"{entry.sum} of round {entry.round}, run {entry.run}: made of "
                                   f"other terms in round {others[0].round}, run {others[0].run}")
            self.append(*([] if all(known) else [entry]))

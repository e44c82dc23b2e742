"""The log of what was released under differential privacy, beside the key of its noise.

A release that is not in it is not made, and one that is in it is not charged again: the same run,
round and binding have the same noise, so that a run that was killed shows nothing new when it
repeats a round. Anything that is changed has another noise, and is charged.

A log that loses its end while it is in use is refused, and so are lines that were changed. That the
whole file was replaced by an older copy of itself, between two runs, nothing can show but a run
that is taken up and finds rounds missing.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fedrun.secure import RoundChanged
from fedrun.secure.chain import Chain

LOG = "privacy.log"  # beside the key
SEQUENCE = "sequence"  # the unit of releases that have rates


class Release(NamedTuple):
    """What others see with noise. Of the unit "client" a sum: one Gaussian mechanism for each
    client of the cohort. Of the unit "sequence" the steps of each of them, every one a Gaussian
    mechanism on a Poisson sample of its sequences."""

    run: str
    round: int
    binding: str  # `noise_name` of the round's key, which all that decides the sum goes into
    data: str  # commitment to the clients' text
    unit: str  # that is protected
    cohort: tuple[int, ...]
    multiplier: float  # standard deviation of the noise over the sensitivity
    rates: tuple[float, ...] = ()  # probability of a sequence to be in a step, for each client
    steps: int = 1  # of each client


class Ledger(Chain[Release]):
    """The file of all releases."""

    purpose = b"privacy log"
    remedy = "restore it; if the key in its folder was replaced, restore that one"

    def __init__(self, path: Path, key: str) -> None:
        """key: the name of the noise's key. Commitments of another could not be compared."""
        self._releases: dict[str, Release] = {}
        super().__init__(path, key)

    def parse(self, values: list[Any]) -> Release:
        found = Release(*values)
        found = found._replace(cohort=tuple(found.cohort), rates=tuple(found.rates))
        if not (all(isinstance(client, int) for client in found.cohort)
                and 0 < found.multiplier < math.inf
                and len(found.rates) == (len(found.cohort) if found.unit == SEQUENCE else 0)
                and all(0 < rate <= 1 for rate in found.rates)
                and isinstance(found.steps, int) and found.steps > 0):
            raise ValueError(f"{found}: is no release")
        return found

    def values(self, entry: Release) -> list[Any]:
        return self.line(entry)

    @staticmethod
    def line(entry: Release) -> list[Any]:
        """What a release's line has before its checksum."""
        # As before there were releases of sequences, so that older logs are read.
        return list(entry if entry.rates or entry.unit == SEQUENCE else entry[:-2])

    def keep(self, entry: Release) -> None:
        self._releases[entry.binding] = entry

    def record(self, release: Release) -> None:
        """On return the release is on the disk, once, and may be made. RoundChanged if its noise
        belongs to another one; DamagedFile; OSError if the disk fails; Busy after a minute if
        another process does not end."""
        release = self.parse(json.loads(json.dumps(self.values(release))))
        with self.up_to_date():
            known = self._releases.get(release.binding)
            if known and known != release:
                raise RoundChanged(f"round {release.round}, run {release.run}: has the noise of "
                                   f"another release, in round {known.round}, run {known.run}")
            self.append(*([] if known else [release]))

    def releases(self, *runs: str) -> list[Release]:
        """Those of these runs, in their order."""
        with self.up_to_date():
            return [release for release in self._releases.values() if release.run in runs]

    def releases_on(self, data: str, unit: str) -> list[Release]:
        """Those of all runs with this unit on the same text, dealt to clients alike."""
        with self.up_to_date():
            return [release for release in self._releases.values()
                    if (release.data, release.unit) == (data, unit)]

    def spent(self, run: str) -> dict[int, float]:
        """For each client that a release of this run had in its cohort: mu^2, the sum of
        1 / multiplier^2. Their composition is one Gaussian mechanism of multiplier 1 / mu."""
        return self._spent(lambda release: release.run == run)

    def spent_on(self, data: str, unit: str) -> dict[int, float]:
        """The same over all runs with this unit on the same text, dealt to clients alike."""
        return self._spent(lambda release: (release.data, release.unit) == (data, unit))

    def _spent(self, counts: Callable[[Release], bool]) -> dict[int, float]:
        spent: dict[int, float] = {}
        with self.up_to_date():
            for release in filter(counts, self._releases.values()):
                for client in release.cohort:
                    spent[client] = spent.get(client, 0.0) + release.multiplier**-2
        return spent

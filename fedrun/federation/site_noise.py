"""--dp between sites. With --dp client each adds a share of the noise to its own term, before its
mask. (With --dp example the gradients have their noise already: see sequence_noise.py.)

Nobody reads a term, so nobody has to be trusted with a sum: whatever some sites put together, the
shares of the others hide each client (see privacy/shares.py). Every site adds its share in every
round, also without a client in it, or with an update that is not finite. Its secret, and the log of
what its own clients have paid, lie in its folder, at either level.

A share is bound to the terms of all sites, by a sum of digests that only their owners can make and
that is masked itself. So if a round is repeated with anything changed anywhere, all draw afresh and
all are charged: the difference of two sums has as much noise as is paid for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fedrun.common.errors import naming
from fedrun.common.log import log
from fedrun.config import FederatedConfig
from fedrun.data.partition import Shards
from fedrun.data.sites import Sites
from fedrun.data.tokens import TokenData
from fedrun.distributed.data_plane import DataPlane
from fedrun.federation.messages import RoundPlan
from fedrun.federation.noise import WORDS, Noise, bytes_of, words_of
from fedrun.federation.noise_keeper import Keeper, Level, Standing, settings_of
from fedrun.federation.schedule import Schedule
from fedrun.federation.secure_sum import MasksRefused, SecureSum
from fedrun.federation.site_keys import RoundRefused, digest_of_text

TERMS, NOISED, NOISELESS = "terms", "noised", "noiseless"
"""The masked sums that come before the vector's: of digests, before a share is added, and how many
sites have their noise in the log; in place of the last, from a site that has not."""


class SiteKeeper(Keeper):
    """On the first worker of a site: the secret of its noise, and the log of what its own clients
    have paid, who are counted from 0 there: the same in any run on this text."""

    def __init__(self, config: FederatedConfig, level: Level, schedule: Schedule,
                 provenance: dict[str, Any], text: str, earlier: Sequence[str], done: int,
                 folder: Path, name: str) -> None:
        """folder, name: of the site. The others as in Keeper; text: of the site's clients."""
        assert schedule.sites is not None
        self._own = schedule.sites.clients_of(name)
        self.first = self._own.start
        super().__init__(config, level, settings_of(config, level.noise, schedule.rounds),
                         provenance, text, earlier, done, folder, schedule.sites)
        log(f"privacy: all runs on this text have cost a {level.unit} of {name} epsilon "
            f"{self.standing.on_text:.3g} so far at delta {config.dp_delta:g}, by the log in "
            f"{folder}")
        self.standing = replace(self.standing, on_text=0.0, releases=[
            (number, ([self.first + client for client in cohort], noise, rates, steps))
            for number, (cohort, noise, rates, steps) in self.standing.releases])

    def paying(self, plan: RoundPlan) -> list[int]:
        """See Keeper."""
        return [k for k in plan.cohort if k in self._own]

    def tag(self, plan: RoundPlan, terms: Sequence[int]) -> bytes:
        """What stands for this site's terms in a round, 32 bytes: who has not its secret learns
        from it that they are the same as before, if they are, and nothing else."""
        return bytes.fromhex(self._key.commitment("terms", self.run, str(plan.round),
                                                  bytes_of(terms)))


def site_keeper_of(config: FederatedConfig, level: Level, schedule: Schedule, shards: Shards,
                   data: TokenData, provenance: dict[str, Any], earlier: Sequence[str], done: int,
                   folder: Path, name: str) -> SiteKeeper:
    """That of the site with this name and folder."""
    assert schedule.sites is not None
    text = digest_of_text((shards.train[k], shards.text_of(k, data))
                          for k in schedule.sites.clients_of(name))
    with naming("--site_dir", folder):
        return SiteKeeper(config, level, schedule, provenance, text, earlier, done, folder, name)


def together(standings: Sequence[Standing], schedule: Schedule) -> Standing:
    """What the logs of all sites say, for the server. With --dp client what any of them has is
    counted for all. One may lack the last release of others, if it was killed before it wrote that
    down."""
    if len(standings) == 1:
        return standings[0]
    if schedule.config.dp == "example":  # a site's clients pay for what it has made itself
        return Standing(
            list(dict.fromkeys(run for standing in standings for run in standing.runs)),
            [release for standing in standings for release in standing.releases],
            max(standing.on_text for standing in standings),
        all(standing.repeatable for standing in standings))
    most: Counter[tuple[int, float]] = Counter()
    for standing in standings:
        most |= Counter((number, noise) for number, (_, noise, *_) in standing.releases if number)
    runs = dict.fromkeys(run for standing in standings for run in standing.runs)
    return Standing(
        list(runs), [release for standing in standings for release in standing.releases
                     if not release[0]]
        + [(number, (schedule.cohort(number), noise, [], 1))
           for number, noise in sorted(most.elements())],
        max(standing.on_text for standing in standings),
        all(standing.repeatable for standing in standings))


class SimulatedShares(Noise):
    """In a simulation of sites: the shares of all of them, drawn by the owner of all text."""

    def __init__(self, level: Level, plane: DataPlane, keeper: Keeper | None, sites: Sites
                 ) -> None:
        super().__init__(level, plane, keeper)
        self._names = sites.names

    def _keys(self, plan: RoundPlan, model: Tensor) -> list[bytes]:
        from fedrun.secure.noise import share_key

        key, = super()._keys(plan, model)
        return [share_key(key, name) for name in self._names]


class SiteNoise(Noise):
    """A worker's part at a site of its own."""

    def __init__(self, level: Level, plane: DataPlane, keeper: SiteKeeper | None,
                 secure: SecureSum) -> None:
        """keeper: on the first worker of the site. secure: this worker's, with its masks."""
        super().__init__(level, plane, keeper)
        self._site, self._secure = keeper, secure

    def _keys(self, plan: RoundPlan, model: Tensor) -> list[bytes]:
        """Workers: the key of this site's share. RoundRefused on all workers of all sites, after
        the same collectives, if a site has no share."""
        plane, secure, site = self._plane, self._secure, self._site
        terms, self._terms = plane.sum_in_site(signed(self._terms)), [0] * WORDS
        own = [0] * WORDS if site is None else words_of(site.tag(plan, terms))
        key, refused = self._released(plan, model, plane.sum_words(own, secure.mask(TERMS, 64)))
        require_noise_of_all(plane, secure.sites, secure, refused)
        return [bytes_of(plane.sum_in_site(signed(words_of(key))))]


def require_noise_of_all(plane: DataPlane, sites: Sites, secure: SecureSum | None,
                         refused: RoundRefused | None) -> None:
    """Workers: go on where every site has its noise of a round, and has written down what it costs;
    RoundRefused on all of them if one has not. refused: why, on the first worker of one that has
    not. secure: this worker's, with --secure_sum."""
    # Under another mask nothing cancels: all see that one has no noise, and send no more.
    mask = None if secure is None else secure.mask(NOISELESS if refused else NOISED, 64)
    found, = plane.sum_words([int(plane.site_leader and refused is None)], mask)
    if refused is not None:
        raise refused
    if found != len(sites.sites):
        raise MasksRefused("a site has no noise, or the masks do not cancel")


def hiding_between_sites(level: Level, plane: DataPlane, keeper: Keeper | None, sites: Sites,
                         secure: SecureSum | None) -> Noise:
    """A worker's part of the noise: at a site of its own, or in a simulation of sites."""
    if not plane.of_site:
        return SimulatedShares(level, plane, keeper, sites)
    assert secure is not None
    assert keeper is None or isinstance(keeper, SiteKeeper)
    return SiteNoise(level, plane, keeper, secure)


def signed(words: Sequence[int]) -> list[int]:
    """Words of 64 bits, as integers from -2^63 to 2^63 - 1."""
    return [(word + (1 << 63)) % (1 << 64) - (1 << 63) for word in words]

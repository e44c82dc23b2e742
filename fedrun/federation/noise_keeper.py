"""--dp on the first worker, or that of each site: the secret that noise is made of, and the log of
what was released.

With all that decides a sum unchanged, as after a kill, the noise is the same and costs nothing;
with anything changed it is another, and is charged.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedrun import __version__
from fedrun.common.errors import InputError, naming
from fedrun.config import FederatedConfig
from fedrun.data.partition import Shards
from fedrun.data.sites import Sites
from fedrun.data.tokens import TokenData
from fedrun.federation.messages import RoundPlan
from fedrun.federation.schedule import Schedule
from fedrun.federation.site_keys import RoundRefused, digest_of_text
from fedrun.model.hardware import processor_name
from fedrun.privacy.client_level import ClientLevel
from fedrun.privacy.example_level import ExampleLevel
from fedrun.privacy.shares import SharedLevel
from fedrun.records.checkpoint import Checkpoint
from fedrun.records.provenance import INPUT_DIGESTS, LENGTH_SETTINGS

if TYPE_CHECKING:
    from fedrun.secure.ledger import Release

Level = ClientLevel | ExampleLevel
Charge = tuple[list[int], float, list[float], int]
"""What a release costs: its cohort, noise multiplier, and the rates and steps of its clients, as
`add` of what is spent takes them."""
RUNS = "privacy_runs"
"""Key of the server's state in a checkpoint: `Standing.runs`."""
UNBOUND = LENGTH_SETTINGS | INPUT_DIGESTS.keys() | {"dp_noise", "dp_epsilon", "secure_sum"}
"""Settings that decide no sum by themselves: the length, where inputs lie (the noise is bound to
what was read), how the noise multiplier was asked for (it is bound to the multiplier), masks."""
EXCEEDS = 1 + 1e-9  # times --max_epsilon: what --dp_epsilon leads to may be that in all but bits


class NoiseRefused(RoundRefused):
    """The noise cannot be drawn, or what it costs not be written down."""

    code = "noise"


class TooMuchSpent(RoundRefused):
    """The round would cost more than --max_epsilon."""

    code = "spent"


def settings_of(config: FederatedConfig, noise: float, rounds: int) -> str:
    """Digest of the settings that decide a round's sum. noise: the multiplier; rounds: of the run,
    which learning rates may depend on."""
    values = {name: value for name, value in config.results_dict().items() if name not in UNBOUND}
    return digest(values, noise, 0 if config.lr_schedule == "constant" else rounds)


@dataclass(frozen=True)
class Standing:
    """What the first worker's log says at the start of a run; sent to all ranks as JSON."""

    runs: list[str]
    """This run, and those that its model has come from: what they released counts."""
    releases: list[tuple[int, Charge]]
    """Of these runs: the round, 0 of other runs than this, and what it cost."""
    on_text: float
    """Epsilon of who has paid most, over all runs on this text."""
    repeatable: bool = True
    """Whether a round that is made again is likely to be the same sum, which costs nothing."""


class Keeper:
    """On the first worker: the secret of the noise, and the log of what was released."""

    def __init__(self, config: FederatedConfig, level: Level, settings: str,
                 provenance: dict[str, Any], text: str, earlier: Sequence[str] = (),
                 done: int = 0, folder: Path | None = None, sites: Sites | None = None) -> None:
        """settings: `settings_of` the run. provenance: what else decides its bits. text: digest of
        the clients' sequences. earlier: runs whose releases are in the model that this one starts
        from, which is that after the round `done`. folder: in place of --dp_dir. sites: who adds
        shares. InputError if others can read the secret, what draws it is not installed, or the log
        lacks one of these rounds."""
        try:
            from fedrun.secure.ledger import LOG, Ledger
            from fedrun.secure.noise import NoiseKey
        except ImportError:
            raise InputError(f"--dp {config.dp}: needs the package cryptography: pip install "
                             "'fedrun[secure]'") from None
        flag, folder = ("--site_dir", folder) if folder else ("--dp_dir", config.dp_folder)
        self._key = NoiseKey.open(folder)
        self._ledger = Ledger(folder / LOG, self._key.name)
        self.data = self._key.commitment(text)
        """What the log calls the clients' text."""
        made_with = [provenance.get(name) for name in (
            "init_from", "plugin", "versions", "kernels", "gpu")]
        self.run = digest(settings, made_with, self.data)[:16]
        """The same run wherever its folder lies: the same settings, first model, text and software,
        so that its rounds are likely to be the same sums, which cost nothing once more."""
        self.runs = tuple(dict.fromkeys([*earlier, self.run]))
        self._level, self._most = level, config.max_epsilon
        self._bound: dict[str, str | int] = {
            "settings": settings, "threads": config.threads, "data": self.data,
            "made with": digest(*made_with)}
        if sites is not None:
            self._bound["sites"] = sites.digest()
        self._repeatable = not provenance.get("gpu") or config.deterministic
        known = self._known()
        assert config.dp_delta is not None
        if missing := set(range(1, done + 1)) - {release.round for release in known}:
            raise InputError(f"{flag} {folder}: its log has no round {min(missing)} of this run, "
                             "so nobody knows what was spent: give the folder that the run began "
                             "with")
        self._delta = config.dp_delta
        self._counted = {release.binding for release in known}
        """What the server has heard of. Another process may add to the log, of this run too."""
        on_text = level.spent(self._delta)
        for release in self._ledger.releases_on(self.data, level.unit):
            on_text.add(*charge_of(release))
        self.standing = Standing(
            list(self.runs), [(release.round if release.run == self.run else 0,
                               charge_of(release)) for release in known], on_text.epsilon,
            self._repeatable)

    def _known(self) -> list[Release]:
        return [release for release in self._ledger.releases(*self.runs)
                if release.unit == self._level.unit]

    def secret(self) -> bytes:
        """The secret of a run with --dp example, 32 bytes, which the noise of its steps comes from:
        the same as long as nothing of what decides them has changed."""
        # Where the same step may come out differently its sample must not be the same, or two steps
        # on it would cost more than is charged.
        start = "" if self._repeatable else os.urandom(32).hex()
        return self._key.round_key(self._bound | {
            "run": self.run, "unit": self._level.unit, "start": start,
            "code": __version__, "processor": processor_name()})

    first = 0
    """The client of the run that the log calls 0."""

    def paying(self, plan: RoundPlan) -> list[int]:
        """The clients of a round that are in this log."""
        return plan.cohort

    def release(self, plan: RoundPlan, model: str, terms: Sequence[int]) -> tuple[bytes, bool]:
        """The key of a round's noise, and whether the server has to count it, which it has not if
        the log had it at the start; on return it is in the log.

        model: digest of the global model; terms: of all terms of the round. TooMuchSpent if it
        would cost too much.
        """
        from fedrun.secure.ledger import Release
        from fedrun.secure.noise import noise_name

        members = digest(plan.cohort, plan.weights, plan.bound)
        key = self._key.round_key(self._bound | {
            "run": self.run, "round": plan.round, "model": model, "members": members,
            "terms": digest(list(terms))})
        paying = self.paying(plan)
        entry = Release(self.run, plan.round, noise_name(key), self.data, self._level.unit,
                        tuple(k - self.first for k in paying), self._level.noise,
                        *self._level.sampled(paying))
        if entry.binding in self._counted:
            return key, False
        known = self._known()
        if self._most is not None and entry not in known:
            after = self._level.spent(self._delta)
            for release in (*known, entry):
                after.add(*charge_of(release))
            if after.over(self._most * EXCEEDS):
                raise TooMuchSpent(f"round {plan.round}: it would cost more than --max_epsilon "
                                   f"{self._most:g}")
        self._ledger.record(entry)
        self._counted.add(entry.binding)
        return key, True


def charge_of(release: Release) -> Charge:
    """What a release in the log has cost."""
    return list(release.cohort), release.multiplier, list(release.rates), release.steps


def level_of(config: FederatedConfig, schedule: Schedule, size: int) -> Level:
    """The mechanism of a run: of every round, or with --dp example of every local step. size: of
    the model. InputError if the grid is too coarse for it."""
    assert config.dp_clip is not None
    noise, sites = schedule.noise, schedule.sites
    level: Level
    if config.dp == "example":
        rates = tuple(config.batch_size / sequences for sequences in schedule.shard_sizes)
        level = ExampleLevel(config.dp_clip, noise, size, config.batch_size, config.local_updates,
                             rates)
    elif sites is not None:
        level = SharedLevel(config.dp_clip, noise, config.cohort_size, size, len(sites.sites),
                            config.dp_colluding)
    else:
        level = ClientLevel(config.dp_clip, noise, config.cohort_size, size)
    _ = level.variance
    return level


def keeper_of(config: FederatedConfig, level: Level, schedule: Schedule, shards: Shards,
              data: TokenData, provenance: dict[str, Any], checkpoint: Checkpoint | None) -> Keeper:
    """The first worker's, for a run that starts from this checkpoint."""
    text = digest_of_text((shards.train[k], shards.text_of(k, data))
                          for k in range(config.num_clients))
    earlier, done = ([], 0) if checkpoint is None else (
        checkpoint.server.get(RUNS, []), checkpoint.step)
    with naming("--dp_dir", config.dp_folder):
        return Keeper(config, level, settings_of(config, level.noise, schedule.rounds), provenance,
                      text, earlier, done, sites=schedule.sites)


def digest(*values: Any) -> str:
    """SHA-256 of values that JSON can hold, in hexadecimal."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

"""What --sites and --dp add to a planned run: words that are summed beside vectors, the files of
what was done, and what is known of the noise before the run."""

from __future__ import annotations

from collections.abc import Iterator

from fedrun.common.errors import InputError
from fedrun.config import FederatedConfig
from fedrun.data.sites import SiteEntry, Sites
from fedrun.federation.noise import WORDS
from fedrun.federation.noise_keeper import Level
from fedrun.federation.schedule import Schedule
from fedrun.federation.site_holdout import SiteLosses
from fedrun.federation.tail import Tail
from fedrun.tools.plan_ranks import Layout

WORD = 8  # bytes
DIGEST = 64 * "0"  # stands for one in hexadecimal
RUN = 32 * "0"  # stands for the id of a run of sites of their own
RUN_OF_NOISE = 16 * "0"  # stands for that in the log of what was spent


# ---- words that are summed -----------------------------------------------------------------------

def word_bytes(config: FederatedConfig, layout: Layout, sites: Sites | None, evaluated: bool
               ) -> int:
    """Bytes of the words that the first worker, or that of each site, sends in a round beside
    vectors. 0 for one worker alone."""
    if layout.sites:
        among_all, inside = _of_sites(config, layout.sites, evaluated)
        if layout.team == 1:
            return WORD * among_all
        # Summed inside the site, then over the sites, and handed out inside.
        return WORD * (3 * among_all + inside)
    if layout.workers == 1:
        return 0
    words = 2 * WORDS + 1 if config.private else 0
    if sites is not None and config.dp != "client":
        words += len(sites.sites) * config.secure_sum + len(Tail().words())
    if evaluated and config.site_holdout is not None:
        words += len(SiteLosses().words())
    return WORD * words


def _of_sites(config: FederatedConfig, sites: Sites, evaluated: bool) -> tuple[int, int]:
    """Words in sums over all sites, and those that only the workers of one sum."""
    among_all, inside = int(config.secure_sum), 0  # how many have a term
    if config.dp == "client":
        return among_all + WORDS + 1, 2 * WORDS  # digests of terms, who has noise; terms, the key
    inside += len(sites.sites) * config.secure_sum
    among_all += len(Tail().words())
    if config.dp == "example":
        among_all, inside = among_all + 1, inside + WORDS
    if evaluated and config.site_holdout is not None:
        among_all += len(SiteLosses().words())
    return among_all, inside


# ---- files ---------------------------------------------------------------------------------------

def journal_bytes(config: FederatedConfig, schedule: Schedule, site: SiteEntry, rounds: int) -> int:
    """Of a site's journal, after this many rounds of one run."""
    from fedrun.secure.chain import line_of
    from fedrun.secure.journal import Journal, Sum

    assert schedule.sites is not None
    terms = f"{', '.join(schedule.sites.names)}: {DIGEST}"
    return sum(len(line_of(Journal.purpose, list(Sum(RUN, number, "update", DIGEST, terms)), "")[0])
               for number in range(1, rounds + 1)) if config.secure_sum else 0


def log_bytes(schedule: Schedule, level: Level, rounds: int, site: SiteEntry | None) -> int:
    """Of the log of what was spent, after this many rounds of one run. site: whose log it is, where
    each has its own. InputError as the run would raise it."""
    try:
        from fedrun.secure.chain import line_of
        from fedrun.secure.ledger import Ledger, Release
    except ImportError:
        raise InputError(f"--dp {schedule.config.dp}: needs the package cryptography: pip install "
                         "'fedrun[secure]'") from None
    own = schedule.sites.clients_of(site.name) if schedule.sites and site else range(
        schedule.config.num_clients)
    total = 0
    for number in range(1, rounds + 1):
        paying = [client for client in schedule.cohort(number) if client in own]
        release = Release(RUN_OF_NOISE, number, DIGEST, DIGEST, level.unit,
                          tuple(client - own.start for client in paying), level.noise,
                          *level.sampled(paying))
        total += len(line_of(Ledger.purpose, Ledger.line(release), "")[0])
    return total


# ---- noise ---------------------------------------------------------------------------------------

def of_privacy(config: FederatedConfig, schedule: Schedule, level: Level, rounds: int | None,
               known: bool) -> Iterator[str]:
    """Lines on the noise and what it costs. rounds: None if that cannot be known; known: whether
    the noise is."""
    if not known:
        yield (f"--dp {config.dp}: how much noise --dp_epsilon {config.dp_epsilon:g} leads to is "
               "not known before the text is tokenised, nor is the size of its log")
        return
    line = f"--dp {config.dp}: noise multiplier {level.noise:.4g}"
    if rounds is not None:
        spent = level.spent(config.dp_delta or 0.0).after(
            level.noise, *(schedule.cohort(number) for number in range(1, rounds + 1)))
        line += (f"; epsilon {spent.epsilon:.3g} at delta {config.dp_delta:g} after {rounds:,} "
                 "rounds")
    yield line

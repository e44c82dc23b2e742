"""Which settings go with sites: their file says how text is dealt, and nothing of a single client
leaves a site. Does not import torch."""

from __future__ import annotations

from typing import Any

from fedrun.common.errors import require
from fedrun.data.sites import Sites
from fedrun.secure import FEWEST_SITES, FEWEST_STEPS, fewest_sites

DEALT_BY_SITES = ("partition", "alpha", "size_skew")  # settings that the file has, for each site


def check_sites(config: Any) -> None:
    """InputError, naming the flag, for settings of a federated run that do not go with --sites."""
    held = config.site_holdout
    require(held is None or 0 < held < 1, "--site_holdout", held, "in (0, 1), or none")
    require(held is None or config.secure_sum, "--site_holdout", held,
            "none without --sites FILE and --secure_sum, which hides what each site's part of the "
            "loss is")
    if config.sites is None:
        require(not config.secure_sum, "--secure_sum", "true", "false without --sites FILE")
        return
    for name in DEALT_BY_SITES:
        refuse_dealt(config, name, getattr(config, name) != getattr(type(config), name))
    require(not config.strategy.holdout_batches, "--sites", config.sites, f"none with "
            f"{config.method}, which weights each client by an entropy that would leave its site")
    for name in ("eval_clients", "save_client_deltas"):
        require(not getattr(config, name), f"--{name}", "true", f"false with --sites "
                f"{config.sites}: nothing of a single client's model leaves its site")
    require(not config.secure_sum or config.aggregation in ("exact", "int8"), "--aggregation",
            config.aggregation, "exact or int8 with --secure_sum, whose masks cancel in sums of "
            "integers alone")
    require(config.aggregation != "int4", "--aggregation", "int4", f"exact, float or int8 with "
            f"--sites {config.sites}, where the first worker of each site sends for all of its own")


def require_steps(config: Any, fewest: int) -> None:
    """InputError if some round of a federated run has too few local updates, `fewest`, for a sum to
    hide them, and no noise does. Runs that have been made so can still be read."""
    if not config.secure_sum or config.private or not config.strategy.trains:
        return
    why = (f"at least {FEWEST_STEPS} in each round with --secure_sum: a sum after one shows the "
           "signs of each client's gradient")
    require(config.local_updates >= FEWEST_STEPS, "--local_updates", config.local_updates, why)
    require(fewest >= FEWEST_STEPS, "--local_updates_schedule", config.local_updates_schedule,
            f"constant, or --local_updates more: {why}")


def refuse_dealt(config: Any, name: str, given: bool) -> None:
    """InputError for a setting of DEALT_BY_SITES that is given beside --sites."""
    require(not given, f"--{name}", getattr(config, name), f"left out beside --sites "
            f"{config.sites}, which says it for each site")


def require_fit(config: Any, sites: Sites) -> None:
    """InputError unless the settings of a federated run fit the file that its --sites names."""
    file, fewest = f"--sites {config.sites}", fewest_sites(config.strategy.reweighted)
    require(config.num_clients == sites.num_clients, "--num_clients", config.num_clients,
            f"left out beside {file}, whose sites have {sites.num_clients}")
    sums, others = "a sum", "each would learn the other's part"
    if config.strategy.reweighted:
        sums = f"the {config.strategy.reweighted} sums of {config.method} (--weiszfeld_steps)"
        others = "together they could show single updates"
    require(not config.secure_sum or len(sites.sites) >= fewest, "--secure_sum", "true", f"false "
            f"with the {len(sites.sites)} sites of {file}: at least {fewest} have to be in {sums}, "
            f"or {others}")
    require(not config.secure_sum or config.cohort_size >= fewest, "--cohort", config.cohort_size,
            f"at least {fewest} clients with --secure_sum, so that each round has some of {fewest} "
            "sites")
    if config.dp == "client":
        count = len(sites.sites)
        require(config.dp_colluding <= count - 2, "--dp_colluding", config.dp_colluding,
                f"at most {count - 2} with the {count} sites of {file}: at least one site must "
                "remain whose share of the noise nobody else knows")
    if config.private and min(len(sites.sites), config.cohort_size) >= FEWEST_SITES:
        _require_seats(config, sites, file)


def _require_seats(config: Any, sites: Sites, file: str) -> None:
    """InputError unless all clients can train equally often in rounds that have some of three
    sites."""
    rounds = config.num_clients // config.cohort_size
    # A site with enough clients is in each of the rounds in which all clients train once.
    seats = sum(min(site.clients, rounds) for site in sites.sites)
    require(seats >= FEWEST_SITES * rounds, "--cohort", config.cohort_size, f"more clients with "
            f"{file}: for {rounds} rounds with each client in one of them, and clients of "
            f"{FEWEST_SITES} sites in each, too few sites have enough clients")

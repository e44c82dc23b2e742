"""Sites with folders and keys, the file of them, and the config of a run with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedrun.config import FederatedConfig
from fedrun.data.sites import IDENTITY, SiteEntry, Sites, write_sites
from fedrun.federation.site_keys import Leader
from fedrun.flags import resolve
from fedrun.secure.identity import Identity, public_text
from tests.support.sites import NAMES

SITES = "sites.yaml"


def make_sites(folder: Path, *clients: int) -> Sites:
    """Sites with as many clients: each with a folder and a key in `folder`, and the file of them.
    """
    keys = {}
    for name in ("server", *NAMES[:len(clients)]):
        (folder / name).mkdir()
        keys[name] = public_text(Identity.create(folder / name / IDENTITY).public)
    sites = Sites("trial", keys["server"], tuple(
        SiteEntry(name, keys[name], clients=count)
        for name, count in zip(NAMES, clients, strict=False)))
    write_sites(folder / SITES, sites)
    return sites


def make_leaders(folder: Path, sites: Sites, run: str, seed: int = 0, text: str = "text"
                 ) -> dict[str, Leader]:
    """The leaders of all sites that `make_sites` made there, with the keys of a new start."""
    leaders = {name: Leader(name, Identity.load(folder / name / IDENTITY), folder / name, sites,
                            run, seed, text) for name in sites.names}
    nonces = {name: leader.session.nonce for name, leader in leaders.items()}
    offers = {name: leader.session.offer(run, nonces, b"plan") for name, leader in leaders.items()}
    for leader in leaders.values():
        leader.session.agree(offers)
    return leaders


def config_with(folder: Path, method: str = "fed_avg", flags: Mapping[str, str] | None = None
                ) -> FederatedConfig:
    """The config of a small run with secure sums over the sites that `make_sites` made there."""
    config = resolve(method, {
        "config": "tiny", "rounds": "3", "local_updates": "1" if method == "fed_sgd" else "2",
        "batch_size": "2", "sequence_length": "4", "lr": "2e-3",
        "val_freq": "2", "dtype": "fp32", "device": "cpu", "checkpoint_freq": "none",
        "data_dir": str(folder), "run_name": "run", "sites": str(folder / SITES),
        "secure_sum": "true", **(flags or {})})
    assert isinstance(config, FederatedConfig)
    return config

"""Small folders of runs between sites, as such runs leave them, made without training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from fedrun.config import FederatedConfig
from fedrun.data.sites import Sites
from fedrun.records.privacy import write_privacy
from fedrun.strategies.fed_avg import FedAvg
from tests.support.folders import ours, write
from tests.support.site_files import THREE, sites_of

NAMED = sites_of(THREE)
LEFT_OUT = {1: {"not finite": 1}, 30: {"not finite": 1, "exceeds its bound": 2}}
"""By the evaluated rounds before which clients were left out."""


def of_sites(data_dir: Path, secure: bool = True, holdout: bool = True, real: bool = True,
             sites: Sites = NAMED, **settings: Any) -> Path:
    """A run folder of sites whose text is a little easier than the server's. settings: as for
    `ours`.

    real: whether the sites had processes of their own, and not on the server's machine.
    """
    run = ours(data_dir, **{
        "num_clients": sites.num_clients, "sites": "sites.yaml", "secure_sum": secure,
        "site_holdout": 0.05 if holdout else None, **settings})
    config = cast(FederatedConfig, SimpleNamespace(run_dir=run, secure_sum=secure, dp="none",
                                                   private=False, client_clip=None,
                                                   strategy=FedAvg()))
    write_privacy(config, real, demonstration=False)
    environment = json.loads((run / "environment.json").read_text())
    write(run / "environment.json", environment | {
        "sites": sites.listed, "made_with": {"sites": sites.digest()[:16]}})
    history = [_record(record, holdout)
               for record in json.loads((run / "training_history.json").read_text())]
    write(run / "training_history.json", history)
    lines: list[dict[str, Any]] = [{"event": "start", "unit": "round", "total": 90}]
    for record in history:
        lines.append({
            "event": "round", "round": record["global_step"], "train_ppl": record["train_ppl"],
            "left_out": record["left_out"], "left_out_why": record["left_out_why"], "lr": 5e-4,
            "tokens": record["tokens"], "seconds": record["seconds"], "bytes": record["bytes"],
            "val_ppl": record["server_val_ppl"], "step_norm": 0.25, "update_cosine": 0.5,
            "effective_clients": 3.0} | ({"site_val_ppl": record["site_val_ppl"]} if holdout
                                         else {}))
    lines.append({"event": "end", "tokens": lines[-1]["tokens"], "seconds": lines[-1]["seconds"]})
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write(run / "outcome.json", {"outcome": "finished", "step": 90})
    return run


def _record(record: dict[str, Any], holdout: bool) -> dict[str, Any]:
    why = LEFT_OUT.get(record["global_step"], {})
    value = at_sites(record["server_val_ppl"])
    held = {"site_val_loss": math.log(value), "site_val_ppl": value, "site_val_tokens": 4000}
    return record | {"effective_clients": 3.0, "step_norm": 0.25, "update_cosine": 0.5,
                     "left_out": sum(why.values()), "left_out_why": why} | (
                         held if holdout else {})


def at_sites(validation: Any) -> Any:
    """The perplexity on what the sites hold out where that on the validation text is this."""
    return 0.9 * validation

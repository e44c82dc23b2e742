"""The names under which a run's files hold its evaluations. Federated and central runs differ in
them, and readers of run folders take both. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal


@dataclass(frozen=True)
class Schema:
    """The names of one kind of run."""

    unit: Literal["round", "step"]
    """What events.jsonl counts: the kind of a line, and the key of its number."""
    step: str
    """The key of the same number in a record of training_history.json."""
    val_loss: str
    """Key of a record: the validation loss in nats per token."""
    val_ppl: str
    """Key of a record: exp(validation loss)."""
    snapshots: str
    """The parent of params/ and deltas/, relative to the run's folder."""


FEDERATED = Schema("round", "global_step", "server_val_loss", "server_val_ppl", "server")
CENTRAL = Schema("step", "step", "val_loss", "val_ppl", ".")

SITE_VAL_PPL: Final = "site_val_ppl"
"""Key of a record, and of an event, of a run with --site_holdout: the perplexity over all sites on
what they hold out."""
CLIENTS_LOSS: Final = "client_mean_loss"
"""Key of a record of a run with --personal and --eval_clients, whose global model is that of no
client: the mean loss of the round's clients' own models, on the text that each holds out, or
without --client_holdout on the validation split. --keep best looks at it."""
CLIENTS_VAL_LOSS: Final = "client_val_loss"
"""The same, always on the validation split."""
CLIENTS_HALVES: Final = "client_val_loss_halves"
"""That as two losses, on the split's halves. Studies look at them."""
HELD_OUT = "held out by the sites"
"""What readers call it."""


def read_field(record: Mapping[str, Any], field: Literal["step", "val_loss", "val_ppl"]) -> Any:
    """The value of a field in a history record of either schema; None if the record has none."""
    federated, central = getattr(FEDERATED, field), getattr(CENTRAL, field)
    return record.get(federated, record.get(central))

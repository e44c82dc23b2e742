"""A client's own model of a run with --personal: the global one with the client's parameters in it.

Both are those of the run's newest checkpoint, so that they belong together.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fedrun.common.errors import InputError, require

if TYPE_CHECKING:
    from fedrun.model.pretrained import Pretrained


def of_client(found: Pretrained, client: int | None) -> Pretrained:
    """The model of one of a run's clients, counted from 0; `found` itself for None.

    Raises InputError if the run has no such client, none of its clients has parameters of its own,
    or they are not here: real sites keep them, and a run without checkpoints has them no longer.
    """
    if client is None:
        return found
    settings, folder = found.settings, found.folder
    personal = settings.get("personal")
    if not isinstance(personal, str):
        raise InputError(f"--client {client}: must be left out for {folder}, whose clients have no "
                         "parameters of their own (--personal)")
    count = settings.get("num_clients")
    require(type(count) is int and 0 <= client < count, "--client", client,
            f"a client of {folder}: from 0, below its {count} clients")
    from fedrun.records.checkpoint import GLOBAL, client_file, latest_valid
    from fedrun.training.params import FlatParams
    try:
        checkpoint = latest_valid(folder)
    except InputError:  # which says how to train further
        checkpoint = None
    if checkpoint is None:
        raise InputError(f"--client {client}: {folder} has no valid checkpoint, where clients' own "
                         "parameters are")
    if client_file(client) not in checkpoint.checksums:
        raise InputError(f"--client {client}: the own parameters of a site's clients are at the "
                         "site")
    model = found.build()
    flat = FlatParams(model, personal)
    state = checkpoint.tensors(client_file(client))
    try:
        flat.vector.copy_(checkpoint.tensors(GLOBAL)["model"])
        if "personal" in state:  # else it has not trained yet, and has what the run started from
            flat.own.copy_(state["personal"])
    except (KeyError, RuntimeError) as error:
        raise InputError(f"checkpoint {checkpoint.folder} does not belong to the model of {folder}"
                         ) from error
    return dataclasses.replace(found, own=dict(flat.views(flat.vector)))

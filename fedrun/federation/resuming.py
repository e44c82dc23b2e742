"""How a run of real sites is taken up again.

    tags          all -> server    of the records that each site can verify: `SiteStates.held`
    (the server decides on a step that all sites hold: start.py)
    global state  server -> all    of that step; each site compares it with what it has recorded
    refusals      all -> server -> all

Of an error at a site the others are told the site's name and what kind it is, and no more.
"""

from __future__ import annotations

from typing import Any

from fedrun.common.errors import ERROR_TEXTS, ErrorCode, InputError, error_code, one_line
from fedrun.common.log import ERROR, log
from fedrun.distributed.control_plane import ControlPlane
from fedrun.federation.global_state import hand_out
from fedrun.records.checkpoint import GLOBAL, Checkpoint
from fedrun.records.site_states import Holdings, SiteStates, Tags


def gather_holdings(control: ControlPlane, states: SiteStates | None) -> Holdings | None:
    """All ranks: what the sites hold of the run, on the server; None elsewhere.

    states: of this site. A site whose text has changed refuses (`Holdings.refusal`); the server,
    which knows whether something else differs too, says so.
    """
    tags: Tags = {}
    code: ErrorCode = ""
    try:
        tags = {} if states is None else states.held()
    except Exception as error:
        code = _logged(error)
    said = control.gather({"tags": tags, "code": code})
    if said is None:
        return None
    assert control.membership is not None
    return Holdings.of(control.membership.run, control.membership.sites,
                       [one["tags"] for one in said],
                       _refusal(control, [one["code"] for one in said], "cannot go on"))


def open_checkpoint(control: ControlPlane, states: SiteStates | None, found: Checkpoint | None,
                    step: int) -> Checkpoint:
    """All ranks: the checkpoint that the server has decided on, with the files of this site.

    found: on the server. Raises InputError on all ranks, naming the sites, if what the server hands
    out is not what some have recorded.
    """
    state = hand_out(control, None if found is None else found.tensors(GLOBAL))
    code: ErrorCode = ""
    if states is not None:
        try:
            found = states.open(step, state)
        except Exception as error:
            code = _logged(error)
    codes = control.gather(code)
    if refusal := control.share(None if codes is None else _refusal(
            control, codes, f"cannot take up step {step}, or has recorded another global model of "
            "it than the server hands out")):
        raise InputError(f"--resume: {refusal}")
    assert found is not None
    return found


def _logged(error: Exception) -> ErrorCode:
    """Log an error here; returns what leaves this site of it."""
    log(one_line(error), ERROR)
    return error_code(error)


def _refusal(control: ControlPlane, codes: list[Any], what: str) -> str:
    """Server: which sites have said that something is wrong there; empty if none has. codes: of all
    ranks."""
    assert control.membership is not None
    wrong = {site: code for site, code in zip(control.membership.sites, codes, strict=True) if code}
    return "; ".join(f"site {site} {what}: {ERROR_TEXTS.get(code, ERROR_TEXTS['bug'])} (its own "
                     "log says more)" for site, code in wrong.items())

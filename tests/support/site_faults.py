"""`fedrun` between sites with an injected fault, in round FAULT_ROUND:

FAULT=spoil: an element of the updates of the clients FAULT_CLIENTS ("1,3") is NaN.
FAULT=lie: the server's plan has the fields of FAULT_PLAN, a JSON object.
FAULT=kill: SIGKILL to this process when the round is in its journal.
FAULT=unpaid: the same before its noise is in the log.
FAULT=full: the disk is full when it would be written there.
FAULT=spent: another process of this run has released as much as costs too much before it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import time
from dataclasses import replace
from typing import Any

import pytest

from fedrun.__main__ import main
from fedrun.federation.messages import RoundPlan
from fedrun.federation.noise_keeper import Keeper
from fedrun.federation.server import Server
from fedrun.secure.journal import Journal, Sum
from fedrun.secure.ledger import Ledger, Release
from tests.support.spoiled import spoil_updates

ROUND = int(os.environ.get("FAULT_ROUND", "0"))
FAULT = os.environ.get("FAULT", "")

if FAULT == "spoil":
    spoil_updates(pytest.MonkeyPatch(), math.nan, ROUND,
                  {int(k) for k in os.environ["FAULT_CLIENTS"].split(",")})
elif FAULT == "lie":
    honest = Server.plan

    def lie(self: Server, number: int) -> RoundPlan:
        changed = json.loads(os.environ["FAULT_PLAN"]) if number == ROUND else {}
        return replace(honest(self, number), **changed)

    Server.plan = lie  # type: ignore[method-assign]
elif FAULT == "kill":
    healthy = Journal.record

    def record(self: Journal, entry: Sum) -> None:
        healthy(self, entry)
        if entry.round == ROUND:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.record = record  # type: ignore[method-assign]

elif FAULT in ("unpaid", "full"):
    written = Ledger.record

    def pay(self: Ledger, release: Release) -> None:
        if release.round != ROUND:
            written(self, release)
        elif FAULT == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            time.sleep(5)  # until the others have written it down
            os.kill(os.getpid(), signal.SIGKILL)

    Ledger.record = pay  # type: ignore[method-assign]

elif FAULT == "spent":
    within = Keeper.release
    changed: Any = Keeper

    def release(self: Keeper, plan: RoundPlan, *how: Any) -> tuple[bytes, bool]:
        if plan.round == ROUND:
            first = self._known()[0]
            self._ledger.record(first._replace(binding="another", multiplier=first.multiplier / 5))
        return within(self, plan, *how)

    changed.release = release

if __name__ == "__main__":
    main()

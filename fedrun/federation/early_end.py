"""How a run ends by an error: all ranks together, for a reason that the server prints, and with the
last good model in the run's folder.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

from torch import Tensor

from fedrun.common.errors import Diverged, FedrunError
from fedrun.distributed.control_plane import UnresponsiveRanks
from fedrun.distributed.runtime import Runtime
from fedrun.federation.messages import RoundDecision, RoundReport, gather
from fedrun.federation.server import Server
from fedrun.federation.worker import Worker

STORE_SECONDS = 5.0  # to close the client store of a failed run, whose disk may not answer
MODEL_SECONDS = 60.0  # to send the last model of a failed run, whose workers may not answer


class RunEnded(FedrunError, RuntimeError):
    """All ranks have agreed to end, and the server has printed the reason."""

    on_all_ranks = True


class RunDiverged(RunEnded, Diverged):
    """The same, because the loss or the parameters are no longer finite."""


def end(decision: RoundDecision, server: Server | None, worker: Worker | None, runtime: Runtime
        ) -> NoReturn:
    """All ranks: end as the server has decided. It prints the reason first: whoever failed may be
    killed by its CUDA libraries next, and a launcher kills all ranks as soon as one is gone. Nobody
    leaves before it has saved the model too, if that is good."""
    if server is not None:
        server.announce(decision)
    model, reports = None, list[RoundReport]()
    if decision.model_is_good:
        with suppress(UnresponsiveRanks):
            model, reports = last_model(server, worker, runtime)
    if server is not None:
        server.end_early(model, reports)
    if worker is not None:
        worker.store.close(STORE_SECONDS)
    with suppress(UnresponsiveRanks):  # the reason for the end is known
        runtime.control.share()
    raise (RunDiverged if decision.kind == "diverged" else RunEnded)(decision.error)


def last_model(server: Server | None, worker: Worker | None, runtime: Runtime
               ) -> tuple[Tensor | None, list[RoundReport]]:
    """All ranks: the global model, (size,), and the digests of its replicas on the server.

    The model is from the first worker that can still compute a digest of its own, and None if there
    is none. After an error in a CUDA call a process can make no other, and all hold the same model.
    """
    control = runtime.control
    if server is not None:
        control.timeout = min(control.timeout, timedelta(seconds=MODEL_SECONDS))
    reports = gather(control, check_replicas(worker))
    able = [rank for rank, report in enumerate(reports) if report.replicas]
    sender = control.share(able[0] if able else None)
    if sender is None:
        return None, reports
    if worker is not None and runtime.rank == sender:
        control.copy_to_server(worker.global_model)
    return (None if server is None else
            control.receive_copy(server.size, server.dtype, sender)), reports


def check_replicas(worker: Worker | None) -> RoundReport:
    """Workers: `Worker.check_replicas`; nothing from a device that has failed, which may be why the
    run ends."""
    try:
        return RoundReport() if worker is None else worker.check_replicas(RoundReport())
    except RuntimeError:
        return RoundReport()

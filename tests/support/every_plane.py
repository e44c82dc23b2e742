"""Messages, and the sum and update of a round on workers distributed over machines in all ways.

Started with torchrun on 5 processes. Every worker must get the same bits as a single worker, and of
the workers that share memory only the first may send a sum.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fedrun.aggregation.base import Aggregator
from fedrun.aggregation.blocks import residual_of
from fedrun.aggregation.bounds import Bounds
from fedrun.aggregation.exact import MOMENTS, ExactAggregator
from fedrun.aggregation.gathering import GatheringAggregator
from fedrun.aggregation.int4 import BLOCK as BLOCK_OF_INT4
from fedrun.aggregation.int4 import Int4Aggregator
from fedrun.aggregation.int8 import BLOCK, Int8Aggregator
from fedrun.aggregation.keeping import KeepingAggregator
from fedrun.aggregation.update import ServerUpdate
from fedrun.aggregation.weiszfeld import WeiszfeldAggregator
from fedrun.distributed.control_plane import HEAD_BYTES, ControlPlane
from fedrun.distributed.data_plane import DataPlane
from fedrun.distributed.shared_memory import SharedBuffer
from fedrun.strategies.base import ServerRound, Strategy
from fedrun.strategies.fed_avg import FedAvg
from fedrun.strategies.fed_fisher import FedFisher
from fedrun.strategies.fed_geometric_median import FedGeometricMedian
from fedrun.strategies.fed_krum import FedKrum
from fedrun.strategies.fed_opt import FedAdam
from fedrun.strategies.fed_trimmed_mean import FedTrimmedMean
from fedrun.strategies.robust import Robust

SIZE = 3 * (1 << 16) + 77  # three slices and a part of one: one worker of five has none
CLIENTS, ROUNDS = 5, 3
MACHINES: dict[str, list[int] | None] = {
    "one": [7] * CLIENTS, "two": [7, 7, 8, 8, 8], "mixed": [7, 8, 7, 9, 7],
    "one each": [5, 6, 7, 8, 9], "no memory": [0] * CLIENTS, "some memory": [7, 0, 7, 0, 0],
    "GPUs": None}
Made = Callable[[Strategy, DataPlane], Aggregator]


def full(exact: bool, moments: Sequence[str] = ()) -> Made:
    return lambda strategy, plane: ExactAggregator(strategy, SIZE, torch.zeros(()), exact, moments,
                                                   plane)


def gathering(strategy: Strategy, plane: DataPlane) -> Aggregator:
    """The aggregator of a method that sees single updates."""
    assert isinstance(strategy, Robust)
    return GatheringAggregator(strategy, SIZE, torch.zeros(()), -(-CLIENTS // plane.workers),
                               CLIENTS, plane)


def weighing(strategy: Strategy, plane: DataPlane) -> Aggregator:
    """The aggregator of the method that sums single updates several times."""
    assert isinstance(strategy, FedGeometricMedian)
    return WeiszfeldAggregator(strategy, SIZE, torch.zeros(()), -(-CLIENTS // plane.workers), plane)


CASES: dict[str, tuple[Strategy, Made]] = {
    "fed_avg": (FedAvg(), full(True)), "average": (FedAvg(), full(True, MOMENTS)),
    "apart": (FedAvg(), full(True, ("momentum", "rms"))),
    "fed_adam": (FedAdam(), full(True)), "relative": (
        FedFisher(fisher_floor_mode="relative"), full(True)),
    "float": (FedAvg(), full(False)),
    "fed_trimmed_mean": (FedTrimmedMean(), gathering), "fed_krum": (FedKrum(), gathering),
    "fed_geometric_median": (FedGeometricMedian(), weighing),
    "int8": (FedAvg(), lambda strategy, plane: Int8Aggregator(strategy, SIZE, torch.zeros(()),
                                                              CLIENTS, CLIENTS, plane)),
    "int8 apart": (FedAvg(), lambda strategy, plane: Int8Aggregator(
        strategy, SIZE, torch.zeros(()), CLIENTS, CLIENTS, plane, ("momentum", "rms"))),
    "int4": (FedAvg(), lambda strategy, plane: Int4Aggregator(
        strategy, SIZE, torch.zeros(()), CLIENTS, CLIENTS, -(-CLIENTS // plane.workers), plane,
        ("momentum", "rms")))}
BOUND, WEIGHT = 1e-3, 1 / CLIENTS
APART = {"apart": [("rms",), ("momentum", "rms"), ()],
         "int8 apart": [(), ("momentum", "rms"), ("rms",)],
         "int4": [(), ("momentum", "rms"), ("momentum",)]}
"""The moments that each round averages."""


def vectors(client: int, number: int) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(10 * number + client)
    delta, *squares = torch.rand(4, SIZE, generator=made)
    return {"delta": (delta - 0.5) * BOUND, "fisher": squares[0], "residual": torch.zeros(SIZE),
            "exp_avg": squares[1] - 0.5, "exp_avg_sq": squares[2], "momentum": squares[1] - 0.5,
            "rms": squares[2], "residual.momentum": torch.zeros(SIZE),
            "residual.rms": torch.zeros(SIZE),
            "peaks": torch.stack([block.max() for block in squares[2].split(BLOCK)])}


def result(case: str, plane: DataPlane, mine: range) -> dict[str, Tensor]:
    """The model and all other results after ROUNDS rounds, with the clients in `mine` on this
    worker."""
    strategy, made = CASES[case]
    terms = made(strategy, plane)
    update = ServerUpdate(strategy, terms)
    model = plane.replicated(torch.linspace(-1, 1, SIZE))
    state = {n: plane.replicated(torch.full((SIZE,), v)) for n, v in strategy.state.items()}
    moments = {name: plane.replicated(torch.zeros(SIZE))
               for name in (*MOMENTS, "momentum", "rms")}
    terms.averages = moments
    measured: dict[str, float] = {}
    sent, due = plane.bytes_sent, 0
    for number in range(ROUNDS):
        terms.begin(Bounds(BOUND), APART[case][number] if case in APART else None)
        due += terms.bytes_sent
        if isinstance(terms, KeepingAggregator):
            terms.expect([range(CLIENTS)[worker::plane.workers]
                          for worker in range(plane.workers)])
            for client in mine:
                # One is left out, but not where the rule needs all.
                if number != 1 or client != 2 or isinstance(strategy, FedKrum):
                    terms.keep(client, vectors(client, number)["delta"] / (client + 1), WEIGHT)
        for client in () if isinstance(terms, KeepingAggregator) else mine:
            reported = vectors(client, number)
            inputs = ["parameters" if name == "delta" else name for name in strategy.inputs]
            wanted = [*inputs, *terms.moments]
            wanted += map(residual_of, terms.residuals)
            if terms.moment_steps:
                wanted.append("peaks")
            reported["parameters"] = reported.pop("delta").add_(model)
            assert not terms.add({n: reported[n] for n in wanted}, WEIGHT, start=model)
        terms.reduce()
        measured |= update.apply(model, state, ServerRound(number + 1, 1e-3), moments, measure=True)
        # As after a round of messages: a fast worker is already at the next.
    if isinstance(terms, GatheringAggregator):
        measured |= {str(client): used for client, used in terms.used.items()}
    elif isinstance(terms, Int4Aggregator):
        of_updates = ROUNDS * (33 * math.ceil(SIZE / BLOCK_OF_INT4) + 8)
        assert plane.bytes_sent - sent - in_four_bits(plane) in (0, due - of_updates), case
    else:
        assert plane.bytes_sent - sent in (0, due), case
    terms.complete()
    state |= terms.carried | terms.carried_in_sections
    return {"model": model.clone(), **{n: v.clone() for n, v in (state | moments).items()},
            "measured": torch.tensor(list(measured.values()), dtype=torch.float64)}


def in_four_bits(plane: DataPlane) -> int:
    """What this worker sends of updates in ROUNDS rounds of "int4": the sum of the weights, and to
    the other machines all that is in their sections, and twice what is in its own."""
    nodes = len(plane.nodes)
    sends = nodes > 1 and plane.node_rank == 0
    section = math.ceil(math.ceil(SIZE / BLOCK_OF_INT4) / nodes)
    bits = 4 if max(map(len, plane.nodes)) * -(-CLIENTS // plane.workers) == 1 else 8
    of_round = 8 * (plane.workers > 1) + sends * (nodes - 1) * section * (8 * bits + 1 + 35)
    return ROUNDS * of_round


def connect(group: dist.ProcessGroup, workers: int, machines: list[int] | None) -> DataPlane:
    """All ranks: the data plane of the first `workers` ranks; the others get one of their own."""
    rank = dist.get_rank()
    machine = machines[rank] if machines is not None else None
    # With a control plane, workers without a machine ("GPUs") poll their sums.
    control = ControlPlane(timeout=timedelta(seconds=60))
    plane = DataPlane(group, machine, control) if rank < workers else DataPlane()
    assert plane.probe(torch.device("cpu")) == ""
    senders = [plane.node_leaders]
    dist.broadcast_object_list(senders)
    if 1 < len(senders[0]) < workers:
        plane.inter_node_group = dist.new_group(senders[0])
    return plane


def signed(words: list[int]) -> list[int]:
    return [(word + (1 << 63)) % (1 << 64) - (1 << 63) for word in words]


def compare(workers: int, group: dist.ProcessGroup, expected: dict[str, dict[str, Tensor]]) -> None:
    rank = dist.get_rank()
    for name, machines in MACHINES.items():
        plane = connect(group, workers, machines)
        if rank >= workers:
            continue
        machine = machines[rank] if machines else 0
        here = [w for w in range(workers) if machines and machine and machines[w] == machine]
        assert plane.node_workers == (tuple(here) or (rank,)), (name, plane.node_workers)
        assert (rank in plane.node_leaders) == (plane.node_workers[0] == rank), (
            name, plane.node_leaders)
        # Modulo 2^64, and with a sign.
        assert plane.sum_words([rank, -rank, 1 << 62, (1 << 63) + 1]) == signed(
            [sum(range(workers)), -sum(range(workers)), workers << 62, workers * ((1 << 63) + 1)])
        mine = range(CLIENTS)[rank::workers]
        for case, whole in expected.items():
            if case != "fed_avg" and name not in ("one", "mixed"):
                continue
            before = plane.bytes_sent
            found = result(case, plane, mine)
            sends = len(plane.node_leaders) > 1 and rank in plane.node_leaders
            few_words = isinstance(CASES[case][0], Robust) or case == "int4"  # all workers sum them
            assert (plane.bytes_sent > before) == sends or few_words, case
            for what, tensor in whole.items():
                same = (torch.allclose(found[what], tensor, rtol=1e-6, atol=1e-9)
                        if case == "float" else torch.equal(found[what], tensor))
                assert same, f"{workers} workers, machines {name}, {case}: {what} differs"


def unreachable(group: dist.ProcessGroup, expected: dict[str, Tensor], fault: str) -> None:
    """If a worker cannot create or open a buffer, the workers of its machine share no memory; those
    of the other machine do."""
    healthy, rank = getattr(SharedBuffer, fault), dist.get_rank(group)

    def faulty(*arguments: Any) -> Any:
        if rank == 3 and (fault == "create" or arguments[0][0] != os.getpid()):
            raise PermissionError
        return healthy(*arguments)

    setattr(SharedBuffer, fault, staticmethod(faulty))
    plane = connect(group, CLIENTS, [7, 7, 8, 8, 8])
    assert plane.node_workers == ((0, 1) if rank < 2 else (rank,)), plane.node_workers
    assert plane.cannot_map == (rank in ((3,) if fault == "open" else (2, 3, 4)))
    found = result("fed_avg", plane, range(CLIENTS)[rank::CLIENTS])
    setattr(SharedBuffer, fault, staticmethod(healthy))
    assert all(torch.equal(found[what], tensor) for what, tensor in expected.items())


def messages() -> None:
    """Messages of lengths around HEAD_BYTES, from the server and from all ranks in one gather."""
    control = ControlPlane(dist.new_group(), timeout=timedelta(seconds=60))
    for length in (0, HEAD_BYTES - 12, HEAD_BYTES - 10, HEAD_BYTES - 9, HEAD_BYTES, 3 * HEAD_BYTES):
        sent = [{"rank": rank, "text": "é" * (length * (rank % 2))} for rank in range(CLIENTS)]
        assert control.share(sent if control.rank == 0 else None) == sent
        assert control.gather(sent[control.rank]) == (None if control.rank else sent)
        assert control.share("x" * length if control.rank == 0 else None) == "x" * length
    for dtype in (torch.uint8, torch.int64, torch.float32):
        for size in (0, 1, 100_003):
            vector = torch.arange(size).to(dtype)
            given = vector if control.rank == 0 else None
            assert torch.equal(control.share_vector(given, size, dtype), vector)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    expected = {case: result(case, DataPlane(), range(CLIENTS)) for case in CASES}
    for workers in (1, 2, 3, CLIENTS):
        compare(workers, dist.new_group(list(range(workers))), expected)
    everybody = dist.group.WORLD
    assert everybody is not None
    for fault in ("open", "create"):
        unreachable(everybody, expected["fed_avg"], fault)
    messages()
    dist.barrier()
    dist.destroy_process_group()
    if os.environ["RANK"] == "0":
        sys.stdout.write("all the same\n")


if __name__ == "__main__":
    main()

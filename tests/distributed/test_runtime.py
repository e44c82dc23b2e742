"""Devices, network interfaces, and the comparison of ranks."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fedrun.common.errors import FedrunError
from fedrun.distributed.comparison import compare, difference, idle_gpus
from fedrun.distributed.data_plane import DataPlane
from fedrun.distributed.launch import Launch
from fedrun.distributed.runtime import choose_interfaces, device_index, probe
from tests.support.prepared import run_ranks


def first(local_rank: int, local: int, world: int | None = None) -> Launch:
    return Launch(local_rank, world or local, local_rank, local, on_first_node=True)


def later(local_rank: int, local: int, world: int) -> Launch:
    return Launch(world - local + local_rank, world, local_rank, local, on_first_node=False)


@pytest.mark.parametrize(("launch", "dedicated", "gpus", "index"), [
    (Launch(), True, 1, 0),                # one process: server and worker share the GPU
    (Launch(), True, 4, 0),
    (first(0, 5), True, 4, None),          # the server uses none
    (first(1, 5), True, 4, 0),
    (first(4, 5), True, 4, 3),
    (first(0, 4), False, 4, 0),            # colocated: rank 0 works
    (first(3, 4), False, 4, 3),
    (later(0, 4, 9), True, 4, 0),          # other machines have no server
    (later(3, 4, 9), True, 4, 3),
    (first(1, 3), True, 1, 0),             # one visible GPU per process
    (later(2, 4, 9), True, 1, 0),
])
def test_device_index(launch: Launch, dedicated: bool, gpus: int, index: int | None) -> None:
    assert device_index(launch, dedicated, gpus) == index


def test_too_few_gpus_is_an_error_with_the_right_number_of_processes() -> None:
    with pytest.raises(ValueError, match=r"5 workers but 2 GPUs.*--nproc-per-node 3"):
        device_index(first(5, 6), True, 2)
    with pytest.raises(ValueError, match="--nproc-per-node 2"):
        device_index(later(2, 3, 7), True, 2)


def test_one_machine_uses_the_loopback_unless_the_user_has_chosen() -> None:
    assert choose_interfaces(first(0, 2), {}) == {"GLOO_SOCKET_IFNAME": "lo",
                                                  "NCCL_SOCKET_IFNAME": "=lo"}  # not a prefix
    assert choose_interfaces(first(0, 2), {"GLOO_SOCKET_IFNAME": "eth7"}) == {
        "NCCL_SOCKET_IFNAME": "=lo"}


def test_between_machines_a_master_on_loopback_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"GLOO_SOCKET_IFNAME.*MASTER_ADDR=127\.0\.1\.1"):
        choose_interfaces(later(0, 1, 2), {"MASTER_ADDR": "127.0.1.1"})


def rank(**values: str) -> dict[str, str]:
    return {"--lr": "1", "worker kernels": "a", "host": "h", "gpus seen": "", **values}


def test_ranks_that_differ_are_named() -> None:
    assert difference([rank(), rank(), rank()], (1, 2)) == ""
    assert "--lr" in difference([rank(), rank(), rank(**{"--lr": "2"})], (1, 2))
    kernels = {"worker kernels": "b"}
    assert difference([rank(**kernels), rank(), rank()], (1, 2)) == ""  # the server trains nothing
    assert "worker kernels" in difference([rank(), rank(), rank(**kernels)], (1, 2))


def gpu(uuid: str, seen: str = "u1 u2 u3") -> dict[str, str]:
    """What a worker on that GPU says of it."""
    return {"gpu": uuid, "gpus here": str(len(seen.split())), "gpus seen": seen}


def test_two_workers_on_one_gpu_are_an_error() -> None:
    assert "ranks 1 and 2 use the same GPU u1" in difference(
        [rank(), rank(**gpu("u1")), rank(**gpu("u1"))], (1, 2))
    server = rank(**{"gpus seen": "u1 u2"})  # what it sees is no difference
    assert difference([server, rank(**gpu("u1", "u1")), rank(**gpu("u2", "u2"))], (1, 2)) == ""


SERVER_ONLY = {"gpus seen": "u1"}
ONE_IDLE = "1 of 3 GPUs on h are idle: raise --nproc-per-node by 1 to use them"
SERVERS = "1 of 2 GPUs on h is idle, the only one that the server sees: --server colocated uses it"


@pytest.mark.parametrize(("everyone", "warnings"), [
    ([rank(), rank(**gpu("u1")), rank(**gpu("u2"))], [ONE_IDLE]),
    ([rank(**{"gpus seen": "u1 u2 u3"}), rank(**gpu("u1")), rank(**gpu("u2"))], [ONE_IDLE]),
    ([rank(**gpu("u1")), rank(**gpu("u2")), rank(**gpu("u3"))], []),
    ([rank(**SERVER_ONLY), rank(**gpu("u1", "u1"))], []),      # a machine with one GPU
    ([rank(**SERVER_ONLY), rank(**gpu("u2", "u2"))], [SERVERS]),  # a GPU for each task
    ([rank(**gpu("u1", "u1")), rank(**gpu("u2", "u2"))], []),   # the same, colocated
    ([rank(**{"gpus seen": "u1 u2"}), rank(host="other", **gpu("v1", "v1"))],
     ["2 of 2 GPUs on h are idle: raise --nproc-per-node by 2 to use them"]),
    ([rank(**SERVER_ONLY), rank(**SERVER_ONLY)], []),           # --device cpu
])
def test_idle_gpus_are_a_warning(everyone: list[dict[str, str]], warnings: list[str]) -> None:
    assert idle_gpus(everyone) == warnings


def test_a_server_without_a_gpu_reports_those_that_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: SimpleNamespace(uuid=f"GPU-{device.index}"))
    gathered: list[dict[str, str]] = []

    class Control:
        """Of a dedicated server whose worker's report is made up."""

        def gather(self, mine: dict[str, str]) -> list[dict[str, str]]:
            gathered.append(mine)
            return [mine, mine | gpu("GPU-1", "GPU-0 GPU-1")]

        def share(self, message: str) -> str:
            return message

    for device, of_sites in (("auto", False), ("cpu", False), ("auto", True)):
        compare(Control(), (1,), torch.device("cpu"),  # type: ignore[arg-type]
                {"--device": json.dumps(device)}, "h", of_sites)
    assert [each["gpus seen"] for each in gathered] == ["GPU-0 GPU-1", "", ""]
    assert "gpu" not in gathered[0]


def test_workers_of_sites_on_gpus_are_refused_without_a_word_on_the_gpus() -> None:
    """Not run on a GPU."""
    gathered: list[dict[str, str]] = []

    class Control:
        def gather(self, mine: dict[str, str]) -> list[dict[str, str]]:
            gathered.append(mine)
            return [mine | {"worker device": "cpu"}, mine, mine]

        def share(self, message: str) -> str:
            return message

    with pytest.raises(FedrunError, match=r"^--device cuda: workers of sites .*; must be cpu$"):
        compare(Control(), (1, 2), torch.device("cuda", 1),  # type: ignore[arg-type]
                {"--device": json.dumps("cuda")}, "north", of_sites=True)
    assert gathered == [{"--device": '"cuda"', "worker device": "cuda", "host": "north",
                         "gpus seen": ""}]


def test_a_data_plane_that_cannot_sum_is_named_before_training() -> None:
    def wrong(_: torch.device) -> str:
        return "the sum of int32"

    def broken(_: torch.device) -> str:
        raise RuntimeError("NCCL error: unhandled system error\nLast error: Cuda failure 1")

    plane: Any = SimpleNamespace(worker=1, probe=wrong)
    with pytest.raises(FedrunError, match=r"^--device cpu: gloo failed between the workers, on cpu "
                                          r"of \S+: the sum of int32 is wrong$"):
        probe(plane, torch.device("cpu"))
    plane.probe = broken
    with pytest.raises(FedrunError, match=r"^--device cuda: NCCL failed between the workers, on "
                                          r"cuda:3 of \S+: NCCL error: unhandled system error; "
                                          r"NCCL_DEBUG=WARN shows more$"):
        probe(plane, torch.device("cuda", 3))


@pytest.mark.parametrize(("through", "wrong"), [
    (None, ""), (torch.float32, "the sum of int32"), (torch.float64, "the sum of int64"),
    (torch.float16, "the sum of int32")])
def test_the_first_sums_are_of_numbers_that_need_every_bit(
        monkeypatch: pytest.MonkeyPatch, through: torch.dtype | None, wrong: str) -> None:
    """Two workers; all that a library sums goes through a type, which may be too narrow."""
    def all_reduce(vector: Tensor, **_: Any) -> None:
        # What the second worker gives is smaller by one.
        both = [one.to(through or one.dtype) for one in (vector, vector - 1)]
        vector.copy_(both[0] + both[1])

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "get_world_size", lambda _: 2)
    monkeypatch.setattr(dist, "get_rank", lambda _: 0)
    group: Any = object()
    assert DataPlane(group).probe(torch.device("cpu")) == wrong


def test_ranks_connect_with_those_that_they_speak_to_alone() -> None:
    """And all of these at the start, where a rank that is lost is named."""
    code, output = run_ranks(6, [], 120, "tests.support.met_ranks")
    assert code == 0, output
    line = next(line for line in output.splitlines() if line.startswith("results "))
    met, spoken = zip(*json.loads(line.removeprefix("results ")), strict=True)
    assert met == spoken
    assert met[0] == 5  # the server with each, in one of the two groups
    assert sum(met) / 2 < 2 * 5, met  # all with all: 15 pairs, in each group

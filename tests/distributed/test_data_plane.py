"""Vectors between workers: the same sums whichever workers share memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedrun.distributed.data_plane import DataPlane, group_by_node
from fedrun.distributed.shared_memory import SharedBuffer, machine_id
from tests.support.runs import (
    FAULTY,
    Run,
    assert_equal,
    execute,
    fault,
    torchrun,
    without_clocks,
)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12))
def test_nodes_are_the_machines_whose_workers_reach_each_other(drawn: list[tuple[int, bool]]
                                                               ) -> None:
    machines, reached = zip(*drawn, strict=True)
    found = group_by_node(machines, reached)
    for worker, node in enumerate(found):
        assert worker in node
        assert list(node) == sorted(set(node))
        assert all(found[other] == node and machines[other] == machines[worker] for other in node)
        if len(node) > 1:
            assert all(reached[other] for other in node)
        elif reached[worker]:
            alike = [w for w, other in enumerate(machines) if other == machines[worker]]
            assert alike == [worker] or not all(reached[w] for w in alike)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64])
def test_a_tensor_outlives_its_closed_buffer(dtype: torch.dtype) -> None:
    buffer = SharedBuffer.create(1000 * dtype.itemsize)
    first, second = (SharedBuffer.open(buffer.address, 1000, dtype) for _ in range(2))
    buffer.close()
    assert first.dtype == dtype
    assert first.shape == (1000,)
    assert not first.any()
    first[:] = torch.arange(1000)
    del first
    assert torch.equal(second, torch.arange(1000, dtype=dtype))


def test_only_the_right_buffer_is_opened(tmp_path: Path) -> None:
    """Another process may have another file under the descriptor's number; opening a pipe would
    block."""
    buffer = SharedBuffer.create(8)
    me, descriptor, stamp = buffer.address
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDWR)
    (tmp_path / "file").write_bytes(bytes(10_000))
    with open(tmp_path / "file", "r+b") as file:
        for address in ((me, descriptor, stamp ^ 1), (me, pipe, stamp), (me, file.fileno(), stamp),
                        (me, 10_000, stamp), (2**22 + 1, descriptor, stamp)):
            with pytest.raises(OSError, match=r"not a buffer|another run|No such file"):
                SharedBuffer.open(address, 8, torch.uint8)
    os.close(pipe)
    buffer.close()
    with pytest.raises(OSError, match="No such file"):
        SharedBuffer.open(buffer.address, 8, torch.uint8)


def test_processes_of_a_machine_have_the_same_machine_id() -> None:
    code, output = execute([sys.executable, "-c", "from fedrun.distributed.shared_memory import "
                            "machine_id; print(machine_id())"])
    assert code == 0, output
    assert int(output) == machine_id() > 0


def test_words_of_a_worker_alone() -> None:
    words = [0, 1, -1, (1 << 63) - 1, 1 << 63, -(1 << 63), (1 << 64) + 5]
    assert DataPlane().sum_words(words) == [0, 1, -1, (1 << 63) - 1, -(1 << 63), -(1 << 63), 5]
    assert DataPlane().sum_words([]) == []


def test_a_plane_of_a_site_does_nothing_that_would_show_what_is_in_it() -> None:
    """No sum without the leaders of the other sites, no mask where none belongs."""
    class Mask:
        def add_to(self, vector: np.ndarray) -> None:
            raise AssertionError("added")

    vector = torch.ones(3, dtype=torch.int32)
    with pytest.raises(AssertionError, match=r"^$"):
        DataPlane(of_site=True).reduce((vector,))
    with pytest.raises(AssertionError, match=r"^$"):
        DataPlane().sum_words([1], Mask())


@pytest.mark.timeout(250)
@pytest.mark.slow
def test_the_same_bits_on_any_machines() -> None:
    code, output = execute([*torchrun(5), "-m", "tests.support.every_plane"], limit=200)
    assert code == 0, output
    assert "all the same" in output


@pytest.mark.slow
def test_a_run_on_two_machines(run: Run) -> None:
    """With a server; workers 1 and 3 share memory, and so do 2 and 4."""
    flags = ("--rounds", 3, "--num_clients", 4, "--client_moments", "average")
    alone = run("fed_avg", *flags, name="alone")
    apart = run("fed_avg", *flags, name="apart", processes=5,
                script="tests.support.two_machines")
    assert alone.code == apart.code == 0, alone.output + apart.output
    assert apart.bits == alone.bits
    assert without_clocks(apart) == without_clocks(alone)


@pytest.mark.slow
def test_a_slow_worker_gets_the_same_results_as_the_others(run: Run, tmp_path: Path) -> None:
    """Also while a run resumes, when the shared model is written twice."""
    flags = ("--num_clients", 2, "--rounds", 4, "--val_freq", 2, "--checkpoint_freq", 2,
             "--save_client_deltas", "true")
    whole = run("fed_avg", *flags, name="whole")
    stopped = run("fed_avg", *flags, script=FAULTY, env=fault(tmp_path, "term", "record:2"))
    assert whole.code == stopped.code == 0, whole.output + stopped.output
    resumed = run("fed_avg", *flags, processes=3, script="tests.support.late_fedrun",
                  env={"LATE_RANK": "2"})
    assert resumed.code == 0, resumed.output
    assert "resuming from step" in resumed.output
    assert_equal(resumed, whole)

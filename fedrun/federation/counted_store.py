"""The store of clients that keep nothing from one round to the next but their place in a text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from fedrun.federation.client import STEPS_DONE, ClientState
from fedrun.federation.client_store import ClientStore
from fedrun.federation.schedule import Schedule
from fedrun.records.checkpoint import Checkpoint, Files
from fedrun.records.checkpoint_writer import CheckpointWriter


class Counted(ClientStore):
    """No states: in which rounds a client was drawn says where it is in its text.

    So any worker can train any client, and ten thousand clients need neither memory nor files.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._counted = 0  # rounds
        self._steps: Counter[int] = Counter()  # of each client in them

    def begin(self, number: int) -> None:
        for earlier in range(self._counted + 1, number):
            self._steps.update(dict.fromkeys(self._schedule.cohort(earlier),
                                             self._schedule.steps(earlier)))
        self._counted = max(self._counted, number - 1)

    def prefetch(self, client: int) -> None:
        pass

    def checkout(self, client: int) -> ClientState:
        return {STEPS_DONE: torch.tensor(self._steps[client])}

    def checkin(self, client: int, state: ClientState) -> None:
        pass

    def load(self, checkpoint: Checkpoint) -> None:
        pass

    def save(self, writer: CheckpointWriter, folder: Path, step: int, files: Files) -> None:
        writer.begin(folder, step, files)

    def close(self, timeout: float) -> None:
        pass

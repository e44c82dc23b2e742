"""--dp example on the server: what the local steps cost, and what is recorded of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fedrun.federation.spending import Spending
from fedrun.privacy.client_level import participations
from fedrun.privacy.example_level import ExampleLevel
from fedrun.records.example_privacy import (
    BY_SITES,
    ExampleGuarantee,
    part,
    write_example_privacy,
)
from fedrun.records.shared_privacy import add_part


class ExampleSpending(Spending):
    """What has been spent, as the first worker's log has it."""

    snr_of = "steps"

    def _write_page(self, planned: float) -> tuple[str, str]:
        config, rounds = self.config, self.schedule.rounds
        assert config.dp_clip is not None
        assert config.dp_delta is not None
        sizes = self.schedule.shard_sizes
        guarantee = ExampleGuarantee(
            config.num_clients, config.cohort_size, rounds, config.local_updates
            * participations(rounds, config.num_clients, config.cohort_size), config.batch_size,
            min(sizes), max(sizes), config.sequence_length, config.dp_clip, self.level.noise,
            config.dp_delta, self._spent.epsilon, planned, self._on_text)
        if config.sites:
            guarantee = guarantee._replace(noised=BY_SITES)
            add_part(config.run_dir, part(guarantee))
        else:
            write_example_privacy(config.run_dir, guarantee)
        return guarantee.line, guarantee.warning

    def _paying(self, cohort: list[int], charged: Mapping[str, bool]) -> list[int]:
        sites = self.schedule.sites
        if sites is None or "" in charged:
            return super()._paying(cohort, charged)
        return [client for client in cohort if charged[sites.site_of(client)]]

    def event(self, evaluated: bool) -> dict[str, Any]:
        """The epsilon of steps on samples takes up to seconds to compute: in evaluated rounds."""
        return super().event(evaluated) if evaluated else {}

    def record(self, number: int, measured: Mapping[str, float], model: Tensor | None,
               norms: Sequence[float]) -> dict[str, Any]:
        """norms: of the last gradients of the clients, which have their noise, or their root mean
        square."""
        assert isinstance(self.level, ExampleLevel)
        squares = [norm**2 for norm in norms]
        self.snr = {"snr": self.level.snr(math.sqrt(math.fsum(squares) / len(squares)))}
        return {"epsilon": self.epsilon, **self.snr}

"""--dp on the server: what the rounds cost the clients, when that is too much, and what is
recorded of rounds whose clients report nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fedrun.aggregation.slices import norm
from fedrun.common.log import WARNING, log
from fedrun.config import FederatedConfig
from fedrun.federation.messages import RoundPlan
from fedrun.federation.noise_keeper import EXCEEDS, Charge, Level, Standing
from fedrun.federation.schedule import Schedule
from fedrun.privacy.client_level import ClientLevel, Spent, participations
from fedrun.privacy.example_level import SpentOnSequences
from fedrun.privacy.shares import SharedLevel
from fedrun.records.client_privacy import ClientGuarantee, write_client_privacy
from fedrun.records.shared_privacy import add_part, noised_by, part
from fedrun.strategies import FedAvg


class Spending:
    """What has been spent, as the first worker's log has it."""

    snr_of = "mean"

    def __init__(self, config: FederatedConfig, schedule: Schedule, level: Level,
                 standing: Standing, done: int) -> None:
        """standing: what the first worker's log said at this start. done: rounds before the first
        that is to come."""
        self.config, self.schedule, self.level = config, schedule, level
        self.runs, self._on_text = standing.runs, standing.on_text
        assert config.dp_delta is not None
        self._done, self._most, self._repeatable = done, config.max_epsilon, standing.repeatable
        self._spent, self._shown = level.spent(config.dp_delta), level.spent(config.dp_delta)
        self._ahead: dict[int, list[Charge]] = {}  # released before a kill
        for number, charge in standing.releases:
            self._spent.add(*charge)
            if number <= done:
                self._shown.add(*charge)
            else:
                self._ahead.setdefault(number, []).append(charge)
        self._start: Tensor | None = None
        self.snr: dict[str, float] = {}
        """Signal-to-noise ratios at the last evaluation."""

    @property
    def epsilon(self) -> float:
        """What the rounds so far have cost. A run that repeats rounds after a kill, which are in
        the log, shows what the undisturbed run showed."""
        return self._shown.epsilon

    def refusal(self) -> str:
        """Why the run cannot start; empty if it can. It touches nothing in the run's folder."""
        config, done, planned = self.config, self._done, self._planned()
        if config.dp_epsilon is not None and not planned.epsilon <= config.dp_epsilon * EXCEEDS:
            why = ("rounds of it were released with another noise, or it was shorter when the "
                   "noise was chosen (--dp_noise trains further)")
            if math.isinf(planned.epsilon):
                why = ("the noise as it is drawn is not exact enough for so much epsilon, or so "
                       f"small a --dp_delta as {config.dp_delta:g}")
            return (f"--dp_epsilon {config.dp_epsilon:g}: the run would come to epsilon "
                    f"{planned.epsilon:.3g}: {why}")
        if self.ends_before(done + 1) and done == 0:
            return (f"--max_epsilon {config.max_epsilon:g}: must be more: the first round would "
                    f"bring what is spent to {self._after(done + 1).epsilon:.4g}")
        return ""

    def begin(self, start: Tensor) -> None:
        """Say what the run is going to cost, on the screen and in its folder. start: the model
        before the run's first round, (size,)."""
        # Only there is the model's way from the start the sum of what was released.
        if type(self.config.strategy).server_update is FedAvg.server_update:
            self._start = start.clone()
        line, warning = self._write_page(max(self._spent.epsilon, min(
            self._planned().epsilon, self.config.max_epsilon or math.inf)))
        log(line)
        if warning:
            log(warning, WARNING)

    def _planned(self) -> Spent | SpentOnSequences:
        """What is spent after the last round."""
        return self._after(*range(self._done + 1, self.schedule.rounds + 1))

    def _write_page(self, planned: float) -> tuple[str, str]:
        """Write what holds into the run's folder; a line and a warning for the screen. planned:
        epsilon after the last round."""
        config, rounds = self.config, self.schedule.rounds
        assert config.dp_clip is not None
        assert config.dp_delta is not None
        guarantee = ClientGuarantee(
            config.num_clients, config.cohort_size, rounds,
            participations(rounds, config.num_clients, config.cohort_size), config.dp_clip,
            self.level.noise, config.dp_delta, self._spent.epsilon, planned, self._on_text)
        if isinstance(self.level, SharedLevel):
            sites, colluding = self.level.sites, self.level.colluding
            guarantee = guarantee._replace(noised=noised_by(sites, colluding))
            add_part(config.run_dir, part(guarantee, sites, colluding))
        else:
            write_client_privacy(config.run_dir, guarantee)
        return guarantee.line, guarantee.warning

    @property
    def line(self) -> str:
        """What is printed when the run ends."""
        ratios = ", ".join(f"{name} {ratio:.3g}" for name, ratio in self.snr.items())
        target = self.config.max_epsilon or self.config.dp_epsilon
        of = "" if target is None else f" of {target:g}"
        line = (f"privacy: epsilon {self._spent.epsilon:.4g}{of} spent at delta "
                f"{self.config.dp_delta:g}")
        if not ratios:
            return line
        return f"{line}; signal to noise of the last {self.snr_of} evaluated: {ratios}"

    def ends_before(self, *rounds: int) -> str:
        """Who asks for an end before the last of these rounds, which come next: --max_epsilon, if
        it would be passed; empty if not."""
        if self._most is None or not self._after(*rounds).over(self._most * EXCEEDS):
            return ""
        return f"--max_epsilon {self._most:g}"

    def _after(self, *rounds: int) -> Spent | SpentOnSequences:
        """What is spent after these rounds too; to repeat one costs nothing."""
        return self._spent.after(self.level.noise, *filter(None, map(self._unpaid, rounds)))

    def _unpaid(self, number: int) -> list[int]:
        """The clients of a round that it is going to cost something: not those whose log had it at
        the start, if it is likely to be the same."""
        if not self._repeatable:
            return self.schedule.cohort(number)
        paid = {client for cohort, *_ in self._ahead.get(number, []) for client in cohort}
        return [client for client in self.schedule.cohort(number) if client not in paid]

    def charge(self, plan: RoundPlan, charged: Mapping[str, bool]) -> None:
        """Take in a round that was made. charged: whether it counts, by the log's owner: each site
        of its own, or "" for everybody."""
        for charge in self._ahead.pop(plan.round, []):
            self._shown.add(*charge)
        if paying := self._paying(plan.cohort, charged):
            for spent in (self._spent, self._shown):
                spent.add(paying, self.level.noise, *self.level.sampled(paying))

    def _paying(self, cohort: list[int], charged: Mapping[str, bool]) -> list[int]:
        """The clients of a round that it counts for."""
        # A round that one of the sites knows is repeated: another was killed before it did.
        return cohort if all(charged.values()) else []

    def event(self, evaluated: bool) -> dict[str, Any]:
        """What the line of a round in events.jsonl holds."""
        return {"epsilon": self.epsilon}

    def record(self, number: int, measured: Mapping[str, float], model: Tensor | None,
               norms: Sequence[float]) -> dict[str, Any]:
        """What the history holds of an evaluated round: of what was released, and nothing else.

        measured: by the server update. model: the global one after it, (size,). norms: none.
        """
        assert isinstance(self.level, ClientLevel)
        self.snr = {"snr": self.level.snr(measured["mean_norm"])}
        if self._start is not None and model is not None:
            self.snr["snr_total"] = self.level.snr(norm(model, self._start), number)
        return {"step_norm": measured["step_norm"],
                **{f"share_{name}": share for name, share in measured.items()
                   if not name.endswith("_norm")},
                "epsilon": self.epsilon, **self.snr}

"""The server update: applies a method's update from the means over a cohort, slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedrun.aggregation.base import Aggregator
from fedrun.aggregation.slices import double_norm
from fedrun.common.errors import FedrunError
from fedrun.strategies.base import ServerRound, Strategy


class ServerUpdate:
    """Applies a method's server update to the global model.

    It runs on the workers, from the same sum to the same bits on all of them. A slice is summed,
    averaged, used and measured while it is in the cache, so memory is passed over once.
    """

    def __init__(self, strategy: Strategy, aggregator: Aggregator) -> None:
        self.strategy = strategy
        self.aggregator = aggregator
        self._measured = next((n for n in ("delta", "gradient") if n in strategy.sums), None)
        self._table = aggregator.slices.table(("mean_norm", "step_norm", *strategy.diagnostics),
                                              aggregator.device)

    def apply(self, model: Tensor, state: Mapping[str, Tensor], context: ServerRound,
              moments: Mapping[str, Tensor] | None = None, measure: bool = False
              ) -> dict[str, float]:
        """Update `model` (size,), the method's `state` and the averaged `moments` in place.

        This worker updates its section; the others' sections are done when this returns. Vectors
        may wait in the host's page-locked memory, beside a GPU that computes. With `measure`,
        returns the norm of the model's step (`step_norm`), that of the mean update or gradient
        (`mean_norm`, if the method sums one), and the method's diagnostics as shares of all
        elements.
        """
        aggregator, strategy, table = self.aggregator, self.strategy, self._table
        device = aggregator.device
        weight = aggregator.total_weight()
        assert weight > 0, "the server ends a round in which no client is left"
        if strategy.global_means:
            context = replace(context, global_mean=aggregator.global_means(weight))
        for index, a, b in aggregator.slices.own():
            mean, mean_moments = aggregator.means(a, b, weight)
            for name, tensor in mean_moments.items():
                assert moments is not None
                moments[name][a:b].copy_(tensor, non_blocking=True)
            mine, own = model[a:b], {name: v[a:b] for name, v in state.items()}
            new = mine.to(device, non_blocking=True)
            new_state = {name: v.to(device, non_blocking=True) for name, v in own.items()}
            before = new.clone() if measure else new
            if measure:
                counts = strategy.count_diagnostics(mean, context)
                assert counts.keys() == set(strategy.diagnostics)
                for name, count in counts.items():
                    table.write(name, index, count)
                if self._measured:
                    table.write("mean_norm", index, double_norm(mean[self._measured]))
            update: Callable[..., object] = strategy.server_update  # a plugin's may return anything
            returned = update(new, new_state, mean, context)
            if returned is not None and returned is not new:
                raise FedrunError(f"{type(strategy).__name__}.server_update: returns a "
                                  f"{type(returned).__name__}, which nobody uses; it must change "
                                  "`model` in place, as model.add_(...) does")
            if measure:
                table.write("step_norm", index, double_norm(before.sub_(new)))
            mine.copy_(new, non_blocking=True)  # nothing to do unless it was brought over
            for name, kept in own.items():
                kept.copy_(new_state[name], non_blocking=True)
        if model.device != device:
            torch.cuda.current_stream(device).synchronize()  # from here on the host reads them
        aggregator.plane.barrier()
        if not measure:
            return {}
        norms = ("mean_norm", "step_norm") if self._measured else ("step_norm",)
        return ({name: table.norm(name) for name in norms}
                | {name: table.sum(name) / aggregator.size for name in strategy.diagnostics})

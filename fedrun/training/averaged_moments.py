"""AdamW's moments as clients average them: what a client reports of its own, and what it loads.

`exp_avg` and `exp_avg_sq` are the moments m and v. `momentum` and `rms` are m and s = sqrt(v) of
gradients that are clipped to the norm G (--grad_clip). No element of such a gradient exceeds G,
hence |m| <= G and s <= G: the grid on which they are summed is known before training. After t steps
|m| <= c_t s (see `adamw_step_bound`), also of averages. The grid may break that, and averages of
different rounds do: so m is cut to it whenever one of them is loaded.

All are corrected for their bias, and all clients have one count of steps, that of the run.

With --local_optimizer muon a matrix has one moment, Muon's momentum. It is `momentum` there, which
the clip bounds as well; nothing divides it, so nothing cuts it, and a client reports `rms` of zero,
of whose average nothing is read.

DES-LOC (Iacob et al. 2025, arXiv:2505.22549) averages parameters and moments each at their own
intervals, there v itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from fedrun.common.pinned import brought
from fedrun.training.optimizer import LocalOptimizer


def take(optimizer: LocalOptimizer, names: Collection[str]) -> dict[str, Tensor]:
    """The moments with these names after local training, (shared_size,) each. In the optimizer's
    memory, or in flat.grad: they have to be loaded again before the next step."""
    if "exp_avg" in names:
        return optimizer.bias_corrected_moments()
    config, state, found = optimizer.config, optimizer.state, {}
    if names:
        assert config.grad_clip is not None
        steps, clip = optimizer.steps, _not_above(config.grad_clip, optimizer.flat.vector.dtype)
        # Rounding can exceed the clip, nothing else; NaN stays NaN.
        shared = optimizer.flat.shared_size
        if "momentum" in names:
            found["momentum"] = state["exp_avg"][:shared].div_(
                1 - config.beta1**steps).clamp_(-clip, clip)
        if "rms" in names:
            found["rms"] = optimizer.flat.grad[:shared].zero_()
            for part, v in optimizer.shared_squares():
                torch.div(v, 1 - config.beta2**steps, out=found["rms"][part]).sqrt_().clamp_(
                    max=clip)
    return found


def peaks(optimizer: LocalOptimizer, block: int) -> Tensor:
    """The largest `rms` in each block of this many elements, or `momentum` where matrices are that
    Muon updates, (blocks,): before `take`. Overwrites flat.grad."""
    config, steps, shared = optimizer.config, optimizer.steps, optimizer.flat.shared_size
    sizes = torch.abs(optimizer.state["exp_avg"][:shared], out=optimizer.flat.grad[:shared])
    sizes.div_(1 - config.beta1**steps)
    for part, v in optimizer.shared_squares():
        torch.div(v, 1 - config.beta2**steps, out=sizes[part]).sqrt_()
    whole = shared // block * block
    found = sizes[:whole].view(-1, block).amax(1)
    if whole < shared:
        found = torch.cat([found, sizes[whole:].amax(0, keepdim=True)])
    assert config.grad_clip is not None
    return found.clamp_(max=config.grad_clip)


def _not_above(limit: float, dtype: torch.dtype) -> float:
    """The largest number of a type that is at most the limit."""
    nearest = torch.tensor(limit, dtype=dtype)
    below = torch.nextafter(nearest, torch.zeros_like(nearest))
    return float(nearest) if float(nearest) <= limit else float(below)


def load(optimizer: LocalOptimizer, averages: Mapping[str, Tensor], steps: int,
         renewed: Collection[str]) -> None:
    """Load averages, (shared_size,) each, as if the optimizer had made this many steps: those that
    are `renewed` since the last round, and all if the client has not trained in it, or was left
    out."""
    if "exp_avg" in averages:
        optimizer.load_moments(averages, steps)
    elif len(renewed) == len(averages) or optimizer.steps != steps:
        _load_bounded(optimizer, averages, steps)
    elif renewed:
        _load_bounded(optimizer, {name: averages[name] for name in renewed}, steps)


def _load_bounded(optimizer: LocalOptimizer, averages: Mapping[str, Tensor], steps: int) -> None:
    """Load all of these, `momentum` or `rms` or both. Overwrites flat.grad."""
    config, m = optimizer.config, optimizer.begin_at(steps)["exp_avg"]
    if "momentum" in averages:
        shared = m[:optimizer.flat.shared_size]
        torch.mul(brought(averages["momentum"], shared), 1 - config.beta1**steps, out=shared)
    if "rms" in averages:
        for part, v in optimizer.shared_squares():
            rms = brought(averages["rms"][part], v)
            torch.mul(rms, rms, out=v).mul_(1 - config.beta2**steps)
    optimizer.cut_first_moment(steps)

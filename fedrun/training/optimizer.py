"""The local optimizer on the flat vector, its schedule, and saving and loading its moments.

AdamW, or with --local_optimizer muon Muon for matrices and AdamW for all between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from fedrun.common.pinned import brought
from fedrun.config import FederatedConfig, RunConfig
from fedrun.strategies.base import adamw_ratio
from fedrun.training.muon import muon_step
from fedrun.training.params import FlatParams

ADAMW_IMPLEMENTATION: dict[str, Any] = {"fused": True}
SLICE = {"cpu": 1 << 16, "cuda": 1 << 24}  # elements; those of a CPU stay in its cache
BITS_OF_BF16 = -1 << 16  # of the 32 bits of an fp32


def scheduled_lr(config: RunConfig, step: int, steps: int) -> float:
    """Learning rate of step `step` (0, 1, ...) of `steps`.

    A linear warmup to --lr, then either constant or half a cosine towards zero (Loshchilov & Hutter
    2017, equation 5, without restarts).
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.lr_schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(steps - config.warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def between(flat: FlatParams) -> Iterator[slice]:
    """What is not in `flat.matrices`, as slices of the vector."""
    start = 0
    for part in flat.matrices:
        if part.start > start:
            yield slice(start, part.start)
        start = part.stop
    if start < flat.size:
        yield slice(start, flat.size)


class LocalOptimizer:
    """AdamW (Loshchilov & Hutter 2019) on all parameters of a worker's model, or with
    --local_optimizer muon on all but `flat.matrices`, which Muon updates.

    Uses torch's functional form: constructing an optimizer class imports torch's compiler, which
    takes longer than the rest of a process's start.

    total_steps: optimizer steps in the whole run, for the schedule.
    """

    def __init__(self, flat: FlatParams, config: RunConfig, total_steps: int) -> None:
        self.flat = flat
        self.config = config
        self.total_steps = total_steps
        self.muon = config.local_optimizer == "muon"
        self._counts_apart = bool(flat.own.numel() and isinstance(config, FederatedConfig)
                                  and config.averaged_moments)
        self._between = list(between(flat)) if self.muon else [slice(0, flat.size)]
        """What AdamW updates."""
        self.state: dict[str, Tensor] = {}
        """`step` (0-dim), `exp_avg` and `exp_avg_sq` (size,); empty before the first step. Of the
        parameters' type, but for `exp_avg` with --moments_dtype bf16. With Muon, `exp_avg` has its
        momentum where matrices are, and `exp_avg_sq` only what is between them, without gaps. Where
        moments are averaged, those of personal parameters are not: the averages have the run's
        count of steps, these the client's own, `own_step` (0-dim)."""
        self._moment = torch.bfloat16 if config.moments_dtype == "bf16" else flat.vector.dtype
        # A CUDA graph of `update` reads the rate from this memory; a number, it would repeat.
        self._rate = torch.zeros((), device=flat.vector.device) if flat.vector.is_cuda else None

    @property
    def steps(self) -> int:
        """Steps since the moments were zero. Reading it waits for a GPU."""
        return int(self.state["step"]) if self.state else 0

    def reset(self) -> None:
        """Reset the moments and the step count to zero in place."""
        for tensor in self.state.values():
            tensor.zero_()

    def _create_state(self) -> None:
        vector, squares = self.flat.vector, sum(part.stop - part.start for part in self._between)
        self.state = {"step": torch.zeros((), device=vector.device),
                      "exp_avg": torch.zeros_like(vector, dtype=self._moment),
                      "exp_avg_sq": vector.new_zeros(squares)}
        if self._counts_apart:
            self.state["own_step"] = torch.zeros((), device=vector.device)

    def step(self, number: int) -> None:
        """Update the parameters with flat.grad. number: of the step in the run, from 0."""
        rate = scheduled_lr(self.config, number, self.total_steps)
        self.update(rate if self._rate is None else self._rate.fill_(rate))

    @torch.no_grad()
    def update(self, rate: float | Tensor) -> None:
        """Update the parameters with flat.grad at this learning rate (0-dim, fp32). Waits for no
        value on a device."""
        config = self.config
        if not self.state:
            self._create_state()
        if config.grad_clip is not None:
            norm = torch.linalg.vector_norm(self.flat.grad)
            self.flat.grad.mul_((config.grad_clip / (norm + 1e-6)).clamp_(max=1.0))
        if self.muon:
            self._update_with_muon(rate)
        elif self._counts_apart:
            shared = self.flat.shared_size
            for part, step in ((slice(shared), "step"), (slice(shared, None), "own_step")):
                self._adamw(rate, self.flat.vector[part], self.flat.grad[part],
                            self.state["exp_avg"][part], self.state["exp_avg_sq"][part],
                            self.state[step])
        elif self._moment == self.flat.vector.dtype:
            self._adamw(rate, self.flat.vector, self.flat.grad, self.state["exp_avg"],
                        self.state["exp_avg_sq"], self.state["step"])
        else:
            self._update_in_slices(rate)

    def _squares(self) -> Iterator[tuple[slice, Tensor]]:
        """Each part of the vector that AdamW updates, and its second moments."""
        done = 0
        for part in self._between:
            size = part.stop - part.start
            yield part, self.state["exp_avg_sq"][done:done + size]
            done += size

    def shared_squares(self) -> Iterator[tuple[slice, Tensor]]:
        """The same of what is shared alone."""
        for part, squares in self._squares():
            size = min(part.stop, self.flat.shared_size) - part.start
            if size > 0:
                yield slice(part.start, part.start + size), squares[:size]

    def _adamw(self, rate: float | Tensor, vector: Tensor, grad: Tensor, m: Tensor, v: Tensor,
               step: Tensor) -> None:
        config = self.config
        adamw([vector], [grad], [m], [v], [], [step], **ADAMW_IMPLEMENTATION, lr=rate,
              beta1=config.beta1, beta2=config.beta2, eps=config.eps,
              weight_decay=config.weight_decay, amsgrad=False, maximize=False)

    def _update_with_muon(self, rate: float | Tensor) -> None:
        flat, moment = self.flat, self.state["exp_avg"]
        for place in flat.matrices:
            matrix, grad, momentum = (vector[place.start:place.stop].view(place.shape)
                                      for vector in (flat.vector, flat.grad, moment))
            muon_step(matrix, grad, momentum, rate, self.config.weight_decay,
                      self.config.muon_momentum)
        before = self.state["step"].clone()
        for part, squares in self._squares():
            self._adamw(rate, flat.vector[part], flat.grad[part], moment[part], squares,
                        self.state["step"].copy_(before))

    def _update_in_slices(self, rate: float | Tensor) -> None:
        """The same with the first moment in bf16: a slice at a time is widened, updated, rounded,
        and cut to the largest ratio to the root of the second moment (`adamw_ratio`), which
        rounding may exceed and the bound of a step rests on."""
        config, vector, before = self.config, self.flat.vector, self.state["step"].clone()
        moment, squares, step = (self.state[n] for n in ("exp_avg", "exp_avg_sq", "step"))
        decayed = (config.beta1**2 / config.beta2) ** (before.double() + 1)
        ratio = ((1 - decayed).sqrt() * adamw_ratio(config.beta1, config.beta2)).to(vector.dtype)
        size = SLICE["cuda" if vector.is_cuda else "cpu"]
        for start in range(0, len(vector), size):
            part = slice(start, start + size)
            m = moment[part].to(vector.dtype)
            self._adamw(rate, vector[part], self.flat.grad[part], m, squares[part],
                        step.copy_(before))
            limit = torch.sqrt(squares[part]).mul_(ratio)
            limit.view(torch.int32).bitwise_and_(BITS_OF_BF16)  # rounds towards zero
            limit = limit.to(torch.bfloat16)
            torch.clamp(m.to(torch.bfloat16), -limit, limit, out=moment[part])

    def cut_first_moment(self, steps: int) -> None:
        """Cut m, of what is shared and AdamW updates, to the largest that it can be beside v after
        this many steps, because one of them was loaded or scaled. Overwrites flat.grad."""
        m, ratio = self.state["exp_avg"], adamw_ratio(self.config.beta1, self.config.beta2, steps)
        for part, v in self.shared_squares():
            largest = torch.sqrt(v, out=self.flat.grad[part]).mul_(ratio)
            torch.minimum(m[part], largest, out=m[part])
            torch.maximum(m[part], largest.neg_(), out=m[part])

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore a saved state; tensors already on the device are used in place."""
        device = self.flat.vector.device
        self.state = {name: tensor.to(device) for name, tensor in state.items()}

    def own_state(self) -> dict[str, Tensor]:
        """Copies of what belongs to personal parameters where moments are averaged; else nothing.
        """
        if not (self._counts_apart and self.state):
            return {}
        shared = self.flat.shared_size
        return {"own_step": self.state["own_step"].clone()} | {
            name: self.state[name][shared:].clone() for name in ("exp_avg", "exp_avg_sq")}

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore `own_state`; what is empty is that of a client before its first step."""
        if not self._counts_apart:
            return
        if not self.state:
            self._create_state()
        shared = self.flat.shared_size
        for name, own in (("own_step", self.state["own_step"]),
                          ("exp_avg", self.state["exp_avg"][shared:]),
                          ("exp_avg_sq", self.state["exp_avg_sq"][shared:])):
            if name in state:
                own.copy_(state[name])
                if state[name].is_cuda:  # memory of the store's stream: see Client.forget
                    state[name].record_stream(torch.cuda.current_stream())
            else:
                own.zero_()

    def bias_corrected_moments(self, copy: bool = False) -> dict[str, Tensor]:
        """AdamW's moments of what is shared, (shared_size,) each, corrected for their bias: in
        place, so that they have to be loaded again before the next step, or as copies.

        Corrected because the second moment of a first step is a thousandth of the squared gradient,
        too small for the grid on which squared gradients are summed.
        """
        steps = self.steps
        shared = self.flat.shared_size
        moments = {name: self.state[name][:shared] for name in ("exp_avg", "exp_avg_sq")}
        if copy:
            moments = {name: tensor.clone() for name, tensor in moments.items()}
        return {"exp_avg": moments["exp_avg"].div_(1 - self.config.beta1**steps),
                "exp_avg_sq": moments["exp_avg_sq"].div_(1 - self.config.beta2**steps)}

    def load_moments(self, moments: Mapping[str, Tensor], steps: int) -> None:
        """Restore bias-corrected moments, (shared_size,) each, as they were after `steps` steps."""
        state = self.begin_at(steps)
        for name, beta in (("exp_avg", self.config.beta1), ("exp_avg_sq", self.config.beta2)):
            moment = state[name][:self.flat.shared_size]
            torch.mul(brought(moments[name], moment), 1 - beta**steps, out=moment)

    def begin_at(self, steps: int) -> dict[str, Tensor]:
        """The state, with this count of steps."""
        if not self.state:
            self._create_state()
        self.state["step"].fill_(steps)
        return self.state

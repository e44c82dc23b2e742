"""Muon: a matrix steps along its averaged gradient, whose singular values are made nearly equal.

Jordan et al. (2024), kellerjordan.github.io/posts/muon, with the scale of Liu et al. (2025,
arXiv:2502.16982), which lets one learning rate and weight decay serve it and AdamW; the same as
torch.optim.Muon with adjust_lr_fn="match_rms_adamw". That one orthogonalises in bf16. Here it is
done in the parameters' type, and by operations of our own, so that no version of torch decides what
is computed, and a matrix exceeds the bound of a step (aggregation/bounds.py) by no rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedrun.strategies.base import muon_scale

COEFFICIENTS = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
SMALLEST_NORM = 1e-7


def orthogonalise(matrix: Tensor) -> Tensor:
    """(rows, columns) -> the same singular vectors with singular values of 0.68 to 1.21, but for
    those below 0.0015 of the Frobenius norm, which stay smaller.

    By Newton-Schulz iterations: each maps the singular values s to a s + b s^3 + c s^5.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    norm = torch.linalg.vector_norm(matrix).clamp(min=SMALLEST_NORM)
    x: Tensor = (matrix.T if tall else matrix) / norm
    for _ in range(ITERATIONS):
        gram = x @ x.T  # (shorter side, shorter side)
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def muon_step(matrix: Tensor, grad: Tensor, momentum: Tensor, rate: float | Tensor,
              weight_decay: float, decay: float) -> None:
    """Update a matrix and its momentum, (rows, columns) each, in place. rate: the learning rate;
    decay: --muon_momentum."""
    momentum.lerp_(grad, 1 - decay)
    # Made here, so it lies as it does in every process; a client's state may come from a file, with
    # bytes that lie otherwise, and products may then round otherwise.
    step = orthogonalise(grad.lerp(momentum, decay))  # as Nesterov's momentum
    matrix.mul_(1 - rate * weight_decay)
    matrix.sub_(step.mul_(rate * muon_scale(max(matrix.shape))))

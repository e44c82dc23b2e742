"""Estimates the diagonal of the Fisher information during local training.

The estimates reuse the gradients that local training computes anyway. With g a gradient of the mean
loss (nats per token) unless stated otherwise:

    batch      g^2 of the batch's mean loss; small where gradients within the batch cancel
    sequence   mean over sequences of g^2, where g is the gradient of a sequence's *summed*
               log-likelihood: the empirical Fisher (Kunstner et al. 2019, "Limitations of the
               Empirical Fisher Approximation", equation 3)
    corrected  mean(g^2) + (B - 1) Var(g) over microbatches of B sequences at fixed parameters, with
               the unbiased Var. A microbatch's g is a mean of B gradients, so E[g^2] = mu^2 +
               sigma^2 / B, and the estimate's expectation is mu^2 + sigma^2, as for single
               sequences
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedrun.model.base import Model
from fedrun.strategies.base import FisherSettings
from fedrun.training.params import FlatParams


class FisherEstimate:
    """Averages one estimate per batch over a round, in `diagonal` (size,).

    flat: of the model whose gradients are estimated from, so that `model.compute_grad` writes to
    flat.grad.
    """

    def __init__(self, flat: FlatParams, settings: FisherSettings) -> None:
        self.flat = flat
        self.settings = settings
        self.diagonal = torch.zeros_like(flat.vector)
        self._batches = 0
        corrected = settings.estimate == "corrected"
        self._mean = torch.zeros_like(flat.vector) if settings.estimate != "batch" else None
        self._spread = torch.zeros_like(flat.vector) if corrected else None

    def begin(self) -> None:
        """Start a client's round."""
        self.diagonal.zero_()
        self._batches = 0

    def gradient(self, model: Model, batch: Tensor) -> tuple[Tensor, int]:
        """Do what `model.compute_grad` does, and add this batch's estimate to `diagonal`.

        batch: (sequences, sequence_length). Returns the summed loss and the number of tokens.
        """
        self._batches += 1
        if self.settings.estimate == "batch":
            loss, tokens = model.compute_grad(batch)
            self.diagonal.addcmul_(self.flat.grad, self.flat.grad)
            return loss, tokens
        if self.settings.estimate == "sequence":
            return self._sequences(model, batch)
        return self._microbatches(model, batch)

    def _sequences(self, model: Model, batch: Tensor) -> tuple[Tensor, int]:
        assert self._mean is not None
        total, tokens, count = self._mean.zero_(), 0, len(batch)
        losses = []
        for sequence in batch.split(1):
            loss, tokens = model.compute_grad(sequence)
            self.diagonal.addcmul_(self.flat.grad, self.flat.grad, value=tokens**2 / count)
            total.add_(self.flat.grad, alpha=1 / count)  # sequences have equal token counts
            losses.append(loss)
        self.flat.grad.copy_(total)
        return torch.stack(losses).sum(), tokens * count

    def _microbatches(self, model: Model, batch: Tensor) -> tuple[Tensor, int]:
        assert self._mean is not None
        assert self._spread is not None
        count = self.settings.microbatches
        mean, spread = self._mean.zero_(), self._spread.zero_()
        losses, tokens = [], 0
        for seen, part in enumerate(batch.chunk(count), start=1):
            loss, part_tokens = model.compute_grad(part)
            losses.append(loss)
            tokens += part_tokens
            # Welford's running mean and sum of squared deviations avoid cancellation in fp32.
            gap = self.flat.grad - mean
            mean.add_(gap, alpha=1 / seen)
            spread.addcmul_(gap, self.flat.grad - mean)
        size = len(batch) // count
        self.diagonal.addcmul_(mean, mean)  # mean(g^2) = mean(g)^2 + spread / count
        self.diagonal.add_(spread, alpha=1 / count + (size - 1) / (count - 1))
        self.flat.grad.copy_(mean)
        return torch.stack(losses).sum(), tokens

    def finish(self) -> Tensor:
        """The round's mean estimate (size,).

        Zero outside --fisher_scope: the method's floor then makes the average there a plain one.
        """
        self.diagonal.div_(self._batches)
        scope, names = self.settings.scope, self.flat.names
        for name, view in self.flat.views(self.diagonal):
            if (scope == "mixers" and name not in names.mixers) or (
                    scope == "untied" and name == names.tied):
                view.zero_()
        return self.diagonal

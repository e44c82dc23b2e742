"""What training, evaluation and records ask of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from fedrun.model.names import ParameterNames


class Model(Protocol):
    """A causal language model: `Mamba2LM`, or `TransformersLM` for those of transformers.

    All its parameters are trained, and a tied weight is one of them. It has no dropout, and nothing
    outlives a step but the parameters. input_ids are (b, l), integers; every token except a
    sequence's first is predicted from those before it.
    """

    @property
    def names(self) -> ParameterNames:
        """What there is to say of its parameters' names."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters; of a tied weight's names the first."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The same without names."""

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits (b, l, vocab)."""

    def loss(self, input_ids: Tensor) -> tuple[Tensor, int]:
        """Summed cross-entropy in nats, 0-dim, and the number of tokens predicted."""

    def compute_grad(self, input_ids: Tensor) -> tuple[Tensor, int]:
        """The same, and write the gradient of the mean loss to every .grad, whatever it held."""

    def entropy(self, input_ids: Tensor) -> tuple[Tensor, int]:
        """Summed entropy in nats of the predictions that `loss` scores, 0-dim, and their number."""


@runtime_checkable
class Generates(Protocol):
    """A model that can also write; one that cannot leaves out the sample texts of its runs."""

    def prefill(self, input_ids: Tensor) -> tuple[Tensor, Any]:
        """Read prompts (b, l): logits of the last tokens (b, vocab), and a state."""

    def step(self, tokens: Tensor, state: Any) -> Tensor:
        """Read one more token a sequence, (b,): logits (b, vocab). Updates `state` in place."""

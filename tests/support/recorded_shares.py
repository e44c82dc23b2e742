"""recorded_fedrun, with what a site must not send in SECRETS: its term with its share of the noise,
before the mask, or the gradients of its sequences; keys of noise, and the digests of its terms."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedrun.__main__ import main
from fedrun.federation import private_gradient
from fedrun.federation.noise import Noise
from fedrun.secure.noise import NoiseKey

importlib.import_module("tests.support.recorded_fedrun")  # records what is sent
SECRETS = Path(os.environ["SECRETS"])
clip, add_to, round_key = Noise.clip, Noise.add_to, NoiseKey.round_key
gradients: Any = private_gradient
clip_gradient = gradients.clip_


def keep(content: bytes) -> None:
    with (SECRETS / f"rank{os.environ['RANK']}").open("ab") as file:
        file.write(content)


def clipped(noise: Noise, client: int, update: Tensor) -> bool:
    finite = clip(noise, client, update)
    keep(update.numpy().tobytes())
    return finite


def added(noise: Noise, aggregator: Any, *args: Any) -> None:
    keep(aggregator.buffer.numpy().tobytes())
    add_to(noise, aggregator, *args)
    keep(aggregator.buffer.numpy().tobytes())


def keyed(self: NoiseKey, binding: Mapping[str, str | int]) -> bytes:
    made = round_key(self, binding)
    keep(made)
    return made


def clipped_gradient(gradient: Tensor, most: float) -> bool:
    finite: bool = clip_gradient(gradient, most)
    keep(gradient[:8000].numpy().tobytes())
    return finite


gradients.clip_ = clipped_gradient
changed: Any = Noise
changed.clip, changed.add_to = clipped, added
NoiseKey.round_key = keyed  # type: ignore[method-assign]

if __name__ == "__main__":
    main()

"""Every setting of a run, as frozen dataclasses: what `--help` shows and a run folder records.

A field's type says what its flag accepts and the docstring under it is the help text (flags.py
turns fields into flags). `__post_init__` raises a ValueError that names the flag for values that
cannot work. Torch is not imported, so that `--help` and a wrong flag answer at once.
"""

from __future__ import annotations

from fedrun.config.central import CentralConfig
from fedrun.config.federated import INT4_COHORT, INT8_COHORT, FederatedConfig
from fedrun.config.shared import Dtype, Partition, RunConfig

__all__ = ["INT4_COHORT", "INT8_COHORT", "CentralConfig", "Dtype", "FederatedConfig", "Partition",
           "RunConfig"]

"""The settings that centralised and federated runs share."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from fedrun.common.errors import is_component, require
from fedrun.data.hub import CACHE_DIR
from fedrun.data.text_options import COLUMN, GIVEN, TextOptions, require_dataset, text_options_of
from fedrun.model.config import ModelConfig, ModelShape

Dtype = Literal["auto", "bf16", "fp32", "fp64"]
Partition = Literal["contiguous", "shuffled", "dirichlet", "documents", "by_source"]


@dataclass(frozen=True)
class RunConfig:
    """The settings that centralised and federated runs share."""

    method: str
    """The command: central, or the name of an aggregation method."""

    # ---- model
    config: str = "pure_ssm_1_layer"
    """A preset's name (tiny, pure_ssm_1_layer, ...) or the path of a YAML file of settings, whose
    section `model:` gives the model's shape."""
    model: ModelShape = field(default_factory=ModelConfig)
    """The model's shape, by default Mamba-2's; set in the YAML file that --config names."""
    init_from: str | None = None
    """Start from trained weights: a run's folder, an exported folder or a model on the hub. Its
    shape and tokenizer are used too (--tokenizer only if it has none). none: from scratch."""

    # ---- training length
    n_epochs: int = 1
    """Epochs to train; --rounds overrides it. Raise it to train a finished run further."""
    epoch_passes: float = 1.0
    """Passes over the training data (for a client: over its shard) in one epoch."""
    rounds: int | None = None
    """Train for N global steps instead of whole epochs: rounds, or optimizer steps for central."""

    # ---- optimization
    lr: float = 5e-4
    """Peak learning rate of the local optimizer. The first setting to tune."""
    local_optimizer: Literal["adamw", "muon"] = "adamw"
    """What makes the local steps: AdamW, or Muon for the matrices inside the layers and AdamW for
    all else, embedding and head too (muon). Muon averages a matrix's gradients and makes all
    directions of its step about equally long, so that rare ones are learned as well. Its steps are
    as large as AdamW's, so --lr and --weight_decay serve both. It keeps one moment of a matrix,
    not two."""
    muon_momentum: float = 0.95
    """Muon's decay rate for the average of gradients. Where clients keep it for many local updates
    a lower one is better: an old average leads each of them its own way."""
    beta1: float = 0.9
    """AdamW's decay rate for the average of gradients, its first moment."""
    beta2: float = 0.999
    """AdamW's decay rate for the average of squared gradients, its second moment; must exceed the
    square of --beta1."""
    eps: float = 1e-8
    """What AdamW adds to the root of its second moment, by which it divides. A larger one (1e-5)
    lets parameters move less whose gradients are small, as those of rare tokens: of them clients
    with different texts know least. At least 1e-12."""
    moments_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which AdamW's first moment is kept between steps: bf16 takes 2 bytes a parameter less
    of each client. The second moment stays in fp32, since its steps are too small for bf16. Not
    with Muon, averages of moments, fed_sgd or --dtype fp64."""
    weight_decay: float = 0.01
    """Weight decay: each local step shrinks the parameters by the learning rate times this."""
    grad_clip: float | None = None
    """Scale a gradient down to this L2 norm if it is longer; helps when the loss has spikes. none:
    no clipping."""
    warmup: int = 0
    """Optimizer steps over which the learning rate rises linearly to --lr."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warmup: constant, or falling to zero along a cosine (cosine)."""
    batch_size: int = 4
    """Sequences in one optimizer step, of each client. If memory runs out, lower --micro_batch."""
    micro_batch: int | None = None
    """Most sequences that go through the layers at a time. The step is that of the whole batch but
    for the last bits. none: as many as suit the device."""
    sequence_length: int = 256
    """Tokens in one sequence."""
    seed: int = 0
    """Random seed of the initial weights, the batches and the partition."""

    # ---- data
    dataset: str = "wikitext-2"
    """The text: wikitext-2, wikitext-103, another hub id, a folder (FOLDER:CONFIG), a file or
    files ('a/*.txt') of text, JSON, CSV, Parquet or Arrow, compressed or not; or pydocs, Python's
    own documentation, which needs no network."""
    text_column: str | None = None
    """Column that holds the text; several (title,body) are joined by a blank line. none: the column
    text, or the only column with texts."""
    encoding: str | None = None
    """Encoding of text files, for example latin-1. none: UTF-8, or given by a byte-order mark."""
    validation_split: str | None = None
    """Split to validate on, for example test. none: validation, or else a share of the train
    rows."""
    val_fraction: float | None = None
    """Share of the train rows to hold out for validation, instead of using a validation split.
    none: a twentieth if there is no such split."""
    row_separator: Literal["newline", "none"] = "newline"
    """Whether each row that does not end with a newline gets one (newline), or is tokenised as it
    is (none), so that an empty row of WikiText is no token."""
    max_tokens: int | None = None
    """Read only the first rows of the train split, until they have N tokens, and of a validation
    split until they have N/20 (otherwise the held-out rows are among the first N tokens). bpe:N is
    then trained on the first N bytes. none: all rows."""
    stream: bool = False
    """Read a data set of the hub in its order without downloading it whole; with --max_tokens it
    may be larger than the disk."""
    tokenizer: str = "gpt2"
    """A tokenizer's hub name, folder or tokenizer.json, or bpe:N to train a byte-level BPE with N
    tokens on the training text, which needs no network."""
    sampling: Literal["shuffle", "replacement"] = "shuffle"
    """How batches are drawn: every sequence once per pass, in a new order (shuffle), or at random
    with replacement (replacement)."""
    partition: str = "contiguous"
    """How the training text is divided among clients: sequences in order (contiguous) or at random
    (shuffled); a Dirichlet mix of topics for each client (dirichlet); whole documents at random
    (documents); whole sources (by_source: packages of pydocs, articles of WikiText, top folders of
    text files); or column:NAME, where each value of the column is a source. With sources, held-out
    text is taken from every source. given: as given to fedrun.train(clients=...)."""
    alpha: float = 1.0
    """Concentration of --partition dirichlet: at 0.1 most clients have one topic, at 1 a few, at
    100 nearly the same mix."""
    size_skew: float = 0.0
    """How unequal the shards are: the standard deviation of the logarithm of their sizes, which are
    log-normal. 0: equal sizes."""

    # ---- evaluation
    val_freq: int = 30
    """Evaluate every N global steps, and always after the first and the last."""

    # ---- run folder
    data_dir: Path = Path("results")
    """Folder in which the run's own folder is created."""
    cache_dir: Path = CACHE_DIR
    """Folder for tokenised text and, unless HF_HOME, HF_HUB_CACHE or HF_DATASETS_CACHE is set, for
    what comes from the hub; shared by all runs on a machine."""
    run_name: str | None = None
    """Name of the run's folder. none: made of method, config and seed."""
    overwrite: bool = False
    """Start over, replacing any run in the folder. When a launcher restarts the job by itself, this
    is ignored and the run resumes."""
    resume: str = "auto"
    """Where to resume from: auto (the newest complete checkpoint in the run's folder, if any),
    never (start over), or another run's folder or checkpoint, used until this run has checkpoints
    of its own."""
    extend: bool = False
    """Allow training a run further although its learning rate depends on its length (--lr_schedule
    cosine), or its last round was not like the others (--overlap). The result differs from one long
    run's."""
    checkpoint_freq: int | None = 30
    """Save a checkpoint every N global steps and after the last one, in the background; the two
    newest are kept. none: no checkpoints, so the run cannot be resumed or trained further."""
    keep: Literal["last", "best"] = "last"
    """Which models to keep: the last one, or also the one with the lowest validation loss (best),
    in the folder best/, which every command accepts as a run. With --personal the loss is the mean
    of clients' own models, on text of their own where they hold it out."""
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also send the numbers of every round to this tracker, which must be installed (an extra)."""

    # ---- machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where workers compute; auto: on GPUs if there are any."""
    dtype: Dtype = "auto"
    """Type of matrix products; parameters, norms, decays and losses stay fp32 with bf16. auto: bf16
    if the workers' hardware supports it, else fp32. fp64 is for checking the others."""
    checkpoint_activations: bool = False
    """Keep only each layer's input for the backward pass, which computes the layer again: less
    memory, a third more arithmetic in the layers, the same bits. For Mamba-2 models."""
    threads: int = 1
    """CPU threads that train one client. The last bits of results depend on it, so it is never
    chosen by the machine."""
    deterministic: bool = False
    """Use deterministic kernels on GPUs too, which are slower. Without it the same bits are
    guaranteed on CPUs only."""
    timeout: float = 1800.0
    """Longest time for one round, in seconds; then the run ends with an error instead of hanging.
    Raise it if rounds are long."""

    # Where and how a run happens, not what comes out of it. A run is compared with another by what
    # --config and --device lead to (the settings, the kernels), not by how these were given.
    not_in_results: ClassVar[frozenset[str]] = frozenset(
        {"data_dir", "cache_dir", "run_name", "overwrite", "resume", "extend", "checkpoint_freq",
         "keep", "track", "timeout", "config", "device", "checkpoint_activations", "stream"})
    # What a run records of itself. May be changed on resume: training does not depend on it.
    only_in_records: ClassVar[frozenset[str]] = frozenset({"val_freq"})

    def __post_init__(self) -> None:
        for name, lowest in (("n_epochs", 1), ("warmup", 0), ("batch_size", 1), ("val_freq", 1),
                             ("sequence_length", 2), ("threads", 1)):
            value = getattr(self, name)
            require(value >= lowest, f"--{name}", value, f"an integer >= {lowest}")
        for name in ("rounds", "checkpoint_freq", "micro_batch"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name}", value, "an integer >= 1, or none")
        require(0 < self.lr < math.inf, "--lr", self.lr, "> 0")
        require(0 < self.epoch_passes < math.inf, "--epoch_passes", self.epoch_passes,
                "a finite number > 0")
        require(0 <= self.muon_momentum < 1, "--muon_momentum", self.muon_momentum, "in [0, 1)")
        require(0 <= self.beta1 < 1, "--beta1", self.beta1, "in [0, 1)")
        require(self.beta1**2 < self.beta2 < 1, "--beta2", self.beta2,
                "above the square of --beta1 and below 1 (otherwise AdamW's steps are unbounded)")
        # With a smaller one a square that float32 cannot hold would no longer bound a step.
        require(1e-12 <= self.eps < math.inf, "--eps", self.eps, "at least 1e-12")
        require(self.moments_dtype == "fp32" or self.dtype != "fp64", "--moments_dtype",
                self.moments_dtype, "fp32 with --dtype fp64")
        require(self.moments_dtype == "fp32" or self.local_optimizer == "adamw", "--moments_dtype",
                self.moments_dtype, "fp32 with --local_optimizer muon")
        require(0 <= self.weight_decay < math.inf, "--weight_decay", self.weight_decay, ">= 0")
        require(self.grad_clip is None or self.grad_clip > 0, "--grad_clip", self.grad_clip,
                "> 0, or none")
        require(0 < self.alpha < math.inf, "--alpha", self.alpha, "> 0")
        require(0 <= self.size_skew < math.inf, "--size_skew", self.size_skew, ">= 0")
        require(0 <= self.seed < 2**63, "--seed", self.seed, "an integer in [0, 2^63)")
        require_dataset(self.dataset)
        _ = self.text_options  # raises for options that no text could be read with
        column = self.partition.startswith(COLUMN) and self.partition != COLUMN
        require(column or self.partition in (*get_args(Partition), GIVEN), "--partition",
                self.partition, f"{', '.join(get_args(Partition))} or {COLUMN}NAME")
        require(isinstance(self.model, ModelConfig) or not self.checkpoint_activations,
                "--checkpoint_activations", "true", "false for a model of transformers")
        require(0 < self.timeout < math.inf, "--timeout", self.timeout, "> 0 (seconds)")
        require(self.run_name is None or is_component(self.run_name), "--run_name", self.run_name,
                "a folder name without slashes, not . or ..")

    @property
    def measures_own_models(self) -> bool:
        """Whether clients have models of their own that are measured, and are what counts."""
        return False

    @property
    def text_options(self) -> TextOptions:
        """The flags that decide which text is read."""
        return text_options_of(vars(self))

    @property
    def config_name(self) -> str:
        """The model's name in folder names: the preset's; `b` of `a/b.yaml`, of --init_from a/b."""
        if self.init_from is None:
            return Path(self.config).stem
        folder = os.path.abspath(Path(self.init_from).expanduser())  # `.` and `..` are not names
        return re.sub(r"[^\w-]", "_", Path(folder).name)

    @property
    def name(self) -> str:
        """Name of the run's folder in data_dir."""
        return self.run_name or f"central_config_{self.config_name}_seed_{self.seed}"

    @property
    def run_dir(self) -> Path:
        return self.data_dir.expanduser() / self.name

    def to_dict(self) -> dict[str, Any]:
        """The resolved config as JSON-able values, the strategy's settings on the same level."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["model"] = self.model.to_dict()
        if "strategy" in values:
            values |= dataclasses.asdict(values.pop("strategy"))
        return {name: str(value) if isinstance(value, Path) else value
                for name, value in values.items()}

    def results_dict(self) -> dict[str, Any]:
        """The part of `to_dict` that decides the results: if it is equal, so are the results."""
        ignored = self.not_in_results | self.only_in_records
        return {k: v for k, v in self.to_dict().items() if k not in ignored}

"""Every setting of a run, as frozen dataclasses: what `--help` says, what a run folder records.

The docstring under a field is its help text, its type says what the flag accepts, and
``__post_init__`` refuses values that cannot work, naming the flag (flags.py turns fields into
flags). Torch is not imported here, so that `--help` and a wrong flag answer at once.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from fedrun.common.errors import is_component, require
from fedrun.data.reading import COLUMN, Reading, reading_of, require_dataset
from fedrun.model.config import ModelConfig
from fedrun.strategies import FedAvg, Strategy
from fedrun.strategies.fed_fisher import FedFisher
from fedrun.strategies.fed_sgd import FedSGD

INT8_COHORT = 126  # clients whose sum fits eight bits with a level to either side of zero each


Dtype = Literal["auto", "bf16", "fp32", "fp64"]
Partition = Literal["contiguous", "shuffled", "dirichlet", "documents", "by_source"]


@dataclass(frozen=True)
class RunConfig:
    """What a centralised and a federated run have in common."""

    method: str
    """The command: central, or the name of an aggregation method."""
    config: str = "pure_ssm_1_layer"
    """Model preset by name, or the path of a YAML file of settings (with a `model:` section)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model's shape; set in the YAML file that --config names."""
    n_epochs: int = 1
    """Epochs to run; --rounds overrides it. A finished run is trained further by a larger one."""
    epoch_passes: float = 1.0
    """Passes over the training data (of a client: its shard) that one epoch takes."""
    rounds: int | None = None
    """Global steps to run (rounds; for central: optimizer steps) instead of whole epochs."""
    lr: float = 5e-4
    """Learning rate of AdamW."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.999
    """Decay of AdamW's second moment; above the square of --beta1."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    grad_clip: float | None = None
    """Largest norm of a gradient; longer ones are shortened to it."""
    warmup: int = 0
    """Optimizer steps over which the learning rate rises linearly to --lr."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """The learning rate after the warmup: constant, or falling to zero along a cosine."""
    batch_size: int = 4
    """Sequences in one optimizer step (of one client)."""
    sequence_length: int = 256
    """Tokens in a sequence."""
    sampling: Literal["shuffle", "replacement"] = "shuffle"
    """Batches are cut from a new permutation in every pass (shuffle), or drawn with replacement."""
    partition: str = "contiguous"
    """How the train sequences are dealt out to the clients of a federated run: in their order
    (contiguous); at random (shuffled); each client with a mix of topics drawn from a Dirichlet
    distribution (dirichlet); whole documents at random (documents); or whole sources (by_source),
    which are pydocs' packages, WikiText's articles, the top folders of text files; column:NAME
    takes the values of a column as sources. Where text is held out, it is of every source then."""
    alpha: float = 1.0
    """Concentration of --partition dirichlet: at 0.1 most clients have one topic, at 1 a few, at
    100 all have nearly the same mix."""
    size_skew: float = 0.0
    """Standard deviation of the logarithm of the shards' sizes, which are log-normal; 0: equal."""
    seed: int = 0
    """Seed of the initial weights, of every client's batches and of the partition."""
    val_freq: int = 30
    """Evaluate every so many global steps; the first and the last are always evaluated."""
    dataset: str = "wikitext-2"
    """wikitext-2, wikitext-103, another hub id, a folder (FOLDER:CONFIG), a file or files
    ('a/*.txt') of text, JSON, CSV, Parquet or Arrow, also compressed; or pydocs: the documentation
    that comes with Python, which needs no network."""
    text_column: str | None = None
    """The column that holds the text; several (title,body) are joined by a blank line. none: the
    column text, or the only one with texts."""
    encoding: str | None = None
    """Encoding of text files, latin-1 say; none: UTF-8, or what a byte-order mark says."""
    validation_split: str | None = None
    """The split to validate on, test say; none: validation, or else a share of the train rows."""
    val_fraction: float | None = None
    """Share of the train rows that is held out to validate on, instead of any validation split;
    none: a twentieth, where there is no such split."""
    tokenizer: str = "gpt2"
    """A tokenizer's hub name, folder or tokenizer.json, or bpe:N to train a byte-level BPE of N
    tokens on the training text (needs no network)."""
    init_from: str | None = None
    """Start from the weights of a run's folder, an exported folder or a model of the hub, with its
    shape and its tokenizer (the --tokenizer given where it has none), instead of from scratch."""
    data_dir: Path = Path("results")
    """Folder that receives the run's folder."""
    cache_dir: Path = Path("~/.cache/fedrun")
    """Folder for tokenised text, shared by all runs on a machine."""
    run_name: str | None = None
    """Name of the run's folder, instead of the one made from method, config and seed."""
    overwrite: bool = False
    """Begin anew, replacing whatever run the folder holds. Ignored when a launcher restarts the
    job by itself: it goes on."""
    resume: str = "auto"
    """Where to resume: auto from the newest whole checkpoint in the run's folder, if it has one;
    never: start over; or a folder, another run's or one of its checkpoints, to begin from unless
    the run has checkpoints of its own."""
    extend: bool = False
    """Train a run for another number of rounds or epochs although its learning rate depends on it
    (--lr_schedule cosine): the result differs from one long run's."""
    checkpoint_freq: int | None = 30
    """Global steps between saves of what the run needs to be resumed, made beside the training and
    after the last step; the last two are kept. none: never, and no training it further."""
    keep: Literal["last", "best"] = "last"
    """best: beside the last model, also keep the one with the lowest validation loss, in the run's
    best/ folder, which every command takes for a run's."""
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also send the numbers of every round there; each is an extra to install."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where workers compute; auto takes GPUs where there are any."""
    dtype: Dtype = "auto"
    """Type of the matrix products. Parameters, norms, decays and losses are fp32 with bf16 too;
    auto takes bf16 where the workers' hardware multiplies it, else fp32; fp64 is to check
    against."""
    threads: int = 1
    """CPU threads of a client's training. The results depend on it in the last bits, so it is a
    setting and never guessed from the machine."""
    deterministic: bool = False
    """Use deterministic kernels on GPUs too, which is slower: without it, equal bits are promised
    on CPUs only."""
    timeout: float = 1800.0
    """Seconds that one round may take before the run ends with a message instead of hanging."""

    # Settings that say where and how a run happens, not what comes out of it. What --config names
    # and --device amounts to (the kernels) is compared, not how it was given.
    neutral: ClassVar[frozenset[str]] = frozenset(
        {"data_dir", "cache_dir", "run_name", "overwrite", "resume", "extend", "checkpoint_freq",
         "keep", "track", "timeout", "config", "device"})
    # What is noted down of a run, which may change when it is resumed.
    recorded: ClassVar[frozenset[str]] = frozenset({"val_freq"})

    def __post_init__(self) -> None:
        check = require
        check(self.n_epochs >= 1, "--n_epochs", self.n_epochs, "a whole number of at least 1")
        check(self.rounds is None or self.rounds >= 1, "--rounds", self.rounds,
              "a whole number of at least 1")
        check(0 < self.lr < math.inf, "--lr", self.lr, "a number above 0")
        check(self.epoch_passes > 0, "--epoch_passes", self.epoch_passes, "a number above 0")
        check(0 <= self.beta1 < 1, "--beta1", self.beta1, "a number of at least 0 and below 1")
        check(self.beta1**2 < self.beta2 < 1, "--beta2", self.beta2,
              "a number above the square of --beta1 and below 1 (else steps have no bound)")
        check(0 <= self.weight_decay < math.inf, "--weight_decay", self.weight_decay,
              "a number of at least 0")
        check(self.grad_clip is None or self.grad_clip > 0, "--grad_clip", self.grad_clip,
              "a number above 0, or none")
        check(self.warmup >= 0, "--warmup", self.warmup, "a whole number of at least 0")
        check(self.batch_size >= 1, "--batch_size", self.batch_size, "a whole number of at least 1")
        check(self.sequence_length >= 2, "--sequence_length", self.sequence_length,
              "a whole number of at least 2")
        check(0 < self.alpha < math.inf, "--alpha", self.alpha, "a number above 0")
        check(0 <= self.size_skew < math.inf, "--size_skew", self.size_skew,
              "a number of at least 0")
        check(0 <= self.seed < 2**63, "--seed", self.seed, "a whole number from 0 to 2^63 - 1")
        require_dataset(self.dataset)
        _ = self.reading  # refuses what no text could be read with
        check(self.partition in get_args(Partition) or (self.partition.startswith(COLUMN)
              and self.partition != COLUMN), "--partition", self.partition,
              f"{' or '.join(get_args(Partition))} or {COLUMN}NAME")
        check(self.val_freq >= 1, "--val_freq", self.val_freq, "a whole number of at least 1")
        check(self.checkpoint_freq is None or self.checkpoint_freq >= 1, "--checkpoint_freq",
              self.checkpoint_freq, "a whole number of at least 1, or none")
        check(self.threads >= 1, "--threads", self.threads, "a whole number of at least 1")
        check(0 < self.timeout < math.inf, "--timeout", self.timeout, "a number of seconds above 0")
        check(self.run_name is None or is_component(self.run_name), "--run_name", self.run_name,
              "a folder's name without slashes, not . or ..")

    @property
    def reading(self) -> Reading:
        """How the dataset's text is read."""
        return reading_of({name: getattr(self, name) for name in (
            "text_column", "encoding", "val_fraction", "validation_split", "partition")})

    @property
    def config_name(self) -> str:
        """The preset's name as it appears in folder names: `a/b.yaml` is `b`."""
        return Path(self.config).stem

    @property
    def name(self) -> str:
        """Name of the run's folder under data_dir."""
        return self.run_name or f"central_config_{self.config_name}_seed_{self.seed}"

    @property
    def run_dir(self) -> Path:
        return self.data_dir.expanduser() / self.name

    def to_dict(self) -> dict[str, Any]:
        """The resolved config as JSON-able values; strategy settings lie beside the others."""
        def plain(value: Any) -> Any:
            if isinstance(value, Path):
                return str(value)
            if isinstance(value, ModelConfig):
                return value.to_dict()
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                return dataclasses.asdict(value)
            return value

        values = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        strategy: dict[str, Any] = values.pop("strategy", {})
        return values | strategy

    def results_dict(self) -> dict[str, Any]:
        """The part of `to_dict` that decides the results: two runs with equal ones are equal."""
        return {k: v for k, v in self.to_dict().items() if k not in self.neutral | self.recorded}


@dataclass(frozen=True)
class CentralConfig(RunConfig):
    """Centralised training: all the data, one model, one optimizer, one process."""

    batches: Literal["all", "clients", "one_client"] = "all"
    """What a step trains on: a batch from all the data, the concatenated batches of all clients of
    a federated run (clients: --batch_size is then of all together), or the batches of the first
    client, from its shard alone (one_client)."""
    num_clients: int = 4
    """Clients of that federated run (--batches clients and one_client)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_clients >= 1, "--num_clients", self.num_clients,
                "a whole number of at least 1")
        require(self.batches != "clients" or self.batch_size % self.num_clients == 0,
                "--batch_size", self.batch_size,
                f"a multiple of --num_clients {self.num_clients} for --batches clients")


@dataclass(frozen=True)
class FederatedConfig(RunConfig):
    """Federated training: each client's data stays with the client, models are aggregated."""

    strategy: Strategy = field(default_factory=FedAvg)
    """The aggregation method with its own settings."""
    num_clients: int = 4
    """Clients, each with a shard of its own; they are spread over the workers there are."""
    cohort: float | None = None
    """Clients that train in a round, drawn anew for each: their number (10), or their share of all
    (0.1); none: all of them."""
    local_updates: int = 1
    """Optimizer steps of every client in a round."""
    sync: Literal["round", "epoch"] = "round"
    """When clients receive the global model: at the start of every round, or, as in a study to be
    compared with, only of an epoch, while the server averages models that no client ever sees."""
    client_moments: Literal["keep", "reset", "average"] = "keep"
    """What becomes of a client's AdamW moments after a round: kept for its next, made anew, or
    averaged over the cohort in the updates' sum: 24 bytes a parameter instead of 4 (float: 12)."""
    client_store: Literal["memory", "disk"] = "memory"
    """Where a client's state (AdamW's moments, say) rests between its turns: in the host's memory,
    or in a file under the run's clients/, so that hundreds take the memory of two."""
    prox_mu: float = 0.0
    """Weight mu of FedProx's term (mu/2) |w - w_t|^2 in the clients' loss, w_t the global model;
    no effect at one local update, where w is w_t."""
    server: Literal["dedicated", "colocated"] = "dedicated"
    """Under torchrun, rank 0 only serves (dedicated), or is a worker as well (colocated)."""
    aggregation: Literal["exact", "float", "int8"] = "exact"
    """How the clients' updates are summed: exact (integers on a grid: the same bits in any number
    of processes; 4 bytes a parameter, more for some methods), float (floating point, without a
    bound on an update), or int8 (8 bits, 1.02 bytes a parameter; each client adds its rounding
    error to its next update)."""
    eval_clients: bool = False
    """Also evaluate every client's model before it is aggregated (client_val_ppls)."""
    save_client_deltas: bool = False
    """Also save every client's parameters and their change whenever the global model is saved."""

    neutral: ClassVar[frozenset[str]] = RunConfig.neutral | {"server", "client_store"}
    recorded: ClassVar[frozenset[str]] = RunConfig.recorded | {"eval_clients", "save_client_deltas"}

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_clients >= 1, "--num_clients", self.num_clients,
                "a whole number of at least 1")
        if self.cohort is not None:
            whole = self.cohort >= 1 and self.cohort == int(self.cohort)
            require(0 < self.cohort < 1 or (whole and self.cohort <= self.num_clients), "--cohort",
                    self.cohort, f"a whole number up to --num_clients {self.num_clients}, or a "
                    "share between 0 and 1")
            require(self.sync == "round", "--cohort", self.cohort,
                    "none with --sync epoch, whose clients train in every round")
        require(self.local_updates >= 1, "--local_updates", self.local_updates,
                "a whole number of at least 1")
        require(0 <= self.prox_mu < math.inf, "--prox_mu", self.prox_mu, "a number of at least 0")
        require(self.prox_mu == 0 or self.sync == "round", "--prox_mu", self.prox_mu,
                "0 with --sync epoch, whose clients do not know the global model")
        require(self.client_moments != "average" or self.sync == "round", "--client_moments",
                self.client_moments, "keep or reset with --sync epoch")
        if self.aggregation == "int8":
            self._check_int8()
        if isinstance(self.strategy, FedSGD):
            # A client makes no step of its own: settings of local training would do nothing.
            self._accept_only("for fed_sgd", local_updates=1, client_moments="keep", sync="round",
                              prox_mu=0, grad_clip=None)
        if isinstance(self.strategy, FedFisher) and self.strategy.fisher == "corrected":
            parts = self.strategy.fisher_microbatches
            require(self.batch_size % parts == 0, "--fisher_microbatches", parts,
                    f"a divisor of --batch_size {self.batch_size}")

    @property
    def cohort_size(self) -> int:
        """Clients that train in a round."""
        if self.cohort is None:
            return self.num_clients
        share = self.cohort * self.num_clients if self.cohort < 1 else self.cohort
        return max(1, round(share))

    def _check_int8(self) -> None:
        """Eight bits hold updates that each begin at the global model, of so many clients."""
        fits = set(self.strategy.sums) == {"delta"} and not self.strategy.weight_headroom
        require(fits, "--aggregation", "int8",
                f"exact or float for {self.method} (int8 carries only updates)")
        require(self.client_moments != "average", "--client_moments", self.client_moments,
                "keep or reset with --aggregation int8")
        require(self.cohort_size <= INT8_COHORT, "--cohort", self.cohort_size,
                f"up to {INT8_COHORT} clients in a round with --aggregation int8")
        self._accept_only("with --aggregation int8", sync="round")

    def _accept_only(self, why: str, **accepted: Any) -> None:
        for flag, value in accepted.items():
            require(getattr(self, flag) == value, f"--{flag}", getattr(self, flag),
                    f"{value} {why}".lower())

    def warnings(self) -> list[str]:
        """Settings that work but hardly do what was meant, each in a line (see unused.py too)."""
        found = self.strategy.warnings(self.local_updates)
        if self.client_moments == "reset" and self.local_updates == 1:
            found.append("--client_moments reset at --local_updates 1 makes every step AdamW's "
                         "first, which is sign descent")
        return found

    @property
    def name(self) -> str:
        method = "federated" if self.method == "fed_avg" else self.method
        return self.run_name or (f"{method}_config_{self.config_name}_lu_{self.local_updates}"
                                 f"_seed_{self.seed}")

"""Every setting of a run, as frozen dataclasses: what `--help` says, what a run folder records.

The docstring under a field is its help text, its type says what the flag accepts, and
``__post_init__`` refuses values that cannot work, naming the flag. Torch is not imported here, so
that `--help` and a wrong flag answer at once.

A value is looked up in this order, later ones win:
field default < configs/methods/<method>.yaml < --config < flags.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from fedrun.strategies import FedAvg, Strategy, strategy_class


def require(condition: bool, flag: str, value: object, accepted: str) -> None:
    """Raise the ValueError of a wrong setting: which flag, what it got, what it accepts."""
    if not condition:
        raise ValueError(f"{flag} {value}: accepted is {accepted}")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Mamba-2 model, in the letters of Dao & Gu (2024)."""

    n_layer: int = 1
    """Number of Mamba-2 blocks."""
    d_model: int = 512
    """Width of the residual stream."""
    d_state: int = 128
    """Size of the recurrent state of one channel (N)."""
    headdim: int = 64
    """Channels of one head (P); expand * d_model must be a multiple of it."""
    expand: int = 2
    """Inner width of a block as a multiple of d_model."""
    ngroups: int = 1
    """Groups of heads that share B and C (G)."""
    d_conv: int = 4
    """Taps of the causal depthwise convolution."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            require(value >= 1, f"model.{name} (--config)", value, "a whole number of at least 1")
        inner = self.expand * self.d_model
        require(inner % self.headdim == 0, "model.headdim (--config)", self.headdim,
                f"a divisor of expand * d_model = {inner}")
        heads = inner // self.headdim
        require(heads % self.ngroups == 0, "model.ngroups (--config)", self.ngroups,
                f"a divisor of the number of heads, {heads}")


Dtype = Literal["auto", "bf16", "fp32", "fp64"]


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
    """Passes over the training data; --rounds overrides it."""
    rounds: int | None = None
    """Global steps to run (rounds; for central: optimizer steps) instead of whole epochs."""
    lr: float = 5e-4
    """Learning rate of AdamW."""
    batch_size: int = 4
    """Sequences in one optimizer step (of one client)."""
    sequence_length: int = 256
    """Tokens in a sequence."""
    seed: int = 0
    """Seed of the initial weights and of every client's batches."""
    val_freq: int = 30
    """Evaluate every so many global steps; the first and the last are always evaluated."""
    dataset: str = "wikitext-2"
    """wikitext-2, wikitext-103, another hub id, a folder for load_dataset, text files ('a/*.txt'),
    or pydocs: the documentation that comes with Python, which needs no network."""
    tokenizer: str = "gpt2"
    """A tokenizer's hub name or folder, or bpe:N to train a byte-level BPE of N tokens on the
    training text (needs no network)."""
    data_dir: Path = Path("results")
    """Folder that receives the run's folder."""
    cache_dir: Path = Path("~/.cache/fedrun")
    """Folder for tokenised text, shared by all runs on a machine."""
    run_name: str | None = None
    """Name of the run's folder, instead of the one made from method, config and seed."""
    overwrite: bool = False
    """Replace a run folder that was made with other settings."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where workers compute; auto takes GPUs where there are any."""
    dtype: Dtype = "auto"
    """Type of the matrix products. Parameters, norms, decays and losses are fp32 with bf16 too; auto
    takes bf16 where the workers' hardware multiplies it, else fp32; fp64 is to check against."""
    threads: int = 1
    """CPU threads of a client's training. The results depend on it in the last bits, so it is a
    setting and never guessed from the machine."""
    timeout: float = 1800.0
    """Seconds that one round may take before the run ends with a message instead of hanging."""

    # Settings that say where and how a run happens, not what comes out of it.
    neutral: ClassVar[frozenset[str]] = frozenset(
        {"data_dir", "cache_dir", "run_name", "overwrite", "timeout"})

    def __post_init__(self) -> None:
        check = require
        check(self.n_epochs >= 1, "--n_epochs", self.n_epochs, "a whole number of at least 1")
        check(self.rounds is None or self.rounds >= 1, "--rounds", self.rounds,
              "a whole number of at least 1")
        check(0 < self.lr < math.inf, "--lr", self.lr, "a number above 0")
        check(self.batch_size >= 1, "--batch_size", self.batch_size, "a whole number of at least 1")
        check(self.sequence_length >= 2, "--sequence_length", self.sequence_length,
              "a whole number of at least 2")
        check(0 <= self.seed < 2**63, "--seed", self.seed, "a whole number from 0 to 2^63 - 1")
        check(self.val_freq >= 1, "--val_freq", self.val_freq, "a whole number of at least 1")
        check(self.threads >= 1, "--threads", self.threads, "a whole number of at least 1")
        check(0 < self.timeout < math.inf, "--timeout", self.timeout, "a number of seconds above 0")
        check(self.run_name is None or (bool(self.run_name) and Path(self.run_name).name
              == self.run_name), "--run_name", self.run_name, "a folder's name without slashes")

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
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                return dataclasses.asdict(value)
            return value

        values = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        strategy: dict[str, Any] = values.pop("strategy", {})
        return values | strategy

    def results_dict(self) -> dict[str, Any]:
        """The part of `to_dict` that decides the results: two runs with equal ones are equal."""
        return {k: v for k, v in self.to_dict().items() if k not in self.neutral}


@dataclass(frozen=True)
class CentralConfig(RunConfig):
    """Centralised training: all the data, one model, one optimizer, one process."""


@dataclass(frozen=True)
class FederatedConfig(RunConfig):
    """Federated training: each client's data stays with the client, models are aggregated."""

    strategy: Strategy = field(default_factory=FedAvg)
    """The aggregation method with its own settings."""
    num_clients: int = 4
    """Clients, each with a shard of its own; they are spread over the workers there are."""
    local_updates: int = 1
    """Optimizer steps of every client in a round."""
    sync: Literal["round", "epoch"] = "round"
    """When clients receive the global model: at the start of every round, or, as in a study whose
    numbers can be compared so, only at the start of an epoch while the server goes on averaging
    models that no client ever sees."""
    client_state: Literal["keep", "reset"] = "keep"
    """What becomes of a client's AdamW moments after a round: kept for its next, or made anew."""
    server: Literal["dedicated", "colocated"] = "dedicated"
    """Under torchrun, rank 0 only serves (dedicated), or is a worker as well (colocated)."""
    reduce: Literal["exact", "float"] = "exact"
    """Sum updates as integers on a fixed-point grid, equal to the bit whatever the number of
    processes, or as floats, for comparison."""
    eval_clients: bool = False
    """Also evaluate every client's model before it is aggregated (client_val_ppls)."""
    save_client_deltas: bool = False
    """Also save every client's parameters and their change whenever the global model is saved."""

    neutral: ClassVar[frozenset[str]] = RunConfig.neutral | {"server"}

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_clients >= 1, "--num_clients", self.num_clients,
                "a whole number of at least 1")
        require(self.local_updates >= 1, "--local_updates", self.local_updates,
                "a whole number of at least 1")

    @property
    def name(self) -> str:
        method = "federated" if self.method == "fed_avg" else self.method
        return self.run_name or (f"{method}_config_{self.config_name}_lu_{self.local_updates}"
                                 f"_seed_{self.seed}")


# ---- fields as settings -------------------------------------------------------------------------

@dataclass(frozen=True)
class Setting:
    """One field of a dataclass, seen as a flag."""

    name: str
    kind: type
    choices: tuple[str, ...]
    optional: bool
    default: Any
    help: str

    def parse(self, value: Any, where: str) -> Any:
        """A value of the field's type from a flag's text or a YAML value; ValueError names it."""
        if self.optional and (value is None or value == "none"):
            return None
        try:
            if self.kind is bool:
                return {"true": True, "false": False}[str(value).lower()]
            if self.choices:
                return {c: c for c in self.choices}[str(value)]
            if self.kind is int:
                number = float(value)
                return {True: int(number)}[number.is_integer() and not isinstance(value, bool)]
            return self.kind(value)
        except (KeyError, ValueError, TypeError, OverflowError):
            what = " or ".join(self.choices) or {bool: "true or false", int: "a whole number",
                                                 float: "a number"}.get(self.kind, "a text")
            raise ValueError(f"{where}{value}: accepted is {what}") from None


def settings(cls: type) -> dict[str, Setting]:
    """The fields of a dataclass that can be set by flags and YAML keys, by name."""
    helps: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            helps |= _docstrings(base)
    hints = typing.get_type_hints(cls)
    found = {}
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        if f.name == "method" or dataclasses.is_dataclass(hint):
            continue
        args = typing.get_args(hint)
        optional = isinstance(hint, types.UnionType) and type(None) in args
        choices = args if typing.get_origin(hint) is Literal else ()
        kind = str if choices else next(a for a in args if a is not type(None)) if args else hint
        found[f.name] = Setting(f.name, kind, choices, optional, f.default, helps[f.name])
    return found


def _docstrings(cls: type) -> dict[str, str]:
    """Field name -> the string literal that follows the field in the class body."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    return {a.target.id: " ".join(s.value.value.split())
            for a, s in zip(tree.body, tree.body[1:], strict=False)
            if isinstance(a, ast.AnnAssign) and isinstance(a.target, ast.Name)
            and isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)
            and isinstance(s.value.value, str)}


# ---- from defaults, files and flags to a config -------------------------------------------------

def config_classes(method: str) -> tuple[type[RunConfig], type[Strategy] | None]:
    """The dataclasses whose fields are the method's flags."""
    if method == "central":
        return CentralConfig, None
    return FederatedConfig, strategy_class(method)


def method_settings(method: str) -> dict[str, Setting]:
    """All settings of a method, defaults as its YAML file leaves them."""
    run_class, strategy = config_classes(method)
    known = settings(run_class) | (settings(strategy) if strategy else {})
    defaults = _read_yaml(configs_dir() / "methods" / f"{method}.yaml", optional=True)
    unknown = set(defaults) - set(known)
    assert not unknown, f"configs/methods/{method}.yaml sets {unknown}"
    return {name: dataclasses.replace(s, default=s.parse(defaults[name], f"{name}: "))
            if name in defaults else s for name, s in known.items()}


def resolve(method: str, flags: Mapping[str, Any]) -> RunConfig:
    """The config of a run from the flags that were given (name -> value).

    Raises ValueError, naming the flag or the file and its key, for what is wrong or unknown.
    """
    run_class, strategy = config_classes(method)
    known = method_settings(method)
    values = {name: s.default for name, s in known.items()}
    if "config" in flags:
        values["config"] = flags["config"]
    path = find_config(str(values["config"]))
    chosen = _read_yaml(path)
    model = chosen.pop("model", {})
    for name, value in chosen.items():
        if name == "config" or name not in known:
            raise ValueError(f"--config {path}: unknown key {name!r}{closest(name, known)}")
        values[name] = known[name].parse(value, f"--config {path}: {name} ")
    values |= {name: known[name].parse(value, f"--{name} ") for name, value in flags.items()}

    if not isinstance(model, dict) or set(model) - set(settings(ModelConfig)):
        raise ValueError(f"--config {path}: the section `model` accepts "
                         + ", ".join(settings(ModelConfig)))
    shape = ModelConfig(**{k: settings(ModelConfig)[k].parse(v, f"--config {path}: model.{k} ")
                           for k, v in model.items()})
    rest: dict[str, Any] = {}
    if strategy:
        rest["strategy"] = strategy(**{k: values.pop(k) for k in settings(strategy)})
    return run_class(method=method, model=shape, **rest, **values)


def configs_dir() -> Path:
    """configs/ of the checkout, or the copy of it that an installed wheel carries."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def find_config(config: str) -> Path:
    """The YAML file behind --config: a preset's name, or a path that ends in .yaml or .yml."""
    if config.endswith((".yaml", ".yml")):
        path = Path(config).expanduser()
        require(path.is_file(), "--config", config, "a file that exists, or a preset's name")
        return path
    presets = {p.stem: p for p in sorted((configs_dir() / "models").glob("*.yaml"))}
    if config not in presets:
        raise ValueError(f"--config {config}: unknown preset{closest(config, presets)}; known are "
                         f"{', '.join(presets)}, or give the path of a .yaml file")
    return presets[config]


def closest(name: str, known: typing.Iterable[str]) -> str:
    """', did you mean ...?' where a known name is near, else nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""


def _read_yaml(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"--config {path}: cannot be read as YAML: "
                         + " ".join(str(error).split())) from None
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"--config {path}: a mapping of settings is expected")
    return content or {}

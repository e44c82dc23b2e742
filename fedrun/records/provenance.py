"""Whether a folder holds the run that is asked for: its settings, and its provenance, which is what
else decides the bits of its results (corpus, partition, kernels, versions).

Older runs know fewer settings than newer ones: a setting that their config.json lacks had its
default. Text, tokenizer and first weights are compared by digests of what was read, not by their
paths, so that a run can be resumed from another directory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedrun.common.errors import InputError
from fedrun.common.log import WARNING, log
from fedrun.config import RunConfig

MAX_VALUE_CHARS = 60  # of a value in a message: a damaged file may hold anything
LENGTH_SETTINGS = frozenset({"rounds", "n_epochs", "max_epsilon"})
INPUT_DIGESTS = {"dataset": "text", "tokenizer": "tokenizer", "init_from": "init_from",
                 "sites": "sites"}
"""Settings that name an input -> the key of the input's digest in a provenance."""

# Keys of a corpus's fingerprint: those that decide the text, the tokens of a text, and how these
# are cut into sequences; and names, which older digests include.
_TEXT = ("dataset_sha256", "document")
_TOKENIZER = ("tokenizer_sha256", "tokenizers_version", "vocab_size")
_CUT = ("train_tokens", "validation_tokens", "train_documents", "sequence_length",
        "train_sequences", "validation_sequences")
_NAMES = ("dataset", "tokenizer", "validation_from", "python_version")


def central_length(config: RunConfig, sequences: int) -> Length:
    """The steps of a central run on so many sequences. InputError if there would be none."""
    length = Length(config, int(sequences * config.epoch_passes) // config.batch_size)
    if length.steps == 0:
        raise InputError(f"--batch_size {config.batch_size}: must be at most {sequences}, the "
                         "number of sequences to train on")
    return length


@dataclass(frozen=True)
class Length:
    """How long a run is, in global steps: rounds, or a central run's optimizer steps."""

    config: RunConfig
    epoch: int
    """Steps of one epoch."""

    @property
    def steps(self) -> int:
        return self.config.rounds or self.config.n_epochs * self.epoch

    @property
    def flag(self) -> str:
        """The flag that decides the length, with its value."""
        return f"--rounds {self.config.rounds}" if self.config.rounds else (
            f"--n_epochs {self.config.n_epochs}")

    def of(self, recorded: Mapping[str, Any]) -> int | None:
        """The steps of a run with these recorded settings, over the same text; None if they are
        not integers."""
        rounds, epochs = recorded.get("rounds"), recorded.get("n_epochs", 1)
        steps = rounds if rounds is not None else epochs
        if type(steps) is not int:
            return None
        return steps if rounds is not None else steps * self.epoch


# ---- provenance ----------------------------------------------------------------------------------

def corpus_digests(fingerprint: Mapping[str, Any]) -> dict[str, str]:
    """Digests of a tokenised corpus: `text`, `tokenizer`, `content` (all that was read), and
    `corpus`, which includes the names it was given and is all that older checkpoints have."""
    def digest(keys: tuple[str, ...]) -> str:
        chosen = {key: fingerprint[key] for key in keys if key in fingerprint}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]

    read = _TEXT + _TOKENIZER + _CUT
    return {"text": digest(_TEXT), "tokenizer": digest(_TOKENIZER), "content": digest(read),
            "corpus": digest(read + _NAMES)}


def check_provenance(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Compare a checkpoint's provenance with this run's.

    Raises InputError if the text, the tokenizer, the shards, the kernels, the first weights or
    the code of the method differ. Another GPU, or another version of a library, is only a warning.
    """
    named = [("corpus", "corpus", "--dataset")] if "content" not in recorded else []
    for name, what, flag in (("text", "text", "--dataset"),
                             ("tokenizer", "tokenizer", "--tokenizer"),
                             ("content", "corpus", "--dataset"), *named,
                             ("sites", "file of the sites", "--sites"),
                             ("site_texts", "text of the sites", "--site_data"),
                             ("partition", "partition", "--partition"),
                             ("kernels", "kernels", "--device"),
                             ("init_from", "first model", "--init_from"),
                             ("plugin", "code of the method", "--plugin")):
        if name in recorded and recorded[name] != current.get(name):
            raise InputError(f"{flag}: the {what} of this run was {abbreviated(recorded[name])} "
                             f"and is {current.get(name)} now; --overwrite starts over")
    before = recorded.get("versions")
    before = before if isinstance(before, dict) else {}
    pairs = {name: (before.get(name, "unknown"), version)
             for name, version in current["versions"].items()}
    if gpu := current.get("gpu"):
        pairs["GPU"] = recorded.get("gpu", "unknown"), gpu
    if other := [f"{name} {abbreviated(there)}, now {here}"
                 for name, (there, here) in pairs.items() if there != here]:
        log(f"the last bits may differ: this run was started with {'; '.join(other)}", WARNING)


# ---- settings ------------------------------------------------------------------------------------

def conflicting_settings(config: RunConfig, recorded: Mapping[str, Any],
                         recorded_provenance: Mapping[str, Any], provenance: Mapping[str, Any]
                         ) -> dict[str, tuple[Any, Any]]:
    """The settings that make the recorded run a different one from the one asked for: name ->
    (there, here).

    The length of a run does not count, nor do the names of an input whose digests, in the two
    provenances, are equal.
    """
    found = {}
    differing = differing_settings(config, recorded)
    if "sites" in provenance and "sites" in recorded_provenance:
        differing.pop("num_clients", None)  # follows from the file, of which digests are compared
    for name, (there, here) in differing.items():
        key = INPUT_DIGESTS.get(name, "")
        digests = [abbreviated(one.get(key)) for one in (recorded_provenance, provenance)]
        known = name in INPUT_DIGESTS and all(
            key in one for one in (recorded_provenance, provenance))
        if known and digests[0] != digests[1]:
            there, here = f"{there} ({digests[0]})", f"{here} ({digests[1]})"
        if name not in LENGTH_SETTINGS and not (known and digests[0] == digests[1]):
            found[name] = there, here
    return found


def differing_settings(config: RunConfig, recorded: Mapping[str, Any]
                       ) -> dict[str, tuple[Any, Any]]:
    """The settings that decide results and have another value in `recorded`: name -> (there, here).

    recorded: the content of a config.json of any age. The model's settings are named
    `model.n_layer`; with --init_from they follow from it. `--dtype auto` never differs, since it
    becomes the type that the run was started with.
    """
    mine = json.loads(json.dumps(config.results_dict()))
    theirs = _defaults(config) | {"model": {}} | dict(recorded)
    if config.init_from is not None:
        mine["model"] = theirs["model"]
    if isinstance(theirs["model"], dict):
        held = theirs.pop("model")
        shapes = mine.pop("model"), held if "transformers" in held else \
            _defaults(config.model) | held
        for values, shape in zip((mine, theirs), shapes, strict=True):
            values.update({f"model.{name}": value for name, value in shape.items()})
    if config.dtype == "auto":
        mine.pop("dtype")
    return {name: (theirs.get(name), value) for name, value in mine.items()
            if theirs.get(name) != value}


def settings_equal_on_all_ranks(config: RunConfig) -> dict[str, Any]:
    """The settings that every rank must be started with. Paths of inputs may differ."""
    values = config.to_dict()
    return {name: values[name] for name in values
            if name in (config.results_dict().keys() - INPUT_DIGESTS.keys()
                        ) | config.only_in_records | {"device"}}


def describe_differences(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Differences as one line: `lr 0.002 there, 0.001 here`."""
    return ", ".join(f"{name} {abbreviated(there)} there, {abbreviated(here)} here"
                     for name, (there, here) in differences.items())


def abbreviated(value: object) -> str:
    """A value as text, at most MAX_VALUE_CHARS of it and an ellipsis."""
    text = reprlib.repr(value) if isinstance(value, (dict, list)) else str(value)
    return text if len(text) <= MAX_VALUE_CHARS else text[:MAX_VALUE_CHARS] + "..."


def _defaults(settings: Any) -> dict[str, Any]:
    """The defaults of a dataclass's fields, as JSON has them, together with those of its method."""
    found = {f.name: f.default for f in dataclasses.fields(settings)
             if f.default is not dataclasses.MISSING}
    strategy = getattr(settings, "strategy", None)
    found |= _defaults(strategy) if strategy is not None else {}
    jsonable: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return jsonable

"""Whether a folder holds the run that is asked for: its settings, and what it was made with.

Older runs know fewer settings than newer ones: what their config.json lacks had its default. Text,
tokenizer and first weights are compared by what was read, not by how their paths were spelt, so
that a run can be resumed from another directory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedrun.common.errors import InputError
from fedrun.config import RunConfig

LONGEST_SHOWN = 60  # characters of a value in a message: a damaged file may hold anything
LENGTH = frozenset({"rounds", "n_epochs"})
READ = {"dataset": "text", "tokenizer": "tokenizer", "init_from": "init_from"}
"""Settings that name what is read -> the digest of it among what a run was made with."""

# Of a corpus's fingerprint: what decides the text, the tokens of a text, and how these are cut; and
# the names that were in the digest once.
_TEXT = ("dataset_sha256", "document")
_TOKENIZER = ("tokenizer_sha256", "tokenizers_version", "vocab_size")
_CUT = ("train_tokens", "validation_tokens", "train_documents", "sequence_length",
        "train_sequences", "validation_sequences")
_NAMES = ("dataset", "tokenizer", "validation_from", "python_version")


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
        """The flag that decides it, with its value."""
        return f"--rounds {self.config.rounds}" if self.config.rounds else (
            f"--n_epochs {self.config.n_epochs}")

    def of(self, held: Mapping[str, Any]) -> int | None:
        """The same of a run with these settings, over the same text; None where they are odd."""
        rounds, epochs = held.get("rounds"), held.get("n_epochs", 1)
        steps = rounds if rounds is not None else epochs
        if type(steps) is not int:
            return None
        return steps if rounds is not None else steps * self.epoch


# ---- what a run was made with --------------------------------------------------------------------

def corpus_digests(fingerprint: Mapping[str, Any]) -> dict[str, str]:
    """Digests of a tokenised corpus: of its text, its tokenizer, all that was read, and `corpus`,
    with the names it was given, which is all that older checkpoints have."""
    def digest(names: tuple[str, ...]) -> str:
        told = {name: fingerprint[name] for name in names if name in fingerprint}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    read = _TEXT + _TOKENIZER + _CUT
    return {"text": digest(_TEXT), "tokenizer": digest(_TOKENIZER), "content": digest(read),
            "corpus": digest(read + _NAMES)}


def check_provenance(then: Mapping[str, Any], now: Mapping[str, Any],
                         say: Callable[[str], None]) -> None:
    """ValueError where the text, the shards or the kernels are not those that a checkpoint was made
    with; a word where a version is not."""
    named = [("corpus", "corpus", "--dataset")] if "content" not in then else []
    for name, what, flag in (("text", "text", "--dataset"),
                             ("tokenizer", "tokenizer", "--tokenizer"),
                             ("content", "corpus", "--dataset"), *named,
                             ("partition", "partition", "--partition"),
                             ("kernels", "kernels", "--device"),
                             ("init_from", "first model", "--init_from")):
        if name in then and then[name] != now[name]:
            raise InputError(f"{flag}: the {what} of this run was {shown(then[name])} and is "
                             f"{now[name]} now; --overwrite starts over")
    before = then.get("versions")
    before = before if isinstance(before, dict) else {}
    if other := [f"{name} {shown(before.get(name))}, now {version}"
                 for name, version in now["versions"].items() if before.get(name) != version]:
        say(f"warning: the last bits may differ: this run was begun with {'; '.join(other)}")


# ---- settings ------------------------------------------------------------------------------------

def other_settings(config: RunConfig, held: Mapping[str, Any], then: Mapping[str, Any],
                   now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings by which `held` is another run than the one asked for, however long either is.

    then, now: what the two were made with; where these agree on what was read, names of it do not
    matter.
    """
    found = {}
    for name, (there, here) in differing(config, held).items():
        digests = [shown(made.get(READ.get(name, ""))) for made in (then, now)]
        known = name in READ and all(READ[name] in made for made in (then, now))
        if known and digests[0] != digests[1]:
            there, here = f"{there} ({digests[0]})", f"{here} ({digests[1]})"
        if name not in LENGTH and not (known and digests[0] == digests[1]):
            found[name] = there, here
    return found


def differing(config: RunConfig, held: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that decide results and are others in `held`: name -> (there, here).

    held: a config.json's content, of any age. Those of the model are named `model.n_layer`. A
    `--dtype auto` differs from nothing, since it follows what the run began with.
    """
    mine = json.loads(json.dumps(config.results_dict()))
    theirs = _defaults(config) | {"model": {}} | dict(held)
    if isinstance(theirs["model"], dict):
        shapes = mine.pop("model"), _defaults(config.model) | theirs.pop("model")
        for values, shape in zip((mine, theirs), shapes, strict=True):
            values.update({f"model.{name}": value for name, value in shape.items()})
    if config.dtype == "auto":
        mine.pop("dtype")
    return {name: (theirs.get(name), value) for name, value in mine.items()
            if theirs.get(name) != value}


def alike_on_all_ranks(config: RunConfig) -> dict[str, Any]:
    """The settings that every rank has to be started with. Paths of what is read may differ."""
    shared = (config.results_dict().keys() - READ.keys()) | config.only_in_records | {"device"}
    return {name: value for name, value in config.to_dict().items() if name in shared}


def told(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Differences in a line: `lr 0.002 there, 0.001 here`."""
    return ", ".join(f"{name} {shown(there)} there, {shown(here)} here"
                     for name, (there, here) in differences.items())


def shown(value: object) -> str:
    """A value as a message can hold it."""
    text = reprlib.repr(value) if isinstance(value, (dict, list)) else str(value)
    return text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "..."


def _defaults(settings: Any) -> dict[str, Any]:
    """The defaults of a dataclass's fields, as JSON has them; a method's lie beside the others."""
    found = {f.name: f.default for f in dataclasses.fields(settings)
             if f.default is not dataclasses.MISSING}
    strategy = getattr(settings, "strategy", None)
    found |= _defaults(strategy) if strategy is not None else {}
    jsonable: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return jsonable

"""What the runs of a study left in their folders."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedrun.common.errors import InputError, one_line
from fedrun.common.files import DamagedFile, read_json
from fedrun.common.old_names import renamed
from fedrun.common.perplexity import perplexity
from fedrun.config import RunConfig
from fedrun.data.sites import read_sites
from fedrun.data.text_options import TextOptions
from fedrun.library.opened_run import Run
from fedrun.records.provenance import INPUT_DIGESTS, corpus_digests, differing_settings
from fedrun.records.run_dir import ENVIRONMENT
from fedrun.records.schema import CLIENTS_HALVES, CLIENTS_VAL_LOSS, read_field
from fedrun.tools.study_records import FAILED, PARAMETERS, count_parameters


def loss_halves(config: RunConfig) -> list[float] | None:
    """A finished run's losses on the two halves of the validation split, in nats per token; None if
    it is not finished.

    Of the global model, or with --personal and --eval_clients the mean of clients' own models.
    Infinite for a run that failed, for example because its learning rate is too large. Raises
    ValueError if the folder holds a run with other settings, or damaged files.
    """
    folder, run = config.run_dir, Run(config.run_dir)
    if not (folder / "config.json").exists():
        return None
    with _naming_damage():
        differences = differing_settings(config, renamed(run.config))
    if differences.keys() <= INPUT_DIGESTS.keys() and differences and _same_corpus(config) and (
            "sites" not in differences or _same_sites(config)):
        differences = {}
    if differences:
        raise InputError(f"study: {folder} holds a run with another {', '.join(differences)}; "
                         "remove it, or give the study another name")
    failed = (folder / FAILED).exists()
    if not failed and run.outcome != "finished":
        return None  # the run itself compares what it resumes from
    sites = getattr(config, "sites", None)
    if sites is not None and not _same_sites(config):
        raise InputError(f"study: {folder} holds a run with other sites than --sites {sites} has "
                         "now; remove it, or give the study another name")
    if failed:
        return [math.inf, math.inf]
    last = history(config)[-1]
    own = config.measures_own_models
    if own and CLIENTS_HALVES not in last:
        raise InputError(f"study: {folder} holds a run that has measured its global model alone, "
                         "not clients' own ones; remove it, or give the study another name")
    halves = last.get(CLIENTS_HALVES if own else "val_loss_halves")
    if not isinstance(halves, list) or len(halves) != 2:
        raise _damaged(f"{folder / 'training_history.json'} has no val_loss_halves at its end")
    return [number(loss) for loss in halves]


def val_ppl(record: Mapping[str, Any]) -> float:
    """The perplexity of a record on the whole validation split, of the same models."""
    if CLIENTS_VAL_LOSS in record:
        return perplexity(number(record[CLIENTS_VAL_LOSS]))
    return number(read_field(record, "val_ppl"))


def history(config: RunConfig) -> list[dict[str, Any]]:
    """The history of a finished run. ValueError if it is damaged."""
    path = config.run_dir / "training_history.json"
    with _naming_damage():
        records = Run(config.run_dir).history
    if not records or not all(isinstance(record, dict) for record in records):
        raise _damaged(f"{path} does not hold a list of records")
    return records


def parameters(config: RunConfig) -> int:
    """The number of parameters of a finished run's model, tied ones once. ValueError if its file is
    damaged."""
    with _naming_damage():
        recorded = read_json(config.run_dir / ENVIRONMENT, dict).get(PARAMETERS)
        return count_parameters(config.run_dir) if recorded is None else int(number(recorded))


@contextmanager
def _naming_damage() -> Iterator[None]:
    """Say what to do where a file of a run cannot be read."""
    try:
        yield
    except (OSError, DamagedFile, SafetensorError) as error:
        raise _damaged(one_line(error)) from None


def _damaged(what: str) -> InputError:
    return InputError(f"study: {what}; remove the run's folder and start the study again to repeat "
                      "it")


def number(loss: object) -> float:
    """A loss or perplexity from a history, in which null stands for infinity."""
    return float(loss) if isinstance(loss, (int, float)) else math.inf


def _same_corpus(config: RunConfig) -> bool:
    """Whether a run read the same text and tokenizer as `config` would, by other paths."""
    if config.init_from:
        return False
    return _made_with(config).get("content") == _content(
        config.dataset, config.tokenizer, config.sequence_length, config.cache_dir,
        config.text_options)


def _same_sites(config: RunConfig) -> bool:
    """Whether a run had the sites that the file of `config` has now."""
    path = getattr(config, "sites", None)
    return path is not None and _made_with(config).get("sites") == read_sites(path).digest()[:16]


def _made_with(config: RunConfig) -> dict[str, Any]:
    """The provenance of a run; {} if its folder does not say."""
    with _naming_damage():
        found = read_json(config.run_dir / ENVIRONMENT, dict).get("made_with")
    return found if isinstance(found, dict) else {}


@functools.cache
def _content(dataset: str, tokenizer: str, length: int, cache_dir: Path, options: TextOptions
             ) -> str:
    from fedrun.data.tokens import prepare
    data = prepare(dataset, tokenizer, length, cache_dir, options=options)
    return corpus_digests(data.fingerprint)["content"]

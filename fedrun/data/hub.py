"""The Hugging Face hub: whether it can be reached, where its files are kept, and its datasets."""

from __future__ import annotations

import functools
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from fedrun.common.errors import FedrunError, InputError, one_line
from fedrun.data.table_files import Table, is_text_type, records_at_once

HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[\w.-]+))?")
HUB_SECONDS = 5.0  # the hub counts as unreachable if it takes longer to answer
CACHE_DIR = Path("~/.cache/fedrun")
"""The default of --cache_dir."""
CACHE_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")
"""Variables with which a user tells the hub's libraries where to keep files."""
Loaded = TypeVar("Loaded")


class HubUnreachable(FedrunError, ConnectionError):
    """Something is needed from the hub, which does not answer; the message says what works."""


class HubFolders(NamedTuple):
    """Where the hub's libraries keep what they download, laid out as below HF_HOME; None: where
    they do by themselves."""

    hub: Path | None = None
    """Of models, tokenizers and a dataset's own files."""
    datasets: Path | None = None
    """Of datasets as the library prepares them."""


def from_hub(cache_dir: Path, load: Callable[[HubFolders], Loaded]) -> Loaded:
    """`load(folders)`, with the folders for what comes from the hub: in `cache_dir`, unless one of
    CACHE_VARIABLES says where.

    Without a network, what other programs have left in the libraries' own folders is found as well.
    Raises what `load` raises.
    """
    own = HubFolders()
    if any(os.environ.get(name) for name in CACHE_VARIABLES):
        return load(own)
    folder = cache_dir.expanduser().absolute()
    folders = HubFolders(folder / "hub", folder / "datasets")
    try:
        return load(folders)
    except Exception as error:  # the libraries raise many types for what is not in a cache
        if hub_answers() or isinstance(error, InputError):
            raise
        return load(own)


def hub_tables(dataset: str, hub_id: str, cache_dir: Path) -> dict[str, Table]:
    """The splits of a dataset, from the hub or from its cache on this machine.

    Args:
        dataset: the value of --dataset, for messages.
        hub_id: owner/name or owner/name:config.
        cache_dir: the value of --cache_dir.
    Raises:
        InputError: the hub has no such dataset, or it cannot be loaded.
        HubUnreachable: the hub cannot be reached, and the dataset is not in its cache.
    """
    return {split: dataset_table(f"{dataset}, split {split}", rows)
            for split, rows in load_from_hub(dataset, hub_id, cache_dir).items()}


def load_from_hub(dataset: str, hub_id: str, cache_dir: Path, streaming: bool = False
                  ) -> Mapping[str, Any]:
    """The splits of a dataset as the library has them: `datasets.Dataset`, or IterableDataset if
    `streaming`. Arguments and errors are those of `hub_tables`."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    asked = HUB_ID.fullmatch(hub_id)
    assert asked is not None, "local_files() refuses anything else"

    def load(folders: HubFolders) -> Any:
        folder = folders.datasets
        with _settings(folders.hub, offline=not hub_answers()):
            return datasets.load_dataset(asked["name"], asked["config"],
                                         cache_dir=None if folder is None else str(folder),
                                         **({"streaming": True} if streaming else {}))

    try:
        if streaming and not hub_answers():
            raise ConnectionError("no answer")
        return cast(Mapping[str, Any], from_hub(cache_dir, load))
    except Exception as error:  # the library raises many types for user errors
        refused = isinstance(error, datasets.exceptions.DatasetsError)
        if hub_answers() and (refused or not isinstance(error, OSError)):
            raise InputError(f"--dataset {dataset}: {one_line(error)}") from error
        raise hub_unreachable("--dataset", dataset, error) from None


def dataset_table(name: str, rows: Any) -> Table:
    """A `datasets.Dataset` as a table."""
    columns = {field.name: is_text_type(field.type) for field in rows.features.arrow_schema}
    return Table(name, columns, lambda names: _dataset_rows(rows, names, columns))


def _dataset_rows(rows: Any, names: Sequence[str], columns: Mapping[str, bool]
                  ) -> Iterator[tuple[Any, ...]]:
    present = [name for name in dict.fromkeys(names) if name in columns]
    chosen = rows.select_columns(present) if present else None
    most = records_at_once(rows.data.nbytes, rows.data.num_rows)
    for start in range(0, len(rows), most):
        count = min(most, len(rows) - start)
        values = {} if chosen is None else chosen[start:start + count]
        missing = [None] * count
        yield from zip(*(values.get(name, missing) for name in names), strict=True)


@functools.cache
def hub_answers() -> bool:
    """Whether the hub answers within `HUB_SECONDS`; asked once per process.

    Asking first saves time: the client libraries retry for up to a minute before they give up.
    """
    import http.client
    import ssl
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    answers: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=HUB_SECONDS).close()
            answers.append(True)
        except urllib.error.HTTPError as error:
            answers.append(error.code < 500)  # proxies answer 5xx for hosts they cannot reach
        except urllib.error.URLError as error:
            # A certificate unknown to Python may be known to the libraries, which have their own.
            answers.append(isinstance(error.reason, ssl.SSLError))
        except (OSError, ValueError, http.client.HTTPException):
            answers.append(False)

    if constants.HF_HUB_OFFLINE:
        return False
    # In a thread, because looking up the host's name has no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return answers == [True]


def hub_unreachable(flag: str, asked: str, error: Exception) -> HubUnreachable:
    """The error for `flag asked` when the hub is unreachable and its cache does not have it.

    To be raised `from None`: its message has what the libraries' long chain of errors says."""
    from huggingface_hub import constants

    # If the hub does not answer, only the cache's errors are informative: its configs, for example.
    informative = hub_answers() or isinstance(error, ValueError)
    reason = one_line(error) if informative else "no answer"
    return HubUnreachable(
        f"{flag} {asked}: no such file or folder, not in the hub's cache on this machine, and the "
        f"hub cannot be reached ({constants.ENDPOINT}: {reason}); to run without a network: "
        "--dataset pydocs --tokenizer bpe:8192"
    )


@contextmanager
def _settings(hub: Path | None, offline: bool) -> Iterator[None]:
    """In the block, as if HF_HUB_CACHE were `hub` (None: as it is), and HF_HUB_OFFLINE set if
    `offline`. The libraries read both only when they are imported, and `load_dataset` has no
    argument for the former."""
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if hub is not None:
        constants.HF_HUB_CACHE = str(hub)
    if offline:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        (constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE,
         datasets.config.HF_HUB_OFFLINE) = before

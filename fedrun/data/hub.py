"""The Hugging Face hub: whether it can be reached, and its datasets."""

from __future__ import annotations

import functools
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from fedrun.common.errors import InputError, one_line
from fedrun.data.table_files import Table, is_text_type

HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[\w.-]+))?")
HUB_SECONDS = 5.0  # the hub counts as unreachable if it takes longer to answer


def hub_tables(dataset: str, hub_id: str) -> dict[str, Table]:
    """The splits of a dataset, from the hub or from its cache on this machine.

    Args:
        dataset: the value of --dataset, for messages.
        hub_id: owner/name or owner/name:config.
    Raises:
        InputError: the hub has no such dataset, or it cannot be loaded.
        ConnectionError: the hub cannot be reached, and the dataset is not in its cache.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    asked = HUB_ID.fullmatch(hub_id)
    assert asked is not None, "local_files() refuses anything else"
    try:
        with nullcontext() if hub_answers() else _offline():
            splits = datasets.load_dataset(asked["name"], asked["config"])
    except Exception as error:  # the library raises many types for user errors
        refused = isinstance(error, datasets.exceptions.DatasetsError)
        if hub_answers() and (refused or not isinstance(error, OSError)):
            raise InputError(f"--dataset {dataset}: {one_line(error)}") from error
        raise hub_unreachable("--dataset", dataset, error) from error
    return {split: _table(f"{dataset}, split {split}", rows) for split, rows in splits.items()}


def _table(name: str, rows: Any) -> Table:
    columns = {field.name: is_text_type(field.type) for field in rows.features.arrow_schema}
    return Table(name, columns, lambda names: zip(
        *(rows[name][:] if name in columns else [None] * len(rows) for name in names), strict=True))


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


def hub_unreachable(flag: str, asked: str, error: Exception) -> ConnectionError:
    """The error for `flag asked` when the hub is unreachable and its cache does not have it."""
    from huggingface_hub import constants

    # If the hub does not answer, only the cache's errors are informative: its configs, for example.
    informative = hub_answers() or isinstance(error, ValueError)
    reason = one_line(error) if informative else "no answer"
    return ConnectionError(
        f"{flag} {asked}: no such file or folder, not in the hub's cache on this machine, and the "
        f"hub cannot be reached ({constants.ENDPOINT}: {reason}); to run without a network: "
        "--dataset pydocs --tokenizer bpe:8192"
    )


@contextmanager
def _offline() -> Iterator[None]:
    """Act as if HF_HUB_OFFLINE were set, which the libraries read only when they are imported."""
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before

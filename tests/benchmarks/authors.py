"""What averaging does to each client of a setting of the study of bytes, author by author.

    python -m tests.benchmarks.authors sqrt_int8_8     # a run by author and one on shuffled shards

A setting with `personal` has no model for all: each client's average is the shared one with its own
parameters in it, and the numbers at the end are means over the clients' models.

Trains the setting as it was tuned (results/bytes/table.json), once with whole authors for each
client and once with sequences dealt out at random. In the middle of each run, where the learning
rate is still high, it keeps the clients' models before a round's average, and the average; at the
end the last model. Their perplexities: on the held-out ends of each client's authors, on those of
all others, and on the authors of `../shared/data/books/unseen`. With shuffled shards, clients are
asked about the same authors, of whom they have seen no more than of others.

Writes results/bytes/authors.md.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

import fedrun
from fedrun.common.files import read_json, write_atomic
from fedrun.data.hub import CACHE_DIR
from fedrun.data.partition import client_shards
from fedrun.data.tokens import TokenData, prepare
from fedrun.federation.client import Client

BOOKS = Path("../shared/data/books")
OUT = Path("results/bytes")
SEED = 1
PARTITIONS = {"by_source": "by author", "shuffled": "shuffled"}
Models = dict[str, dict[str, Tensor]]


@contextlib.contextmanager
def kept(number: int, local_updates: int, models: Models) -> Iterator[None]:
    """In the block, models of a run are put here: the clients' after their training in this round,
    and the average of that round, which the next one starts from; if clients have parameters of
    their own, one for each."""
    healthy, patched = Client.train, Client  # type: Any, Any

    def train(client: Client, model: Any, steps: int, first_step: int, *args: Any, **how: Any
              ) -> Any:
        if first_step == number * local_updates:
            whose = f", client {client.index}" if client.flat.own.numel() else ""
            models.setdefault(f"average{whose}", copied(client))
        losses = healthy(client, model, steps, first_step, *args, **how)
        if first_step == (number - 1) * local_updates:
            models[f"client {client.index}"] = copied(client)
        return losses

    patched.train = train
    try:
        yield
    finally:
        patched.train = healthy


def copied(client: Client) -> dict[str, Tensor]:
    return {name: view.clone() for name, view in client.flat.views(client.flat.vector)}


def authors_of(data: TokenData, num_clients: int, seed: int) -> list[list[str]]:
    """The authors of each client where each has whole ones."""
    documents = data.load_documents()
    source = documents.source[documents.of_sequences(*data.train.shape)]
    return [[documents.sources[number] for number in np.unique(source[shard])]
            for shard in client_shards(data, num_clients, "by_source", 1.0, 0.0, seed)]


def texts(folders: Sequence[Path]) -> list[str]:
    """The rows of all files below these."""
    return [line for folder in folders for file in sorted(folder.rglob("*.txt"))
            for line in file.read_text(encoding="utf-8").splitlines()]


def perplexities(run: Path, models: Models, parts: Mapping[str, list[str]], cache: Path
                 ) -> dict[str, dict[str, float]]:
    """Of each model on each text, by the models' names."""
    found = {}
    for name, model in models.items():
        folder = run.with_name(f"{run.name}_of_a_model")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints", "best", "*.lock"))
        save_file(model, folder / "model.safetensors")
        opened = fedrun.open_run(folder)
        found[name] = {part: float(opened.evaluate(data=text, cache_dir=cache)["perplexity"])
                       for part, text in parts.items()}
        shutil.rmtree(folder)
    return found


def measured(flags: Mapping[str, Any], partition: str, books: Path, runs: Path, cache: Path
             ) -> dict[str, dict[str, float]]:
    """Perplexities of a run's models. runs: a folder for the run."""
    models = Models()
    settings = {name: value for name, value in flags.items() if name != "method"} | {
        "partition": partition, "dataset": str(books), "seed": SEED, "cache_dir": str(cache),
        "data_dir": str(runs), "run_name": partition}
    if settings.get("personal"):  # which the last checkpoint has
        settings["checkpoint_freq"] = settings["rounds"]
    middle = settings["rounds"] // 2
    with kept(middle, settings["local_updates"], models):
        run = fedrun.train(flags["method"], **settings)
    clients = range(settings["num_clients"]) if settings.get("personal") else [None]
    for client in clients:
        whose = "" if client is None else f", client {client}"
        models[f"the end{whose}"] = {
            name: p.detach() for name, p in run.model(client).named_parameters()}
    data = prepare(str(books), settings["tokenizer"], settings["sequence_length"], cache)
    authors = authors_of(data, settings["num_clients"], SEED)
    parts = {str(client): texts([books / "validation" / author for author in theirs])
             for client, theirs in enumerate(authors)}
    parts["unseen"] = texts([books / "unseen"])
    return perplexities(run.folder, models, parts, cache)


def table(name: str, partition: str, found: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each model; at the end means over the clients, whether they have one model or each
    its own."""
    clients = [part for part in found["client 0"] if part != "unseen"]

    def of(name: str, client: str) -> Mapping[str, float]:
        return found.get(f"{name}, client {client}") or found[name]

    def cells(model: Mapping[str, float], client: str) -> list[float]:
        rest = [other for other in clients if other != client]
        return [model[client], sum(model[other] for other in rest) / len(rest), model["unseen"]]

    def row(title: str, numbers: Sequence[float]) -> str:
        return f"| {title} | {' | '.join(f'{number:.1f}' for number in numbers)} |"

    rows = [f"{name}, {PARTITIONS[partition]}. Perplexity on the held-out text of", "",
            "| model | a client's own authors | the others' | unseen authors |",
            "|---|---|---|---|"]
    for client in clients:
        rows.append(row(f"client {client}, before the average",
                        cells(found[f"client {client}"], client)))
        rows.append(row("the average", cells(of("average", client), client)))
    ends = [cells(of("the end", client), client) for client in clients]
    rows.append(row("at the end of the run, all clients",
                    [sum(column) / len(ends) for column in zip(*ends, strict=True)]))
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("setting", help="of results/bytes/table.json")
    name = parser.parse_args().setting
    tuned = {row["setting"]: row["flags"] | row["best"]
             for row in read_json(OUT / "table.json", list)}
    with tempfile.TemporaryDirectory() as folder:
        tables = [table(name, partition, measured(tuned[name], partition, BOOKS, Path(folder),
                                                  CACHE_DIR)) for partition in PARTITIONS]
    print(*tables, sep="\n")
    write_atomic(OUT / "authors.md", "\n".join(tables).encode())


if __name__ == "__main__":
    main()

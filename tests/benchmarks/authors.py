"""What averaging does to each client of a setting of the study of bytes, author by author.

    python -m tests.benchmarks.authors sqrt_int8_8     # a run by author and one on shuffled shards
    python -m tests.benchmarks.authors muon_int8_8 --personal '*norm*' '*layers.1.*'    # three runs

A setting with `personal` has no model for all: each client's average is the shared one with its own
parameters in it, and the numbers at the end are means over the clients' models.

Trains the setting as it was tuned (results/bytes/table.json), once with whole authors for each
client and once with sequences dealt out at random. In the middle of each run, where the learning
rate is still high, it keeps the clients' models before a round's average, and the average; at the
end the last model. Their perplexities: on the held-out ends of each client's authors, on those of
all others, and on the authors of `../shared/data/books/unseen`. With shuffled shards, clients are
asked about the same authors, of whom they have seen no more than of others.

Writes results/bytes/authors.md. With --personal it trains by author alone: once with one model for
all, and once for each of these values of fedrun's --personal, at the same rate. It asks each
client's model of the end about the same texts, and writes results/bytes/personal.md, again after
every run.
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
def kept(number: int, models: Models) -> Iterator[None]:
    """In the block, models of a run are put here: the clients' after their training in this round,
    and the average of that round, which the next one starts from; if clients have parameters of
    their own, one for each."""
    healthy, patched = Client.train, Client  # type: Any, Any
    starts: list[int] = []  # of the rounds so far

    def train(client: Client, model: Any, steps: int, first_step: int, *args: Any, **how: Any
              ) -> Any:
        if first_step not in starts:
            starts.append(first_step)
        if len(starts) == number + 1:
            whose = f", client {client.index}" if client.flat.own.numel() else ""
            models.setdefault(f"average{whose}", copied(client))
        losses = healthy(client, model, steps, first_step, *args, **how)
        if len(starts) == number:
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


def trained(flags: Mapping[str, Any], partition: str, books: Path, runs: Path, cache: Path
            ) -> fedrun.Run:
    """A run of these settings. runs: a folder for the run."""
    settings = {name: value for name, value in flags.items() if name != "method"} | {
        "partition": partition, "dataset": str(books), "seed": SEED, "cache_dir": str(cache),
        "data_dir": str(runs), "run_name": partition}
    if settings.get("personal"):  # which the last checkpoint has
        settings["checkpoint_freq"] = settings["rounds"]
    return fedrun.train(flags["method"], **settings)


def at_the_end(run: fedrun.Run, flags: Mapping[str, Any]) -> Models:
    """The run's last model; of clients with parameters of their own, the last one of each."""
    clients = range(flags["num_clients"]) if flags.get("personal") else [None]
    return {"the end" if client is None else f"the end, client {client}": {
        name: p.detach() for name, p in run.model(client).named_parameters()}
        for client in clients}


def held_out(flags: Mapping[str, Any], books: Path, cache: Path) -> dict[str, list[str]]:
    """What the books of each client's authors end with, and those of unseen authors."""
    data = prepare(str(books), flags["tokenizer"], flags["sequence_length"], cache)
    authors = authors_of(data, flags["num_clients"], SEED)
    return {str(client): texts([books / "validation" / author for author in theirs])
            for client, theirs in enumerate(authors)} | {"unseen": texts([books / "unseen"])}


def measured(flags: Mapping[str, Any], partition: str, books: Path, runs: Path, cache: Path
             ) -> dict[str, dict[str, float]]:
    """Perplexities of a run's models, in the middle and at the end. runs: a folder for the run."""
    models = Models()
    with kept(flags["rounds"] // 2, models):
        run = trained(flags, partition, books, runs, cache)
    models |= at_the_end(run, flags)
    return perplexities(run.folder, models, held_out(flags, books, cache), cache)


def measured_at_the_end(flags: Mapping[str, Any], books: Path, runs: Path, cache: Path
                        ) -> dict[str, dict[str, float]]:
    """Perplexities of the models that a run by author ends with."""
    run = trained(flags, "by_source", books, runs, cache)
    return perplexities(run.folder, at_the_end(run, flags), held_out(flags, books, cache), cache)


def cells(found: Mapping[str, Mapping[str, float]], name: str, client: str) -> list[float]:
    """Of a client's model of this name, or of the one that all share: perplexity on the client's
    own authors, on the others' (mean of the clients), on unseen ones."""
    model = found.get(f"{name}, client {client}") or found[name]
    rest = [other for other in clients_of(model) if other != client]
    return [model[client], sum(model[other] for other in rest) / len(rest), model["unseen"]]


def clients_of(model: Mapping[str, float]) -> list[str]:
    return [part for part in model if part != "unseen"]


def mean_cells(found: Mapping[str, Mapping[str, float]], name: str) -> list[float]:
    """The means of `cells` over the clients."""
    each = [cells(found, name, client) for client in clients_of(next(iter(found.values())))]
    return [sum(column) / len(each) for column in zip(*each, strict=True)]


def table(name: str, partition: str, found: Mapping[str, Mapping[str, float]]) -> str:
    """A row for each model; at the end means over the clients, whether they have one model or each
    its own."""
    def row(title: str, numbers: Sequence[float]) -> str:
        return f"| {title} | {' | '.join(f'{number:.1f}' for number in numbers)} |"

    rows = [f"{name}, {PARTITIONS[partition]}. Perplexity on the held-out text of", "",
            "| model | a client's own authors | the others' | unseen authors |",
            "|---|---|---|---|"]
    for client in clients_of(found["client 0"]):
        rows.append(row(f"client {client}, before the average",
                        cells(found, f"client {client}", client)))
        rows.append(row("the average", cells(found, "average", client)))
    rows.append(row("at the end of the run, all clients", mean_cells(found, "the end")))
    return "\n".join(rows) + "\n"


def personal_table(name: str, found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A row for each value of --personal. found: perplexities of the last models, by that value;
    the first has one model for all."""
    shared = mean_cells(next(iter(found.values())), "the end")[0]
    clients = clients_of(next(iter(next(iter(found.values())).values())))
    columns = ["what stays at a client", *(f"client {client}" for client in clients), "mean",
               "÷ shared", "the others' authors", "unseen authors"]
    rows = [f"{name}, by author, at the end of the run. Perplexity of each client's own model on "
            "the held-out text of its own authors; then means over the clients' models.", "",
            f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for patterns, models in found.items():
        own, others, unseen = mean_cells(models, "the end")
        numbers = [*(f"{cells(models, 'the end', client)[0]:.2f}" for client in clients),
                   f"{own:.2f}", f"{own / shared:.4f}", f"{others:.2f}", f"{unseen:.2f}"]
        rows.append(f"| {patterns} | {' | '.join(numbers)} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("setting", help="of results/bytes/table.json")
    parser.add_argument("--personal", nargs="+", default=[], metavar="NAMES",
                        help="what stays at a client, a run for each; writes personal.md instead")
    arguments = parser.parse_args()
    name = arguments.setting
    tuned = {row["setting"]: row["flags"] | row["best"]
             for row in read_json(OUT / "table.json", list)}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.personal:
            found = {}
            for number, patterns in enumerate([None, *arguments.personal]):
                title = f"`{patterns}`" if patterns else "nothing: one model for all"
                found[title] = measured_at_the_end(
                    tuned[name] | ({"personal": patterns} if patterns else {}), BOOKS,
                    Path(folder) / str(number), CACHE_DIR)
                print(personal_table(name, found), flush=True)
                write_atomic(OUT / "personal.md", personal_table(name, found).encode())
            return
        tables = [table(name, partition, measured(tuned[name], partition, BOOKS, Path(folder),
                                                  CACHE_DIR)) for partition in PARTITIONS]
    print(*tables, sep="\n")
    write_atomic(OUT / "authors.md", "\n".join(tables).encode())


if __name__ == "__main__":
    main()

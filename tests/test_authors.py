"""The bench of authors, on a few made ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fedrun
from fedrun.data.tokens import prepare
from tests.benchmarks.authors import (
    Models,
    authors_of,
    kept,
    measured,
    measured_at_the_end,
    personal_table,
    table,
)

FLAGS: dict[str, Any] = {
    "method": "fed_avg", "config": "tiny_1_layer", "tokenizer": "bpe:300", "num_clients": 2,
    "sequence_length": 16, "batch_size": 2, "lr": 4e-3, "rounds": 4, "local_updates": 3,
    "val_freq": 1000}


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four authors, each with a language of a few words."""
    folder = tmp_path_factory.mktemp("books")
    for number, author in enumerate(("ann", "bea", "cid", "dan")):
        for split, lines in (("train", 60), ("validation", 6)):
            path = folder / split / author / "book.txt"
            path.parent.mkdir(parents=True)
            path.write_text("\n".join(f"{author} says {author * (line % 3 + 1)} {number}"
                                      for line in range(lines)))
    (folder / "unseen" / "eve").mkdir(parents=True)
    (folder / "unseen" / "eve" / "book.txt").write_text("eve says nothing that they said\n" * 9)
    return folder


def test_models_before_and_after_an_average(books: Path, tmp_path: Path) -> None:
    """With equal weights the average is that of the clients' models, up to the grid of the sum.
    Rounds may be of any length."""
    models = Models()
    with kept(2, models):
        run = fedrun.train("fed_avg", **{k: v for k, v in FLAGS.items() if k != "method"},
                           dataset=str(books), partition="by_source", weighting="uniform",
                           lr_schedule="cosine", local_updates_schedule="quadratic",
                           data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    assert run.outcome == "finished"
    assert set(models) == {"client 0", "client 1", "average"}
    for name, average in models["average"].items():
        mean = (models["client 0"][name] + models["client 1"][name]) / 2
        torch.testing.assert_close(average, mean, rtol=0, atol=1e-6)


def test_the_table(books: Path, tmp_path: Path) -> None:
    found = measured(FLAGS, "by_source", books, tmp_path / "runs", tmp_path / "cache")
    assert set(found) == {"client 0", "client 1", "average", "the end"}
    for client in ("0", "1"):  # has learned its own authors' words, and no other's
        other = "1" if client == "0" else "0"
        own = found[f"client {client}"]
        assert own[client] < 0.9 * own[other]
        assert own[client] < found[f"client {other}"][client]
    lines = table("a setting", "by_source", found).splitlines()
    assert lines[0] == "a setting, by author. Perplexity on the held-out text of"
    first = [float(cell) for cell in lines[4].split("|")[2:5]]
    assert first == pytest.approx([found["client 0"][part] for part in ("0", "1", "unseen")],
                                  abs=0.05)


def test_of_clients_with_parameters_of_their_own_each_has_its_own_model(
        books: Path, tmp_path: Path) -> None:
    found = measured(FLAGS | {"personal": "backbone.embedding.weight"}, "by_source", books,
                     tmp_path / "runs", tmp_path / "cache")
    both = ("0", "1")
    assert set(found) == {f"{name}client {k}" for k in both for name in ("", "average, ",
                                                                         "the end, ")}
    for client, other in (both, both[::-1]):  # its own words, after the average too
        for name in ("", "average, ", "the end, "):
            own = found[f"{name}client {client}"]
            assert own[client] < 0.9 * own[other]
            assert own[client] < found[f"{name}client {other}"][client]
    last = table("a setting", "by_source", found).splitlines()[-1]
    ends = [found[f"the end, client {k}"] for k in both]
    expected = [(ends[0]["0"] + ends[1]["1"]) / 2, (ends[0]["1"] + ends[1]["0"]) / 2,
                (ends[0]["unseen"] + ends[1]["unseen"]) / 2]
    assert [float(cell) for cell in last.split("|")[2:5]] == pytest.approx(expected, abs=0.05)


def test_the_table_of_what_stays_at_a_client(books: Path, tmp_path: Path) -> None:
    """Embeddings of their own teach clients their own words, and nothing of the others'."""
    found = {what: measured_at_the_end(
        FLAGS | flags, books, tmp_path / what, tmp_path / "cache") for what, flags in (
            ("nothing", {}), ("words", {"personal": "backbone.embedding.weight"}))}
    assert set(found["nothing"]) == {"the end"}
    assert set(found["words"]) == {"the end, client 0", "the end, client 1"}
    *_, shared, own = personal_table("a setting", found).splitlines()
    one, other = (found["words"][f"the end, client {client}"] for client in "01")
    mean = (one["0"] + other["1"]) / 2
    world = found["nothing"]["the end"]
    ratio = mean / ((world["0"] + world["1"]) / 2)
    assert [float(cell) for cell in own.split("|")[2:-1]] == pytest.approx(
        [one["0"], other["1"], mean, ratio, (one["1"] + other["0"]) / 2,
         (one["unseen"] + other["unseen"]) / 2], abs=0.005)
    assert one["1"] > 2 * one["0"]
    assert shared.split("|")[5].strip() == "1.0000"
    assert [float(cell) for cell in shared.split("|")[2:4]] == pytest.approx(
        [world["0"], world["1"]], abs=0.005)


def test_whose_authors_are_whose(books: Path, tmp_path: Path) -> None:
    data = prepare(str(books), "bpe:300", 16, tmp_path)
    theirs = authors_of(data, 2, 0)
    assert sorted(author for one in theirs for author in one) == ["ann", "bea", "cid", "dan"]
    assert [len(one) for one in theirs] == [2, 2]

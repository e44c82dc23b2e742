"""Partitions: every sequence has one owner, which depends on the seed alone."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrun.central import PooledClients, training_client
from fedrun.config import Partition
from fedrun.data.partition import Shards, apportion, client_shards, deal_whole, shard_sizes
from fedrun.data.text_options import TextOptions
from fedrun.data.tokens import TokenData, prepare
from fedrun.experiment import shards_of
from fedrun.federation.schedule import Schedule
from fedrun.flags import resolve
from fedrun.model.build import new_model
from fedrun.records.provenance import check_provenance
from fedrun.training.params import FlatParams
from fedrun.unused import idle
from tests.support.experiments import experiment_of
from tests.support.made_data import made
from tests.support.runs import ROOT, Run

BOOKS = ROOT.parent / "shared" / "data" / "books"

# ---- every partition ----------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=12, max_size=60),
       n_clients=st.integers(1, 5), partition=st.sampled_from(get_args(Partition)),
       alpha=st.floats(1e-3, 1e3), skew=st.sampled_from([0.0, 0.7, 2.0]),
       seed=st.integers(0, 2**63 - 1))
def test_every_sequence_has_one_owner_and_the_seed_decides(
        lengths: list[int], n_clients: int, partition: str, alpha: float, skew: float, seed: int
) -> None:
    data = made([length + 20 for length in lengths])  # so long that each owns a sequence
    n = len(data.train)
    shards = client_shards(data, n_clients, partition, alpha, skew, seed)
    assert len(shards) == n_clients
    np.testing.assert_array_equal(np.sort(np.concatenate(shards)), np.arange(n))
    assert all(shard.dtype == np.int64 and (np.diff(shard) > 0).all() for shard in shards)
    again = client_shards(data, n_clients, partition, alpha, skew, seed)
    assert all(np.array_equal(a, b) for a, b in zip(shards, again, strict=True))
    sizes = shard_sizes(n, n_clients, skew, seed)
    if partition in ("contiguous", "shuffled", "dirichlet"):
        assert [len(shard) for shard in shards] == sizes.tolist()
    else:
        unit = data.documents.of_sequences(*data.train.shape)
        if partition == "by_source":
            unit = data.documents.source[unit]
        owners = [set(unit[shard].tolist()) for shard in shards]
        assert all(owners), "nobody goes without"
        assert sum(map(len, owners)) == len(set(unit.tolist())), "no unit is divided"
        if skew == 0:
            largest = max(Counter(unit.tolist()).values())
            assert all(abs(len(shard) - size) <= largest
                       for shard, size in zip(shards, sizes, strict=True))


@given(n_clients=st.integers(1, 40), more=st.integers(0, 200), seed=st.integers(0, 9))
def test_contiguous_shards_are_the_near_equal_ranges(n_clients: int, more: int, seed: int) -> None:
    n = n_clients + more
    shards = client_shards(made([4 * n]), n_clients, "contiguous", 1.0, 0.0, seed)
    assert [shard.tolist() for shard in shards] == [
        list(range(k * n // n_clients, (k + 1) * n // n_clients)) for k in range(n_clients)]


@pytest.mark.parametrize("partition", ["shuffled", "dirichlet", "documents"])
def test_another_seed_is_another_partition(partition: str) -> None:
    data = made([30] * 40)
    first, second = (client_shards(data, 4, partition, 1.0, 0.0, seed)[0] for seed in (0, 1))
    assert not np.array_equal(first, second)


# ---- sizes --------------------------------------------------------------------------------------

@given(st.integers(0, 1000), st.lists(st.integers(0, 50), min_size=1, max_size=20))
def test_apportion_is_the_largest_remainders(total: int, shares: list[int]) -> None:
    if not sum(shares):
        shares[0] = 1
    whole = apportion(total, np.array(shares, dtype=np.float64))
    quotas = [Fraction(total * share, sum(shares)) for share in shares]
    assert whole.sum() == total
    for given_, quota in zip(whole.tolist(), quotas, strict=True):
        assert abs(given_ - quota) < 1 + Fraction(1, 10**9)
    up = [q - int(q) for q, w in zip(quotas, whole.tolist(), strict=True) if w > q]
    down = [q - int(q) for q, w in zip(quotas, whole.tolist(), strict=True) if w < q]
    if up and down:
        assert min(up) >= max(down) - Fraction(1, 10**9)


def test_sizes_are_log_normal_with_the_skew_as_their_spread() -> None:
    for skew in (0.3, 1.0, 2.0):
        sizes = shard_sizes(10**9, 5000, skew, seed=3)
        logs = np.log(sizes)
        assert abs(logs.std() - skew) < 0.03 * skew
        middle = np.abs(logs - logs.mean()) < skew
        assert abs(middle.mean() - 0.6827) < 0.02, "of a normal distribution"
    mild, strong = (shard_sizes(10**6, 50, skew, seed=3) for skew in (0.1, 1.5))
    np.testing.assert_array_equal(np.argsort(mild), np.argsort(strong))


# ---- whole units --------------------------------------------------------------------------------

def test_as_many_sources_as_clients_is_one_each() -> None:
    data = made([40, 4, 8, 100, 12] * 3, n_sources=5)
    source = data.documents.source[data.documents.of_sequences(*data.train.shape)]
    for skew in (0.0, 2.0):
        shards = client_shards(data, 5, "by_source", 1.0, skew, 1)
        assert sorted(list(set(source[shard].tolist())) for shard in shards) == [
            [0], [1], [2], [3], [4]]
    sizes = shard_sizes(len(data.train), 5, 2.0, 1)
    assert np.argmax(sizes) == np.argmax([len(shard) for shard in shards])


def test_units_go_to_the_client_furthest_below_its_size() -> None:
    unit = np.repeat([10, 11, 12, 13], [6, 5, 4, 3])
    owner = deal_whole(unit, np.array([9, 9]), "by_source", None)
    assert owner.tolist() == [0] * 6 + [1] * 5 + [1] * 4 + [0] * 3


def test_whole_units_are_nearly_as_even_as_any_deal() -> None:
    """The largest shard, against the smallest one of all deals: within Graham's bound for taking
    the largest first ("Bounds on Multiprocessing Timing Anomalies", 1969, theorem 2)."""
    random = np.random.default_rng(0)
    for clients, units in ((2, 9), (3, 8), (4, 7)):
        sizes = random.integers(1, 40, units)
        target = shard_sizes(int(sizes.sum()), clients, 0.0, 0)
        owner = deal_whole(np.repeat(np.arange(units), sizes), target, "by_source", None)
        best = min(max(np.bincount(deal, sizes, clients)) for deal in
                   itertools.product(range(clients), repeat=units))
        assert best <= max(np.bincount(owner)) <= (4 / 3 - 1 / (3 * clients)) * best + 1


@pytest.mark.skipif(not (BOOKS / "train").is_dir(), reason="the folder of books is not here")
def test_four_clients_have_sixteen_authors_each_and_equal_text(tmp_path: Path) -> None:
    """Bytes stand for tokens."""
    authors = sorted((BOOKS / "train").iterdir())
    sizes = np.array([sum(file.stat().st_size for file in author.iterdir()) // 1000
                      for author in authors])
    unit = np.repeat(np.arange(len(authors)), sizes)
    owner = deal_whole(unit, shard_sizes(len(unit), 4, 0.0, 0), "by_source", None)
    text = np.bincount(owner)
    assert [len(set(unit[owner == k])) for k in range(4)] == [16] * 4
    assert max(text) < 1.005 * min(text)


# ---- errors -------------------------------------------------------------------------------------

def dealt(data: TokenData, **flags: object) -> Shards:
    config: Any = resolve("fed_avg", flags)
    return shards_of(config, data)


def test_a_shard_that_is_too_small_is_named_with_what_is_accepted() -> None:
    data = made([40] * 90)
    flags: dict[str, object] = {"partition": "dirichlet", "size_skew": 2, "num_clients": 9,
                                "seed": 1}
    sizes = shard_sizes(900, 9, 2.0, 1).tolist()
    smallest = min(sizes)
    with pytest.raises(ValueError, match=(
            f"--partition dirichlet: client {sizes.index(smallest)} would train on {smallest} "
            f"sequences, fewer than a batch of {smallest + 1}; use --batch_size <= {smallest} "
            "or a smaller --size_skew or fewer --num_clients")):
        dealt(data, batch_size=smallest + 1, **flags)
    assert dealt(data, batch_size=smallest, **flags).sizes == sizes


def test_an_empty_shard_is_named() -> None:
    with pytest.raises(ValueError, match=r"client \d+ would train on 0 sequences, .*; use a "
                                         r"smaller --size_skew or fewer --num_clients"):
        dealt(made([40] * 9), partition="shuffled", size_skew=5, num_clients=12, batch_size=1)


@pytest.mark.parametrize(("partition", "what", "there"), [
    ("contiguous", "sequence", 42), ("documents", "document", 12), ("by_source", "source", 5)])
def test_more_clients_than_there_is_to_deal_out(partition: str, what: str, there: int) -> None:
    data = made([14] * 12)
    with pytest.raises(ValueError, match=(
            f"--num_clients 43: must be <= {there}: --partition {partition} gives every client a "
            f"{what}, and the train split has only {there}")):
        dealt(data, partition=partition, num_clients=43, batch_size=1)
    assert len(dealt(data, partition=partition, num_clients=there, batch_size=1).sizes) == there


def test_a_corpus_without_sources_names_the_flag(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("".join(f"Paragraph {n} says a thing.\nAnd another.\n\n" for n in range(200)))
    data = prepare(str(file), "bpe:300", 16, tmp_path)
    with pytest.raises(ValueError, match=r"--partition by_source: .*one.txt has no sources .each "
                                         r"document is a paragraph.; must be contiguous"):
        dealt(data, partition="by_source")
    assert len(dealt(data, partition="documents").sizes) == 4


def test_the_values_of_a_column_are_sources_and_no_client_has_anothers(tmp_path: Path) -> None:
    file = tmp_path / "posts.jsonl"
    file.write_text("".join(json.dumps({"text": f"{'abc'[n % 3]} " * 20, "user": f"user {n % 3}"})
                            + "\n" for n in range(120)))
    data = prepare(str(file), "bpe:300", 16, tmp_path,
                   TextOptions(partition="column:user"))
    shards = client_shards(data, 3, "column:user", 1.0, 0.0, 0)
    tokenizer = data.load_tokenizer()
    texts = [tokenizer.decode(data.train[shard[1:-1]].ravel().tolist()) for shard in shards]
    assert sorted("".join(set(text) - {" ", "\n"}) for text in texts) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="--num_clients 4: must be <= 3: --partition column:user "
                                         "gives every client a source"):
        client_shards(data, 4, "column:user", 1.0, 0.0, 0)
    by_source = prepare(str(file), "bpe:300", 16, tmp_path)
    with pytest.raises(ValueError, match=r"no sources \(each document is a row\).*column:NAME"):
        client_shards(by_source, 3, "by_source", 1.0, 0.0, 0)


@pytest.mark.parametrize(("flags", "message"), [
    ({"partition": "column:"}, "--partition column:"),
    ({"partition": "sorted"}, "contiguous, shuffled, dirichlet, documents, by_source or column"),
    ({"alpha": 0}, "--alpha 0"), ({"size_skew": -1}, "--size_skew -1"),
    ({"size_skew": "inf"}, "--size_skew inf")])
def test_wrong_values_name_the_flag(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve("fed_avg", flags)


def test_alpha_without_dirichlet_warns() -> None:
    config = resolve("fed_avg", {"alpha": 0.3})
    assert idle(config) == {"alpha": "--alpha 0.3 has no effect without --partition dirichlet"}
    assert not idle(resolve("fed_avg", {"alpha": 0.3, "partition": "dirichlet"}))


# ---- holdout, epochs, central -------------------------------------------------------------------

def test_the_holdout_of_a_shard_that_is_no_range() -> None:
    data = made([30] * 40)
    config: Any = resolve("fed_entropy", {"partition": "documents", "entropy_holdout": 0.25})
    shards = shards_of(config, data)
    whole = client_shards(data, 4, "documents", 1.0, 0.0, 0)
    for train, held, shard in zip(shards.train, shards.holdout, whole, strict=True):
        np.testing.assert_array_equal(np.concatenate([train, held]), shard)
        assert len(held) == len(shard) // 4
    other: Any = resolve("fed_entropy", {"partition": "documents", "seed": 1})
    assert shards.digest() != shards_of(other, data).digest()
    assert shards.digest() == shards_of(config, data).digest()


def test_a_checkpoint_of_other_shards_is_refused() -> None:
    """For example if another version of scikit-learn finds other topics in the same text."""
    provenance = {"corpus": "c", "partition": "one", "kernels": "own", "versions": {}}
    check_provenance(provenance, provenance)
    with pytest.raises(ValueError, match=r"--partition: .* was one and is two now"):
        check_provenance(provenance, provenance | {"partition": "two"})


def test_an_epoch_is_the_smallest_shards() -> None:
    data = made([40] * 90)
    config: Any = resolve("fed_avg", {"partition": "shuffled", "size_skew": 1.0, "n_epochs": 2})
    sizes = shards_of(config, data).sizes
    assert max(sizes) > 2 * min(sizes)
    assert Schedule(config, sizes).rounds == 2 * (min(sizes) // 4)


def test_central_takes_the_batches_of_the_same_clients(pydocs_tokens: TokenData) -> None:
    partition = {"partition": "dirichlet", "alpha": 0.2, "num_clients": 3}
    config: Any = resolve("central", {"config": "tiny", "batches": "clients", "batch_size": 6,
                                      "dtype": "fp32", **partition})
    federated: Any = resolve("fed_avg", partition)
    flat = FlatParams(new_model(config, pydocs_tokens.vocab_size, torch.device("cpu")))
    client = training_client(experiment_of(config, pydocs_tokens), flat)
    assert isinstance(client, PooledClients)
    shards = shards_of(federated, pydocs_tokens).train
    for (shard, _), theirs in zip(client.parts, shards, strict=True):
        np.testing.assert_array_equal(shard, theirs)


# ---- whole runs ---------------------------------------------------------------------------------

@pytest.mark.parametrize(("method", "partition"), [
    pytest.param("fed_avg", "dirichlet", marks=pytest.mark.soak),
    pytest.param("fed_entropy", "documents", marks=pytest.mark.slow)])
def test_unequal_clients_have_the_same_bits_in_1_and_3_processes(
        run: Run, method: str, partition: str) -> None:
    flags = ("--num_clients", 5, "--rounds", 3, "--partition", partition, "--alpha", 0.3,
             "--size_skew", 0.8)
    alone = run(method, *flags, name="p1")
    three = run(method, *flags, processes=3, name="p3")
    assert alone.code == three.code == 0, alone.output + three.output
    assert alone.bits == three.bits
    if method == "fed_avg":
        contiguous = run(method, "--num_clients", 5, "--rounds", 3, name="contiguous")
        assert contiguous.code == 0, contiguous.output
        assert contiguous.bits != alone.bits

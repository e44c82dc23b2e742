"""Each site reads and deals its own text, to the same clients as a simulation of all of them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedrun.common.errors import InputError
from fedrun.data import hub
from fedrun.data.partition import client_shards
from fedrun.data.site_texts import (
    deal_all,
    deal_site,
    read_all,
    read_site_text,
    sizes_digest,
    texts_digest,
)
from fedrun.data.sites import SiteEntry
from fedrun.data.tokenising import write_ids
from fedrun.data.tokens import TokenData, prepare
from tests.support.runs import CORPUS
from tests.support.site_files import THREE, public, sites_of, texts_of
from tests.support.texts import text_file

LENGTH, SEED, BATCH = 32, 3, 2


@pytest.fixture(scope="session")
def tokenizer(cache_dir: Path) -> Path:
    """Of the server's public text."""
    return prepare(str(CORPUS), "bpe:400", LENGTH, cache_dir).tokenizer_path


def entry(**dealing: Any) -> SiteEntry:
    return SiteEntry("north", public("north"), **dealing)


def read(where: Path | str, tokenizer: Path, tmp_path: Path, **dealing: Any) -> TokenData:
    return read_site_text(entry(**dealing), str(where), tokenizer, LENGTH, tmp_path / "cache")


def test_a_site_alone_deals_what_a_simulation_deals_it(tmp_path: Path, tokenizer: Path) -> None:
    """Also where its files lie in a folder of another name, which it reads in a process of its own
    that knows of no other site's text."""
    sites = sites_of(THREE)
    data = texts_of(tmp_path / "texts", THREE, files=11)  # 10.txt is before 2.txt everywhere
    texts = read_all(sites, data, tokenizer, LENGTH, tmp_path / "cache")
    together = deal_all(sites, texts, SEED, BATCH)
    assert len(together.sizes) == len(together.texts) == sites.num_clients
    for one in sites.sites:
        elsewhere = tmp_path / "z" / "another [name]" / one.name.upper()
        shutil.copytree(tmp_path / "texts" / one.name, elsewhere)
        text = read_site_text(one, f"{elsewhere}/*.txt", tokenizer, LENGTH,
                              tmp_path / f"cache of {one.name}")
        alone = deal_site(one, text, SEED, BATCH)
        for own, client in enumerate(sites.clients_of(one.name)):
            ours = alone.text_of(own, text)[alone.train[own]]
            theirs = together.text_of(client, texts["north"])[together.train[client]]
            np.testing.assert_array_equal(ours, theirs)
            assert len(ours) == together.sizes[client]
    owned = [tuple(map(tuple, together.texts[k][together.train[k]])) for k in range(5)]
    assert len(set(owned)) == 5


def test_a_site_deals_as_a_run_deals_its_corpus(tmp_path: Path, tokenizer: Path) -> None:
    text = read(CORPUS, tokenizer, tmp_path)
    for partition in ("contiguous", "shuffled", "documents"):
        dealt = deal_site(entry(clients=4, partition=partition, size_skew=0.5), text, SEED, BATCH)
        for ours, theirs in zip(dealt.train, client_shards(text, 4, partition, 1.0, 0.5, SEED),
                                strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_sources_are_the_folders_of_a_site(tmp_path: Path, tokenizer: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        text_file(tmp_path / name, 40 + 40 * len(list(tmp_path.iterdir())))
    text = read(tmp_path / "*" / "*.txt", tokenizer, tmp_path)
    dealt = deal_site(entry(clients=3, partition="by_source"), text, SEED, BATCH)
    documents = text.load_documents().of_sequences(*text.train.shape)
    assert sorted(documents[shard].tolist()[0] for shard in dealt.train) == [0, 1, 2]
    assert all(len(set(documents[shard].tolist())) == 1 for shard in dealt.train)


def test_all_text_is_trained_on_and_tokenised_once(
        tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = list[Path]()

    def watched(path: Path, *rest: Any) -> Any:
        written.append(path)
        return write_ids(path, *rest)

    monkeypatch.setattr("fedrun.data.building.write_ids", watched)
    file = text_file(tmp_path)
    text = read(file, tokenizer, tmp_path)
    assert len(written) == 1
    ids = text.tokenizer.encode(file.read_text(), add_special_tokens=False).ids
    np.testing.assert_array_equal(text.train.reshape(-1), ids[:text.train.size])
    assert len(ids) - text.train.size < LENGTH
    np.testing.assert_array_equal(text.train, text.validation)


@pytest.mark.parametrize("rounded_to", [1, 7, 64])
def test_sizes_are_rounded_down(rounded_to: int, tmp_path: Path, tokenizer: Path) -> None:
    text = read(CORPUS, tokenizer, tmp_path)
    whole, rounded = (deal_site(entry(clients=3, rounded_to=number), text, SEED, BATCH)
                      for number in (1, rounded_to))
    for all_of_it, kept in zip(whole.train, rounded.train, strict=True):
        assert len(kept) == rounded_to * (len(all_of_it) // rounded_to) > 0
        np.testing.assert_array_equal(kept, all_of_it[:len(kept)])


@pytest.mark.parametrize(("dealing", "message"), [
    ({"clients": 10_000}, r"site north: clients 10000: must be <= \d+: partition contiguous gives"),
    ({"rounded_to": 10_000}, "site north: partition contiguous: client 0 would train on 0 "
                             "sequences, fewer than a batch of 2; use a smaller rounded_to or "),
    ({"partition": "by_source"}, "site north: partition by_source: .* has no sources")])
def test_text_that_cannot_be_dealt_as_the_file_says(
        dealing: dict[str, Any], message: str, tmp_path: Path, tokenizer: Path) -> None:
    text = read(text_file(tmp_path), tokenizer, tmp_path)
    with pytest.raises(InputError, match=message) as raised:
        deal_site(entry(**dealing), text, SEED, BATCH)
    assert "--" not in str(raised.value)


def test_text_that_cannot_be_read(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
                                  ) -> None:
    def never(*given: object) -> None:
        raise AssertionError("the hub was asked for private text")

    monkeypatch.setattr(hub, "hub_tables", never)
    monkeypatch.setattr("fedrun.data.corpora.hub_tables", never)
    monkeypatch.chdir(tmp_path)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    binary = tmp_path / "binary.bin"
    binary.write_bytes(bytes(range(256)) * 20)
    for data, message in (
            ("pydocs", "--site_data pydocs: must be an existing file or folder, or a pattern"),
            ("wikitext-2", "--site_data wikitext-2: must be an existing file or folder"),
            ("north/texts", "--site_data north/texts: must be an existing file"),
            ("*.md", r"--site_data \*.md: must be an existing"),
            ("short.txt", "the train split of --site_data short.txt has only . tokens"),
            ("binary.bin", "--site_data binary.bin: no file can be read")):
        with pytest.raises(InputError, match=f"^site north: .*{message}"):
            read(data, tokenizer, tmp_path)
    with pytest.raises(InputError, match=r"^site north: .*text_column x"):
        read("short.txt", tokenizer, tmp_path, text_column="x")


def test_the_data_of_a_simulation_name_the_site(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(InputError, match=r"--site_data texts: must be a path with \{site\}"):
        read_all(sites_of(THREE), "texts", tokenizer, LENGTH, tmp_path / "cache")


def test_digests_of_sizes_and_of_texts(tmp_path: Path, tokenizer: Path) -> None:
    sites = sites_of(THREE)
    assert sizes_digest(sites, [1, 2]) != sizes_digest(sites, [2, 1])
    assert sizes_digest(sites, [1, 2]) != sizes_digest(sites_of({"north": {}}), [1, 2])
    data, found = texts_of(tmp_path / "texts", THREE), list[str]()
    for change in (0, 1):
        if change:
            file = tmp_path / "texts" / "east" / "0.txt"
            file.write_text(file.read_text().replace("e", "a", 1))
        found.append(texts_digest(read_all(sites, data, tokenizer, LENGTH, tmp_path / "cache")))
    assert found[0] != found[1]


# ---- what a site holds out -----------------------------------------------------------------------

@pytest.mark.parametrize("dealing", [
    {"partition": "contiguous"}, {"partition": "shuffled", "size_skew": 0.3},
    {"partition": "documents"}, {"rounded_to": 8}])
def test_what_is_held_out_is_nobodys(tmp_path: Path, tokenizer: Path, dealing: dict[str, Any]
                                     ) -> None:
    text, one = read(CORPUS, tokenizer, tmp_path), entry(clients=3, **dealing)
    count = len(text.train)
    numbered = dataclasses.replace(text, train=np.arange(count * LENGTH).reshape(count, LENGTH))
    dealt = deal_site(one, numbered, SEED, BATCH, 0.29)
    held, = dealt.held_out
    assert len(held) == count * 29 // 100
    rows = held[:, 0] // LENGTH
    assert sorted(set(rows.tolist())) == rows.tolist()
    assert np.ptp(rows) > count / 2, "from all of the text"
    owned = np.concatenate(dealt.train)
    assert not set(rows.tolist()) & set(owned.tolist())
    rounded = dealing.get("rounded_to", 1)
    assert count - len(held) - 3 * (rounded - 1) <= len(owned) <= count - len(held)
    assert sum(dealt.sizes) == len(owned)
    again = deal_site(one, numbered, SEED, BATCH, 0.29)
    np.testing.assert_array_equal(again.held_out[0], held)
    other = deal_site(one, numbered, SEED + 1, BATCH, 0.29)
    assert set(other.held_out[0][:, 0].tolist()) != set(held[:, 0].tolist())


def test_documents_stay_whole_but_for_what_is_held_out(tmp_path: Path, tokenizer: Path) -> None:
    text = read(CORPUS, tokenizer, tmp_path)
    document = text.load_documents().of_sequences(*text.train.shape)
    dealt = deal_site(entry(clients=3, partition="documents"), text, SEED, BATCH, 0.1)
    owners = [set(document[shard].tolist()) for shard in dealt.train]
    assert all(owners)
    assert sum(map(len, owners)) == len(set.union(*owners))


def test_a_site_alone_holds_out_what_it_does_in_a_simulation(tmp_path: Path, tokenizer: Path
                                                             ) -> None:
    sites = sites_of(THREE)
    texts = read_all(sites, texts_of(tmp_path / "texts", THREE), tokenizer, LENGTH,
                     tmp_path / "cache")
    together = deal_all(sites, texts, SEED, BATCH, 0.1)
    assert not deal_all(sites, texts, SEED, BATCH).held_out
    for number, one in enumerate(sites.sites):
        alone = deal_site(one, texts[one.name], SEED, BATCH, 0.1)
        np.testing.assert_array_equal(alone.held_out[0], together.held_out[number])
        for own, client in enumerate(sites.clients_of(one.name)):
            np.testing.assert_array_equal(alone.train[own], together.train[client])


def test_a_site_that_can_hold_out_nothing_or_all_is_refused(tmp_path: Path, tokenizer: Path
                                                            ) -> None:
    text = read(CORPUS, tokenizer, tmp_path)
    count = len(text.train)
    with pytest.raises(InputError, match=rf"^site north: --site_holdout 1e-06: must be at least "
                                         rf"1/{count}, or none of its {count} sequences is held"):
        deal_site(entry(), text, SEED, BATCH, 1e-6)
    with pytest.raises(InputError, match=r"^site north: partition contiguous: client 0 would "
                                         r"train on 1 sequences.* or a smaller --site_holdout or"):
        deal_site(entry(), text, SEED, BATCH, 0.99999)

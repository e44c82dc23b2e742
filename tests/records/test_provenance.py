"""Whether a folder holds the same run: settings of older runs, inputs read under other names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from fedrun.config import RunConfig
from fedrun.flags import resolve
from fedrun.records.provenance import (
    check_provenance,
    conflicting_settings,
    corpus_digests,
    describe_differences,
    differing_settings,
)
from tests.support.site_files import THREE, sites_file


def recorded_by(config: RunConfig) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return content


@pytest.mark.parametrize("method", ["central", "fed_fisher", "fed_yogi"])
def test_a_setting_that_an_older_run_lacks_had_its_default(method: str) -> None:
    config = resolve(method, {})
    for name in config.results_dict():
        recorded = recorded_by(config)
        del recorded[name]
        found = differing_settings(config, recorded)
        # A value that is not the default, as central's batch size, does differ.
        assert set(found) <= ({name} if name in ("method", "batch_size", "val_freq") else set())
    for name in recorded_by(config)["model"]:
        recorded = recorded_by(config)
        del recorded["model"][name]
        assert not differing_settings(config, recorded)


def test_settings_that_are_not_the_default_differ_from_a_run_that_lacks_them() -> None:
    config = resolve("fed_avg", {"config": "tiny", "lr": "1e-3", "weighting": "uniform"})
    recorded = recorded_by(config)
    del recorded["lr"], recorded["weighting"], recorded["model"]["n_layer"]
    assert differing_settings(config, recorded) == {
        "lr": (5e-4, 1e-3), "weighting": ("samples", "uniform"), "model.n_layer": (1, 2)}


@pytest.mark.parametrize("odd", [None, 7, [], "x" * 10**6, {"n_layer": [[]]}, [[]] * 10**5])
def test_a_message_stays_a_line_whatever_a_file_holds(odd: object) -> None:
    config = resolve("fed_avg", {})
    found = differing_settings(config, recorded_by(config) | {"model": odd, "lr": odd})
    assert len(describe_differences(found)) < 1000
    assert "0.0005 here" in describe_differences(found)


FINGERPRINT = {
    "dataset": "a/b.txt", "dataset_sha256": "d", "validation_from": "v", "tokenizer": "bpe:400",
    "tokenizer_sha256": "t", "tokenizers_version": "0.22", "vocab_size": 400, "train_tokens": 90,
    "validation_tokens": 9, "train_documents": 3, "document": "a paragraph",
    "python_version": "3.11", "sequence_length": 8, "train_sequences": 11,
    "validation_sequences": 1}


def test_a_corpus_is_compared_by_what_was_read(caplog: pytest.LogCaptureFixture) -> None:
    mine = corpus_digests(FINGERPRINT)
    # Checkpoints of earlier versions have only the digest of the whole fingerprint.
    whole = hashlib.sha256(json.dumps(FINGERPRINT, sort_keys=True).encode()).hexdigest()[:16]
    assert mine["corpus"] == whole
    now = {**mine, "partition": "p", "kernels": "own", "init_from": None,
           "versions": {"torch": "2"}}
    old = {"corpus": whole, "partition": "p", "kernels": "own", "versions": {"torch": "1"}}
    check_provenance(old, now)
    assert caplog.messages == [
        "the last bits may differ: this run was started with torch 1, now 2"]
    caplog.clear()
    renamed = now | corpus_digests(FINGERPRINT | {"dataset": "/c/a/b.txt", "tokenizer": "x"})
    check_provenance(now, renamed)
    assert not caplog.messages
    with pytest.raises(ValueError, match="--dataset: the corpus of this run was"):
        check_provenance(old, renamed)
    for change, flag in (({"dataset_sha256": "e"}, "--dataset: the text"),
                         ({"tokenizer_sha256": "e"}, "--tokenizer: the tokenizer"),
                         ({"train_tokens": 91}, "--dataset: the corpus")):
        with pytest.raises(ValueError, match=flag):
            check_provenance(now, now | corpus_digests(FINGERPRINT | change))


def test_another_gpu_and_other_libraries_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    now = {**corpus_digests(FINGERPRINT), "partition": "p", "kernels": "cuda: own",
           "init_from": None, "gpu": "H100", "versions": {"torch": "2", "triton": "3.6"}}
    check_provenance(now, now)
    assert not caplog.messages
    check_provenance(now | {"gpu": "A100", "versions": {"torch": "2", "triton": "3.5"}}, now)
    older = now | {"versions": {"torch": "2"}}
    del older["gpu"]
    check_provenance(older, now)
    assert caplog.messages == [
        "the last bits may differ: this run was started with triton 3.5, now 3.6; GPU A100, now "
        "H100",
        "the last bits may differ: this run was started with triton unknown, now 3.6; GPU unknown, "
        "now H100"]
    with pytest.raises(ValueError, match="--device: the kernels of this run was cuda: own and is "
                                         "cuda: split_conv1d_scan now"):
        check_provenance(now, now | {"kernels": "cuda: split_conv1d_scan"})


def test_sites_are_compared_by_what_their_file_says(tmp_path: Path) -> None:
    """Not by its path, nor by a number of clients that follows from it; a plain run's provenance
    does not know them."""
    path = sites_file(tmp_path, THREE)
    config = resolve("fed_avg", {"sites": path})
    recorded = recorded_by(config) | {"sites": "elsewhere.yaml", "num_clients": 4}
    same, other = {"sites": "aa", "versions": {}}, {"sites": "bb", "versions": {}}
    assert conflicting_settings(config, recorded, same, same) == {}
    assert conflicting_settings(config, recorded, other, same) == {
        "sites": ("elsewhere.yaml (bb)", f"{path} (aa)")}
    assert conflicting_settings(config, recorded, {}, same).keys() == {"sites", "num_clients"}
    for name, flag in (("sites", "--sites: the file of the sites"),
                       ("site_texts", "--site_data: the text of the sites")):
        check_provenance(same | {name: "aa"}, same | {name: "aa"})
        check_provenance({}, same | {name: "aa"})
        with pytest.raises(ValueError, match=f"{flag} of this run was bb and is aa now"):
            check_provenance(same | {name: "bb"}, same | {name: "aa"})
        with pytest.raises(ValueError, match=f"{flag} of this run was bb and is None now"):
            check_provenance({"versions": {}, name: "bb"}, {"versions": {}})

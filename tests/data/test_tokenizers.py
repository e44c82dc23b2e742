"""Tokenizers from others: files alone, words they do not know, code that comes with them."""

from __future__ import annotations

import ast
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from fedrun import cli
from fedrun.data.tokens import TokenData, prepare
from fedrun.model.pretrained import find_pretrained
from tests.support.runs import ROOT, SMALL, read_history, read_json


def tokens(folder: Path, tokenizer: Path | str, name: str = "tale.txt") -> TokenData:
    return prepare(str(folder / name), str(tokenizer), 16, folder / "cache")


def words(folder: Path, *known: str) -> Path:
    """A tokenizer.json with these words and neither an unknown token nor an end token."""
    model = models.WordLevel({word: n for n, word in enumerate(known)})
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def tale(folder: Path) -> tuple[str, ...]:
    """A text, and all its words."""
    text = "".join(f"of {n % 7} ships\n{n % 5} storms\n\n" for n in range(900))
    (folder / "tale.txt").write_text(text)
    return tuple(sorted(set(text.split())))


ASKS_FOR_CODE: dict[str, dict[str, object]] = {
    "tokenizer_config.json": {"tokenizer_class": "Mine",
                              "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}},
    "config.json": {"model_type": "mine", "auto_map": {
        "AutoConfig": "mine.MineConfig", "AutoTokenizer": ["mine.Mine", "mine.Mine"]}}}


@pytest.mark.parametrize("where", ASKS_FOR_CODE)
def test_code_that_comes_with_a_tokenizer_is_neither_run_nor_asked_for(
        where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    known = tale(tmp_path)
    folder = words(tmp_path / "theirs", *known).parent
    (folder / where).write_text(json.dumps(ASKS_FOR_CODE[where]))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
                                    "from transformers import PreTrainedTokenizerFast as Mine\n"
                                    "from transformers import PretrainedConfig as MineConfig\n")
    answers = io.StringIO("y\n" * 5)
    monkeypatch.setattr(sys, "stdin", answers)
    if where == "config.json":  # of a model: the tokenizer is read without it
        assert tokens(tmp_path, folder).vocab_size == len(known)
    else:
        argv = ["central", *SMALL, "--dataset", str(tmp_path / "tale.txt"), "--cache_dir",
                str(tmp_path / "cache"), "--data_dir", str(tmp_path), "--tokenizer", str(folder)]
        assert cli.main(argv) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(
            f"fedrun: error: --tokenizer {folder}: its files name Python code")
        assert tokens(tmp_path, folder / "tokenizer.json").vocab_size == len(known), "the way out"
    assert "[y/N]" not in "".join(capsys.readouterr())
    assert answers.tell() == 0
    assert not (tmp_path / "ran").exists()


def test_nothing_is_loaded_in_a_way_that_could_run_code() -> None:
    """Every call in the sources that loads a file, with the argument that makes it safe."""
    reported = {"torch.load": {"weights_only": True},
                "AutoTokenizer.from_pretrained": {"trust_remote_code": False},
                "architecture.from_pretrained": {"trust_remote_code": False,
                                                 "use_safetensors": True},
                "np.load": {"allow_pickle": False}}
    safe = {"nn.Embedding.from_pretrained", "json.load",
            "json.loads", "yaml.safe_load", "datasets.load_dataset", "Documents.load",
            "Topics.load"}
    for file in sorted((ROOT / "fedrun").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "joblib", "dill", "shelve", "marshal"}, file
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if name in reported:
                given = {k.arg: ast.literal_eval(k.value) for k in node.keywords
                         if k.arg in reported[name]}
                # numpy's own default is the safe one.
                assert given == reported[name] or (name == "np.load" and not given), file
            elif name.endswith((".from_pretrained", ".load_dataset", "torch.load", "yaml.load",
                                "yaml.full_load", "yaml.unsafe_load")):
                assert name in safe, f"{file}: {name}"


def test_a_tokenizer_json_alone_is_a_tokenizer(tmp_path: Path) -> None:
    file = words(tmp_path / "words", *tale(tmp_path))
    data = tokens(tmp_path, file)
    assert data.fingerprint["tokenizer"] == "words"
    read = Tokenizer.from_file(str(file)).decode(data.train[0].tolist())
    assert read.split() == (tmp_path / "tale.txt").read_text().split()[:16]
    other = file.rename(tmp_path / "mine.json")
    again = tokens(tmp_path, other)
    np.testing.assert_array_equal(again.train, data.train)
    assert again.fingerprint["tokenizer"] == "mine.json"
    other.write_text('{"model": 5}')
    with pytest.raises(ValueError, match=r"--tokenizer .*mine.json: not a tokenizer.json: "):
        tokens(tmp_path, other)
    words(tmp_path)
    with pytest.raises(ValueError, match=r"--tokenizer .*tokenizer.json: it has no tokens"):
        tokens(tmp_path, tmp_path / "tokenizer.json")


def test_an_unknown_word_without_an_unknown_token_is_named(tmp_path: Path) -> None:
    known = tale(tmp_path)
    file = words(tmp_path / "words", *(word for word in known if word != "storms"))
    with pytest.raises(ValueError, match=rf"^--tokenizer {file}: it cannot encode 'storms' \("):
        tokens(tmp_path, file)
    assert not list(tmp_path.glob("cache/tokens/*/entry.json"))


def test_a_run_with_a_tokenizer_that_has_neither_end_nor_unknown_token(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor has it any word of the prompt for samples. An exported model has the same tokens."""
    known = tale(tmp_path)
    file = words(tmp_path / "words", *known)
    assert cli.main(["central", *SMALL, "--dataset", str(tmp_path / "tale.txt"), "--tokenizer",
                     str(file), "--cache_dir", str(tmp_path / "cache"), "--data_dir", str(tmp_path),
                     "--run_name", "run", "--rounds", "1"]) == 0
    (record,) = read_history(tmp_path / "run")
    assert len(record["generated"].split()) == 100
    assert set(record["generated"].split()) <= set(known)
    assert len(record["prompt"].split()) == 4
    assert set(record["prompt"].split()) <= set(known)
    run, out = str(tmp_path / "run"), tmp_path / "out"
    assert cli.main(["export", run, str(out)]) == 0
    assert read_json(out / "config.json").get("eos_token_id") is None
    assert find_pretrained(str(out), "RUN").vocab_size == len(known)
    capsys.readouterr()
    assert cli.main(["generate", run, "--prompt", "of 3 whales", "--tokenizer", str(file)]) == 2
    assert capsys.readouterr().err.startswith(
        "fedrun: error: --prompt: it cannot encode 'whales' (")


TRICKY = ("I'll say: it's 3.14 dogs'  \n\n  \u00bd \u4f60\u597d\u4e16\u754c, na\u00efve\t(x[1]==2)"
          "\r\n e\u0301 \U0001f642!")


def test_bpe_cuts_words_without_end_and_no_others(tmp_path: Path) -> None:
    """Its training takes time with the square of a word's length: 105 s for ten lines of DNA."""
    from tokenizers.pre_tokenizers import ByteLevel

    from fedrun.data.tokenizer import LONGEST_WORD

    plain = ByteLevel(add_prefix_space=False)
    dna = "".join("ACGT"[(n * n // 7 + n // 3) % 4] for n in range(20_000))
    texts = {"usual.txt": [TRICKY] * 40, "dna.txt": [dna] * 5 + [TRICKY] * 40}
    for name, rows in texts.items():
        (tmp_path / name).write_text("\n".join(rows), newline="")
        data = tokens(tmp_path, "bpe:300", name)
        trained = Tokenizer.from_buffer(data.tokenizer_json)
        assert trained.decode(trained.encode(dna + TRICKY).ids) == dna + TRICKY
        assert trained.pre_tokenizer.pre_tokenize_str(TRICKY) == plain.pre_tokenize_str(TRICKY)
        lengths = [len(word) for word, _ in trained.pre_tokenizer.pre_tokenize_str(dna)]
        if name == "usual.txt":
            assert json.loads(data.tokenizer_json)["pre_tokenizer"]["type"] == "ByteLevel"
            assert lengths == [20_000], "the file is the one that was always made"
        else:
            assert max(lengths) == LONGEST_WORD
            assert sum(lengths) == 20_000
            assert len(data.load_tokenizer()(dna)["input_ids"]) < 12_000, "it has learnt of both"

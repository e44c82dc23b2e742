"""`fedrun.train` on arrays, texts and datasets of the caller's, beside the same from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedrun
from fedrun import cli
from fedrun.common.errors import InputError
from fedrun.flags import resolve
from fedrun.library import own_data
from tests.support.runs import Outcome, execute, torchrun

LENGTH = 16
WORDS = [f"word{n}" for n in range(60)]
SEQUENCES = (9, 7, 5)  # of each client, the largest first as --partition by_source deals them


def made(sequences: int, seed: int) -> np.ndarray:
    """Token ids that can be predicted a little: each follows from the one before it, or not."""
    random = np.random.default_rng(seed)
    ids = [0]
    for jumps in random.random(sequences * LENGTH - 1) < 0.3:
        ids.append(int(random.integers(len(WORDS))) if jumps else (3 * ids[-1] + 1) % len(WORDS))
    return np.array([*ids[:-1], len(WORDS) - 1])


CLIENTS = [made(n, seed) for seed, n in enumerate(SEQUENCES)]
HELD = made(5, 9)


def rows(ids: np.ndarray) -> list[str]:
    """The ids as lines of eight words."""
    return [" ".join(WORDS[n] for n in line) for line in ids.reshape(-1, 8)]


@pytest.fixture
def flags(tmp_path: Path, cache_dir: Path) -> dict[str, Any]:
    return {"config": "tiny", "sequence_length": LENGTH, "batch_size": 2, "lr": 2e-3,
            "dtype": "fp32", "rounds": 4, "val_freq": 2, "data_dir": tmp_path,
            "cache_dir": cache_dir}


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A tokenizer of WORDS, in their order."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path / "words.json"
    tokenizer.save(str(path))
    return path


def outcome_of(run: fedrun.Run) -> Outcome:
    return Outcome(0, "", run.folder)


def losses(run: fedrun.Run) -> list[float]:
    return [record["server_val_loss"] for record in run.history]


def test_clients_as_from_files_that_deal_the_same(flags: dict[str, Any], words: Path,
                                                  tmp_path: Path) -> None:
    folder = tmp_path / "text"
    for name, ids in (*((f"client_{n}/all.txt", ids) for n, ids in enumerate(CLIENTS)),
                      ("validation.txt", HELD)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(rows(ids)))
    flags |= {"tokenizer": words, "rounds": 3}
    files = fedrun.train("fed_avg", run_name="files", dataset=folder, partition="by_source",
                         num_clients=3, **flags)
    arrays = fedrun.train("fed_avg", run_name="arrays", clients=CLIENTS, validation=HELD, **flags)
    texts = fedrun.train("fed_avg", run_name="texts", clients=[rows(ids) for ids in CLIENTS],
                         validation=rows(HELD), **flags)
    for run in (arrays, texts):
        assert outcome_of(run).bits == outcome_of(files).bits
        assert [r["generated"] for r in run.history] == [r["generated"] for r in files.history]
        assert losses(run) == losses(files)
        assert (run.config["num_clients"], run.config["partition"]) == (3, "given")
        assert run.config["dataset"].startswith("(given ")
    assert all(set(record["generated"].split()) <= set(WORDS) for record in arrays.history)


def test_ids_alone(flags: dict[str, Any], tmp_path: Path) -> None:
    """Without a tokenizer they are shown as numbers."""
    del flags["sequence_length"]
    run = fedrun.train("fed_avg", clients=[ids.reshape(-1, LENGTH) for ids in CLIENTS], **flags)
    assert run.outcome == "finished"
    assert (run.config["tokenizer"], run.config["sequence_length"]) == ("ids:60", LENGTH)
    last = run.history[-1]
    assert len(last["generated"].split()) == 100
    assert all(int(number) < 60 for number in (last["prompt"] + last["generated"]).split())
    assert len(run.generate("3 10 31", max_new_tokens=4).split()) == 7
    with pytest.raises(InputError, match="cannot encode 'Once'"):
        run.generate("Once upon a time")
    with pytest.raises(InputError, match=r"--dataset \(given .*\): was given to fedrun.train"):
        run.evaluate()
    (tmp_path / "numbers.txt").write_text("\n".join(" ".join(map(str, line))
                                                    for line in HELD.reshape(-1, 8).tolist()))
    found = run.evaluate(str(tmp_path / "numbers.txt"), cache_dir=flags["cache_dir"])
    assert found["tokens"] == len(HELD) - 5
    same = run.evaluate(data=HELD, cache_dir=str(flags["cache_dir"]))
    assert (same["loss"], same["tokens"]) == (found["loss"], found["tokens"])
    with pytest.raises(InputError, match="data: must be left out with dataset= and split="):
        run.evaluate("pydocs", data=HELD)
    with pytest.raises(InputError, match="data: has the token id 60; must be below 60"):
        run.evaluate(data=[60] * 40, cache_dir=flags["cache_dir"])


@pytest.mark.slow
def test_what_is_made_of_a_run_on_ids(flags: dict[str, Any], tmp_path: Path,
                                      caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoTokenizer
    run = fedrun.train("fed_avg", clients=CLIENTS, vocab_size=100, **flags)
    assert run.config["tokenizer"] == "ids:100"
    out = run.export(tmp_path / "hf")
    assert AutoTokenizer.from_pretrained(out)("99 0").input_ids == [99, 0]
    assert cli.main(["report", "--data_dir", str(tmp_path)]) == 0
    del flags["config"]
    further = fedrun.train("fed_avg", clients=CLIENTS, init_from=str(out), run_name="next", **flags)
    assert further.outcome == "finished"
    with pytest.raises(InputError, match="vocab_size 100: must be left out with"):
        fedrun.train("fed_avg", clients=CLIENTS, init_from=str(out), vocab_size=100, **flags)
    assert "has no effect" not in caplog.text


def test_one_for_all(flags: dict[str, Any]) -> None:
    stream = np.concatenate(CLIENTS)
    for data, partition, tokenizer in ((stream, "shuffled", "ids:60"),
                                       (rows(stream), "documents", "bpe:300")):
        run = fedrun.train("fed_avg", run_name=partition, data=data, partition=partition,
                           num_clients=2, tokenizer=tokenizer, **flags)
        assert run.outcome == "finished"
    found = run.evaluate(data=rows(HELD), cache_dir=flags["cache_dir"])
    text = run.tokenizer()("".join(f"{row}\n" for row in rows(HELD)))["input_ids"]
    assert found["split"] == "all"
    assert found["tokens"] == len(text) - -(-len(text) // LENGTH)


def test_a_dataset(flags: dict[str, Any]) -> None:
    import datasets
    table = datasets.Dataset.from_dict(
        {"body": rows(np.concatenate(CLIENTS)), "user": ["a", "b"] * (sum(SEQUENCES))})
    run = fedrun.train("fed_avg", data=table, text_column="body", partition="column:user",
                       num_clients=2, tokenizer="bpe:300", validation=rows(HELD), **flags)
    assert run.outcome == "finished"
    assert run.evaluate(data=rows(HELD), cache_dir=flags["cache_dir"])["split"] == "all"


@pytest.mark.parametrize("batches", ["all", "clients", "one_client"])
def test_a_central_run(flags: dict[str, Any], batches: str, caplog: pytest.LogCaptureFixture
                       ) -> None:
    run = fedrun.train("central", clients=CLIENTS, validation=HELD, batches=batches,
                       **flags | {"batch_size": 3})
    assert run.outcome == "finished"
    assert run.config["num_clients"] == (4 if batches == "all" else 3)
    assert "has no effect" not in caplog.text


def test_resumed_with_the_same_data_alone(flags: dict[str, Any],
                                          capfd: pytest.CaptureFixture[str]) -> None:
    flags |= {"validation": HELD, "checkpoint_freq": 2}
    whole = fedrun.train("fed_avg", clients=CLIENTS, run_name="whole", **flags)
    run = fedrun.train("fed_avg", clients=CLIENTS, run_name="run", **flags | {"rounds": 2})
    same: list[Any] = [ids.tolist() for ids in CLIENTS]
    again = fedrun.train("fed_avg", clients=same, run_name="run", **flags)
    assert outcome_of(again).bits == outcome_of(whole).bits
    assert run.outcome == "finished"
    changed = [CLIENTS[0], CLIENTS[1], np.roll(CLIENTS[2], 1)]
    moved = [np.concatenate([CLIENTS[0], CLIENTS[1][:LENGTH]]), CLIENTS[1][LENGTH:], CLIENTS[2]]
    for rounds in (4, 6):  # the run has finished, or would be trained further
        for other in (changed, moved, [*reversed(CLIENTS)]):
            with pytest.raises(InputError, match=r"holds a run with other settings \(dataset \(g"):
                fedrun.train("fed_avg", clients=other, run_name="run", **flags | {"rounds": rounds})
        with pytest.raises(InputError, match=r"with other settings \(tokenizer ids:60"):
            fedrun.train("fed_avg", clients=CLIENTS, vocab_size=61, run_name="run",
                         **flags | {"rounds": rounds})
    capfd.readouterr()
    command = ["fed_avg", "--run_name", "run", "--dataset", run.config["dataset"], "--tokenizer",
               "ids:60", "--partition", "given", "--num_clients", "3"]
    assert cli.main(command) == 2
    error = capfd.readouterr().err
    assert "was given to fedrun.train, and is in no file; give it there again" in error
    assert error.count("\n") == 1


IDS, TEXTS = list(range(60)) * 4, ["a text"] * 90


@pytest.mark.parametrize(("arguments", "message"), [
    ({"data": IDS, "clients": [IDS]}, "clients: must be left out where data= is given"),
    ({"validation": IDS}, "validation: goes with data= or clients= alone"),
    ({"vocab_size": 9}, "vocab_size: goes with data= or clients= alone"),
    ({"clients": []}, "clients: is empty; must be a list with a client's data in each place"),
    ({"clients": np.zeros((3, 9), int)}, "clients: is a ndarray; must be a list"),
    ({"clients": IDS}, r"clients\[0\]: is of type int; must be token ids"),
    ({"clients": ["a.txt"]}, r"clients\[0\]: is one string"),
    ({"clients": [IDS, IDS], "num_clients": 3}, "--num_clients 3: must be 2, the length of"),
    ({"clients": [IDS], "partition": "shuffled"}, "--partition shuffled: must be left out with cl"),
    ({"clients": [IDS], "size_skew": 0.5}, "--size_skew 0.5: must be left out with clients="),
    ({"data": IDS, "dataset": "wikitext-2"}, "--dataset wikitext-2: must be left out with data="),
    ({"data": IDS, "text_column": "body"}, "--text_column body: must be left out with data="),
    ({"data": TEXTS, "text_column": "body"}, "--text_column body: must be left out with data="),
    ({"data": TEXTS, "max_tokens": 9}, "--max_tokens 9: must be left out with data="),
    ({"data": TEXTS, "stream": True}, "--stream True: must be left out with data="),
    ({"data": TEXTS, "encoding": "latin-1"}, "--encoding latin-1: must be left out with data="),
    ({"data": IDS, "validation": IDS, "val_fraction": 0.1},
     "--val_fraction 0.1: must be left out with data= and validation="),
    ({"data": TEXTS, "vocab_size": 9}, "vocab_size 9: belongs to token ids"),
    ({"data": IDS, "vocab_size": 9}, "data: has the token id 59; must be below 9, .* was given"),
    ({"data": IDS, "vocab_size": "many"}, "vocab_size many: must be an integer in"),
    ({"data": IDS, "vocab_size": 2**31}, "vocab_size 2147483648: must be an integer in .1, 16777"),
    ({"data": IDS, "tokenizer": f"ids:{2**31}"}, "--tokenizer ids:2147483648: N must be an int"),
    ({"clients": [IDS, [2_000_000_000]]},
     r"clients\[1\]: has the token id 2000000000; must be below 16777216, .* without a tokenizer"),
    ({"data": IDS, "vocab_size": 60, "tokenizer": "gpt2"}, "vocab_size 60: must be left out with"),
    ({"data": np.zeros((9, 20), int), "sequence_length": 10},
     "--sequence_length 10: must be 20, the length of the rows of data")])
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fedrun.train("fed_avg", **arguments)


@pytest.mark.parametrize(("text", "flags", "arguments", "message"), [
    ("num_clients: 8", {}, {"clients": [IDS] * 3},
     r"--config .*mine\.yaml: num_clients 8: must be 3, the length of clients="),
    ("sequence_length: 10", {}, {"data": np.zeros((9, 20), int)},
     r"--config .*mine\.yaml: sequence_length 10: must be 20, the length of the rows of data"),
    ("dataset: wikitext-2", {}, {"data": IDS},
     r"--config .*mine\.yaml: dataset wikitext-2: must be left out with data="),
    ("text_column: body", {}, {"data": IDS},
     r"--config .*mine\.yaml: text_column body: must be left out with data="),
    ("tokenizer: gpt2", {}, {"data": IDS, "vocab_size": 60}, "vocab_size 60: must be left out"),
    ("num_clients: 8", {"num_clients": 4}, {"clients": [IDS] * 3}, "^--num_clients 4: must be 3"),
    ("dataset: pydocs", {"dataset": "pydocs"}, {"data": IDS}, "^--dataset pydocs: must be left")])
def test_settings_of_a_file_are_no_less_than_flags(
        text: str, flags: dict[str, Any], arguments: dict[str, Any], message: str, tmp_path: Path
        ) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        fedrun.train("fed_avg", config=str(tmp_path / "mine.yaml"), **flags, **arguments)


def test_a_config_with_data(flags: dict[str, Any], words: Path, caplog: pytest.LogCaptureFixture,
                            monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a tokenizer, whether that is the default or another."""
    caplog.set_level("INFO", "fedrun")
    config = resolve("fed_avg", flags | {"num_clients": 3})
    run = fedrun.train(config, clients=CLIENTS, validation=HELD, vocab_size=60)
    plain = fedrun.train("fed_avg", clients=CLIENTS, validation=HELD, run_name="b", **flags)
    assert outcome_of(run).bits == outcome_of(plain).bits
    with pytest.raises(InputError, match="--num_clients 3: must be 2"):
        fedrun.train(config, clients=CLIENTS[:2])
    assert "token ids: of the config's tokenizer" not in caplog.text
    monkeypatch.setitem(own_data.DEFAULTS, "tokenizer", str(words))
    config = resolve("fed_avg", flags | {"num_clients": 3, "tokenizer": words, "run_name": "c"})
    run = fedrun.train(config, clients=CLIENTS, validation=HELD)
    assert run.config["tokenizer"] == str(words)
    assert f"token ids: of the config's tokenizer {words} (vocab_size=" in caplog.text
    assert set(run.history[-1]["generated"].split()) <= set(WORDS)


SCRIPT = """
import json, sys
import numpy as np
import fedrun

flags = json.loads(sys.argv[1])
held = np.load(sys.argv[2])
clients = [np.load(path) for path in sys.argv[3:]]
run = fedrun.train("fed_avg", clients=clients, validation=held, run_name="three", **flags)
"""


@pytest.mark.slow
def test_a_script_under_torchrun(flags: dict[str, Any], tmp_path: Path) -> None:
    """Every rank has the data; ranks that have other data are refused."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    paths = []
    for name, ids in (("held", HELD), *((str(n), ids) for n, ids in enumerate(CLIENTS))):
        paths.append(tmp_path / f"{name}.npy")
        np.save(paths[-1], ids)
    given = json.dumps({name: str(value) for name, value in flags.items()})
    code, output = execute([*torchrun(3), str(script), given, *map(str, paths)])
    assert code == 0, output
    alone = fedrun.train("fed_avg", clients=CLIENTS, validation=HELD, run_name="alone", **flags)
    assert Outcome(0, "", tmp_path / "three").bits == outcome_of(alone).bits
    script.write_text("import os\n" + SCRIPT.replace(
        "held = np.load(sys.argv[2])",
        "held = np.load(sys.argv[2])[int(os.environ['RANK'] == '2'):]"))
    code, output = execute([*torchrun(3), str(script), given, *map(str, paths)])
    assert code != 0
    assert "the tokenised corpus" in output

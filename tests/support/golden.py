"""Whether a change of the code changes bits: short runs at another commit and here, compared.

    python -m tests.support.golden --against HEAD~3

Each run is made twice on this machine, in 1 and in 3 processes: with the commit's tree, checked out
into a temporary worktree, and with the working tree. The final model's bytes and the numbers of the
history have to be equal. Nothing is kept, since bits depend on the processor. A few minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORLDS = (1, 3)
SECONDS = 900  # that the runs of one world may take

# Run name -> command line, in the flags of the working tree (see `spelled`). `{whole}`
# is the folder of that run.
RUNS: dict[str, str] = {
    "central": "central --batch_size 4",
    "central_clients": "central --batches clients --batch_size 4 --lr_schedule cosine --warmup 2",
    "central_one_client": "central --batches one_client --partition shuffled",
    "whole": "fed_avg --checkpoint_freq 3",
    "resumed": "fed_avg --resume {whole}/checkpoints/step_000003",
    "trained_weights": "fed_avg --weighting trained --sampling replacement --size_skew 0.5",
    "averaged": "fed_avg --client_moments average --grad_clip 1 --prox_mu 0.5",
    "reset": "fed_avg --client_moments reset --local_updates 2",
    "epoch": "fed_avg --sync epoch --eval_clients",
    "float": "fed_avg --aggregation float",
    "int8": "fed_avg --aggregation int8",
    "int8_disk": "fed_avg --aggregation int8 --client_store disk --cohort 2",
    "one_of_three": "fed_avg --cohort 1",
    "disk": "fed_avg --client_store disk --save_client_deltas",
    "bf16_or_fp32": "fed_avg --dtype auto",
    "topics": "fed_avg --partition dirichlet --alpha 0.5",
    "momentum": "fed_momentum --cohort 0.5",
    "diloco": "diloco --local_updates 3",
    "entropy": "fed_entropy --temperature 0.5",
    "fisher": "fed_fisher",
    "fisher_corrected": "fed_fisher --fisher corrected --fisher_floor_mode relative "
                        "--fisher_floor 0.1 --client_moments average",
    "adam": "fed_adam",
    "yogi": "fed_yogi",
    "adagrad": "fed_adagrad",
    "sgd": "fed_sgd --local_updates 1",
}
SHARED = ("--config tiny --tokenizer bpe:400 --sequence_length 32 --batch_size 2 --val_freq 3 "
          "--rounds 6 --lr 2e-3 --dtype fp32 --checkpoint_freq none")
FEDERATED = "--num_clients 3 --local_updates 2"
OLD_FLAGS = {"--client_moments": "--client_state", "--aggregation float": "--reduce float",
             "--aggregation int8": "--wire int8"}  # of trees without fedrun/common/old_names.py


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Compare the bits of this tree with a commit's.")
    parser.add_argument("--against", required=True, metavar="COMMIT")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="fedrun-golden-") as scratch, \
            worktree(args.against, Path(scratch) / "tree") as before:
        corpus = Path(scratch) / "corpus.txt"
        corpus.write_text(some_text(), encoding="utf-8")
        made = differing = 0
        for processes in WORLDS:
            names = [n for n in args.only if processes == 1 or not RUNS[n].startswith("central")]
            found = {}
            for name, tree in (("before", before), ("now", ROOT)):
                folder = Path(scratch) / f"{name}_{processes}"
                make_runs(tree, folder, corpus, names, processes)
                found[name] = {run: result(folder / run) for run in names}
            made += len(names)
            for run in names:
                reported = difference(found["before"][run], found["now"][run])
                differing += bool(reported)
                print(f"{run:<20} {processes} processes  {reported or 'equal'}", flush=True)
    print(f"{differing} of {made} runs differ from {args.against}")
    return int(differing > 0)


@contextlib.contextmanager
def worktree(commit: str, folder: Path) -> Iterator[Path]:
    """The commit's files, in a worktree that is removed at the end."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def some_text() -> str:
    """Real text: some of the documentation that comes with Python."""
    from fedrun.data.corpora import local_files
    from fedrun.data.pydocs import read_pydocs
    return "\n\n".join(read_pydocs(local_files("pydocs")[:40]).values())


def make_runs(tree: Path, folder: Path, corpus: Path, names: Sequence[str], processes: int) -> None:
    """All runs of one tree and world, one after the other in the same processes."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nnodes", "1", "--node-rank", "0",
                    "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1",
                    "--master-port", str(free_port())]
    shared = ["--data_dir", str(folder), "--dataset", str(corpus), "--cache_dir",
              str(folder / "cache")]
    lines = [[*spelled(RUNS[name], tree).replace("{whole}", str(folder / "whole")).split(),
              "--run_name", name, *shared] for name in names]
    done = subprocess.run([*command, __file__, json.dumps(lines)], cwd=tree, timeout=SECONDS,
                          env=os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
                          text=True, capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"{tree}: exit code {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")


def spelled(line: str, tree: Path) -> str:
    """A command line in the flags that a tree knows."""
    if not (tree / "fedrun/common/old_names.py").exists():
        for new, old in OLD_FLAGS.items():
            line = line.replace(new, old)
    return line


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def result(folder: Path) -> dict[str, Any]:
    """What has to be equal: the model's digest, and the history without what clocks say."""
    history = json.loads((folder / "training_history.json").read_text(encoding="utf-8"))
    return {"model": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
            "history": [{name: value for name, value in record.items() if "seconds" not in name}
                        for record in history]}


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs, in words; empty if nothing does. Fields that the history did not have before
    are no difference."""
    names = {name for old, new in zip(before["history"], now["history"], strict=False)
             for name in old if name not in new or old[name] != new[name]}
    if len(before["history"]) != len(now["history"]):
        names.add("its length")
    if before["model"] == now["model"] and not names:
        return ""
    model = "the model" if before["model"] != now["model"] else "not the model"
    return f"DIFFERENT: {model}; in the history: {', '.join(sorted(names)) or 'nothing'}"


# ---- inside one tree, on every rank -----------------------------------------------------------

def run_here(lines: list[list[str]]) -> None:
    """Each command line in turn; later flags win, so that a run can change what all share."""
    from fedrun import cli

    if not Path(cli.__file__).is_relative_to(Path.cwd()):
        sys.exit(f"{cli.__file__} does not belong to the tree in {Path.cwd()}")
    for number, (method, *own) in enumerate(lines):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # a name space in the store
        federated = [] if method == "central" else FEDERATED.split()
        if code := cli.main([method, *SHARED.split(), *federated, *own]):
            sys.exit(f"{method} {' '.join(own)}: exit code {code}")


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("["):
        run_here(json.loads(sys.argv[1]))
    else:
        sys.exit(main(sys.argv[1:]))

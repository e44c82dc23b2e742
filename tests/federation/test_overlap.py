"""--overlap: rounds by hand, the same bits in every world and after a kill, a worker that is lost
while a sum travels, and what is refused."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedrun.config import FederatedConfig
from fedrun.data.tokens import TokenData, prepare
from fedrun.distributed.stopping import StopRequest
from fedrun.federation.messages import RoundDecision, RoundPlan, WorkerReport
from fedrun.federation.overlap import SUM
from fedrun.federation.schedule import Schedule
from fedrun.federation.server import Server
from fedrun.flags import resolve
from fedrun.model.config import ModelConfig
from fedrun.model.mamba2 import Mamba2LM
from tests.support.prepared import run_ranks
from tests.support.runs import (
    CORPUS,
    FAULTY,
    OF_SMALL,
    SMALL,
    Outcome,
    Run,
    assert_equal,
    error_lines,
    fault,
    without_clocks,
)

ROUNDS, CLIENTS, LOCAL_UPDATES, BATCH, LENGTH, LR = 3, 2, 2, 2, 32, 2e-3
SHORT = ("--num_clients", CLIENTS, "--rounds", ROUNDS, "--local_updates", LOCAL_UPDATES)
SERVER_LR, SERVER_MOMENTUM = 0.7, 0.9
DILOCO = ("--server_lr", SERVER_LR, "--server_momentum", SERVER_MOMENTUM)


# ---- by hand -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def data(cache_dir: Path) -> TokenData:
    return prepare(str(CORPUS), "bpe:400", LENGTH, cache_dir, OF_SMALL)


class ByHand:
    """Two clients in plain torch and float64, each with a model and an AdamW of its own."""

    def __init__(self, data: TokenData) -> None:
        shape = ModelConfig(n_layer=2, d_model=64, d_state=16, headdim=16)
        assert resolve("fed_avg", {"config": "tiny"}).model == shape
        model = Mamba2LM(shape, data.vocab_size)
        model.init_weights(0)
        self.first = flat(model.double())
        ends = [k * len(data.train) // CLIENTS for k in range(CLIENTS + 1)]
        shards = [data.train[a:b].astype(np.int64) for a, b in itertools.pairwise(ends)]
        self.weights = [len(shard) / len(data.train) for shard in shards]
        self._models = [copy.deepcopy(model) for _ in shards]
        self._optimizers = [torch.optim.AdamW(m.parameters(), lr=LR, betas=(0.9, 0.999),
                                              weight_decay=0.01) for m in self._models]
        self._batches = [batches(shard, k) for k, shard in enumerate(shards)]

    def train(self, k: int, start: Tensor) -> Tensor:
        """The update of client k, which starts from there: the way that it goes."""
        model, optimizer = self._models[k], self._optimizers[k]
        torch.nn.utils.vector_to_parameters(start.clone(), named(model))  # of which they are views
        for _ in range(LOCAL_UPDATES):
            tokens = next(self._batches[k])
            predicted = model(tokens)[:, :-1].double()
            optimizer.zero_grad()
            cross_entropy(predicted.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
        return flat(model) - start

    def forget(self, k: int) -> None:
        self._optimizers[k].state.clear()

    def by_name(self, vector: Tensor) -> dict[str, Tensor]:
        torch.nn.utils.vector_to_parameters(vector, named(self._models[0]))
        return {name: p.detach() for name, p in self._models[0].named_parameters()}


def named(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for _, p in model.named_parameters()]


def flat(model: torch.nn.Module) -> Tensor:
    return torch.nn.utils.parameters_to_vector(named(model)).detach().clone()


def batches(shard: np.ndarray, client: int) -> Iterator[Tensor]:
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([0, client, 0])))
    for rows in order.permutation(len(shard)).reshape(-1)[:len(shard) // BATCH * BATCH].reshape(
            -1, BATCH):
        yield torch.from_numpy(shard[rows])


def eager_by_paper(hand: ByHand) -> Tensor:
    """Kale et al. (2025) with w + S on the server: each client moves a model of its own by the
    delayed mean, in which its part of the round just trained replaces its part of the round before.
    """
    models = [hand.first] * CLIENTS
    before, mean, total = [torch.zeros_like(hand.first)] * CLIENTS, torch.zeros(()), hand.first
    for _ in range(ROUNDS):
        updates = [hand.train(k, model) for k, model in enumerate(models)]
        models = [model + mean + p * (new - old) for model, p, new, old in
                  zip(models, hand.weights, updates, before, strict=True)]
        mean = sum((p * new for p, new in zip(hand.weights, updates, strict=True)), torch.zeros(()))
        before, total = updates, total + mean
    return total


def in_cohorts(hand: ByHand, cohorts: list[list[int]], left_out: dict[int, int]) -> Tensor:
    """With w + S on the server; left_out: a client by its round."""
    model, travelling, parts = hand.first, torch.zeros(()), dict[int, Tensor]()
    for number, cohort in enumerate(cohorts, 1):
        updates = {k: hand.train(k, model + parts.get(k, 0.0)) for k in cohort}
        model = model + travelling
        everyone = sum(hand.weights[k] for k in cohort)
        if (lost := left_out.get(number)) is not None:
            del updates[lost]
            hand.forget(lost)
        parts = {k: hand.weights[k] / everyone * update for k, update in updates.items()}
        travelling = sum(parts.values(), torch.zeros(())) * (
            everyone / sum(hand.weights[k] for k in updates))
    return model + travelling


def outer_steps_by_hand(hand: ByHand) -> Tensor:
    """With torch's SGD on the server, and for each client's start a step of a copy of it."""
    server = torch.nn.Parameter(hand.first.clone())
    outer = torch.optim.SGD([server], SERVER_LR, SERVER_MOMENTUM, nesterov=True)
    starts, travelling = [hand.first] * CLIENTS, None
    for _ in range(ROUNDS):
        parts = [p * hand.train(k, start)
                 for k, (p, start) in enumerate(zip(hand.weights, starts, strict=True))]
        if travelling is not None:
            step(outer, server, travelling)
        starts = []
        for part in parts:
            mine, own = copy.deepcopy((server, outer))
            own.param_groups[0]["params"] = [mine]
            own.state.clear()
            if travelling is not None:
                own.state[mine] = {"momentum_buffer":
                                   outer.state[server]["momentum_buffer"].clone()}
            step(own, mine, part)
            starts.append(mine.detach())
        travelling = torch.stack(parts).sum(0)
    assert travelling is not None
    step(outer, server, travelling)
    return server.detach()


def in_eight_bits(hand: ByHand) -> Tensor:
    """With w + S on the server, in the words of int8.py: of even and of odd rounds each has steps,
    from the sums of two rounds before."""
    config = resolve("fed_avg", dict(zip((flag[2:] for flag in map(str, SHORT[::2])),
                                         map(str, SHORT[1::2]), strict=True)) | {"lr": str(LR)})
    assert isinstance(config, FederatedConfig)
    plan = Schedule(config, [1000] * CLIENTS).plan
    levels = [1 + math.floor((127 - CLIENTS) * p) for p in hand.weights]
    equal = 1 / (CLIENTS * (1 + math.floor((127 - CLIENTS) / CLIENTS)))
    blocks = -(-len(hand.first) // 256)
    shares = [torch.full((blocks,), equal / 4).double() for _ in range(2)]
    rest = [torch.zeros_like(hand.first) for _ in range(CLIENTS)]
    model, travelling, parts = hand.first, torch.zeros(()), [torch.zeros(())] * CLIENTS
    for number in range(1, ROUNDS + 1):
        updates = [hand.train(k, model + part) for k, part in enumerate(parts)]
        model = model + travelling
        share = shares[number % 2]
        step_of = (share * plan(number, 0.0).bound).repeat_interleave(256)[:len(model)]
        travelling, reach = torch.zeros_like(model), torch.zeros(CLIENTS, blocks).double()
        for k, (update, c) in enumerate(zip(updates, levels, strict=True)):
            rest[k] += hand.weights[k] * update
            steps = rest[k] / step_of
            sent = steps.round().clamp(-c, c) * step_of
            rest[k], travelling = rest[k] - sent, travelling + sent
            padded = torch.nn.functional.pad(steps.abs(), (0, blocks * 256 - len(model)))
            reach[k] = padded.view(blocks, 256).amax(1) / (c + 0.5)
        share[reach.amax(0) <= 0.7] *= 0.75
        share[reach.amax(0) > 1] *= 2
        share.clamp_(equal / 256, 2 / (127 - CLIENTS))
        parts = [p * update for p, update in zip(hand.weights, updates, strict=True)]
    return model + travelling


def step(optimizer: torch.optim.SGD, vector: torch.nn.Parameter, update: Tensor) -> None:
    vector.grad = -update
    optimizer.step()


@pytest.mark.parametrize(("method", "flags", "reference"), [
    ("fed_avg", (), eager_by_paper), ("diloco", DILOCO, outer_steps_by_hand),
    ("fed_avg", ("--aggregation", "int8"), in_eight_bits)])
def test_rounds_by_hand_equal_rounds_of_fedrun(method: str, flags: tuple[object, ...],
                                               reference: object, run: Run, data: TokenData
                                               ) -> None:
    assert callable(reference)
    hand = ByHand(data)
    expected = hand.by_name(reference(hand))
    outcome = run(method, *SHORT, *flags, "--dtype", "fp64", "--overlap", "true")
    assert outcome.code == 0, outcome.output
    for name, value in outcome.model.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-9)


# ---- runs ----------------------------------------------------------------------------------------

APART = {"TWO_MACHINES": ""}  # or workers share memory, and no sum travels
FLAGS = ("--num_clients", 5, "--cohort", 3, "--local_updates", 2, "--rounds", 6, "--overlap",
         "true", "--checkpoint_freq", 2)


@pytest.fixture(scope="module")
def alone(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """In one process, undisturbed."""
    folder = tmp_path_factory.mktemp("alone")
    code, output = run_ranks(1, ["diloco", *SMALL, *map(str, FLAGS), "--data_dir", str(folder),
                                 "--cache_dir", str(cache_dir), "--run_name", "run"], 250)
    assert code == 0, output
    return Outcome(code, output, folder / "run")


def test_a_model_is_recorded_without_the_update_of_its_round(run_here: Run) -> None:
    """After the first round it is the first model, and after the last it has all updates: of one
    round the one that it has without --overlap."""
    flags = ("--num_clients", 2, "--val_freq", 1)
    overlapped = run_here("fed_avg", *flags, "--rounds", 2, "--overlap", "true", name="two")
    one, with_one = (run_here("fed_avg", *flags, "--rounds", 1, "--overlap", overlap, name=overlap)
                     for overlap in ("false", "true"))
    assert one.bits == with_one.bits
    first = overlapped.history[0]
    assert first["step_norm"] == 0
    assert "update_cosine" not in first
    assert first["server_val_loss"] > one.history[0]["server_val_loss"]
    # Clients have not trained beside the last sum, as they would have in a longer run.
    longer = (*flags, "--rounds", 3, "--overlap", "true")
    refused = run_here("fed_avg", *longer, after=overlapped)
    assert refused.code == 2
    assert "--rounds 3: this run was started with 2 steps, and waited for" in refused.output
    assert run_here("fed_avg", *longer, "--extend", after=overlapped).code == 0


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "script"), [
    (2, "fedrun"), (3, "fedrun"), (5, "tests.support.two_machines")])
def test_the_same_bits_in_every_world(processes: int, script: str, run: Run, alone: Outcome
                                      ) -> None:
    other = run("diloco", *FLAGS, processes=processes, script=script)
    assert other.code == 0, other.output
    assert other.bits == alone.bits
    assert without_clocks(other) == without_clocks(alone)


@pytest.mark.parametrize("aggregation", ["exact", "int8"])
def test_a_stopped_run_resumes_with_the_sum_that_travelled(
        aggregation: str, run_here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the clients' own parts of it: the last bits depend on both; and with int8 on the steps
    of even and of odd rounds."""
    flags = (*FLAGS, "--rounds", 4, "--checkpoint_freq", "none", "--val_freq", 100,
             "--aggregation", aggregation)
    whole = run_here("diloco", *flags, name="whole")
    healthy = Server.decide

    def decide(server: Server, plan: RoundPlan, trained: list[WorkerReport]) -> RoundDecision:
        decision = healthy(server, plan, trained)
        return replace(decision, stop="the test") if plan.round == 2 else decision

    with monkeypatch.context() as patch:
        patch.setattr(Server, "decide", decide)
        patch.setattr(StopRequest, "obeyed", lambda _: None)
        stopped = run_here("diloco", *flags, name="stopped")
    held, = stopped.run_dir.glob("checkpoints/step_*2/global.*")
    assert bool(load_file(held)[SUM].any())
    ended = run_here("diloco", *flags, "--rounds", 2, after=stopped)
    assert ended.code == 2
    assert "its model is without the last one's update; must be more" in ended.output
    resumed = run_here("diloco", *flags, after=stopped)
    assert "resuming from step 2" in resumed.output
    assert resumed.bits == whole.bits


@pytest.mark.slow
def test_in_eight_bits_too(run: Run) -> None:
    flags = ("fed_avg", *FLAGS, "--aggregation", "int8")
    alone = run(*flags)
    apart = run(*flags, processes=5, script="tests.support.two_machines", name="apart")
    assert apart.bits == alone.bits
    assert without_clocks(apart) == without_clocks(alone)


@pytest.mark.slow
def test_a_sum_that_travels_is_part_of_a_checkpoint(run: Run, alone: Outcome, tmp_path: Path
                                                    ) -> None:
    """Killed once that of round 4 is written, and resumed in another world."""
    killed = run("diloco", *FLAGS, script=FAULTY, env=fault(tmp_path, "kill", "after-manifest:4"))
    held, = killed.run_dir.glob("checkpoints/step_*4/global.*")
    assert bool(load_file(held)[SUM].any())
    resumed = run("diloco", *FLAGS, processes=3, script="tests.support.two_machines")
    assert "resuming from step 4" in resumed.output
    assert_equal(resumed, alone)
    assert SUM not in load_file(next(resumed.run_dir.glob("checkpoints/step_*6/global.*")))


@pytest.mark.slow
def test_a_signal_saves_the_sum_that_travels(run: Run, alone: Outcome, tmp_path: Path) -> None:
    stopped = run("diloco", *FLAGS, script="tests.support.faulty_fedrun", processes=3,
                  env=APART | fault(tmp_path, "term", "train:3", rank=1))
    assert stopped.outcome["outcome"] == "stopped", stopped.output
    assert_equal(run("diloco", *FLAGS), alone)


@pytest.mark.parametrize(("rounds", "cohort", "left_out"), [(5, 1, {}), (4, 2, {2: 1})])
def test_a_part_counts_in_the_next_round_alone(rounds: int, cohort: int, left_out: dict[int, int],
                                               run: Run, data: TokenData) -> None:
    """Who was not drawn in the round before, or was left out of it, starts from the global model.
    """
    lost = {"FAULT": "nan", "FAULT_STEP": "3", "FAULT_CLIENT": "1" if left_out else "none"}
    outcome = run("fed_avg", *SHORT, "--rounds", rounds, "--cohort", cohort, "--dtype", "fp64",
                  "--overlap", "true", script=FAULTY, env=lost)
    assert outcome.code == 0, outcome.output
    rounds_there = [event for event in outcome.events if event["event"] == "round"]
    assert {number: event["left_out"][0] for number, event in enumerate(rounds_there, 1)
            if event["left_out"]} == left_out
    cohorts = [[one["client"] for one in event["clients"]] for event in rounds_there]
    if cohort == 1:
        assert any(a == b for a, b in itertools.pairwise(cohorts))
        assert any(a != b for a, b in itertools.pairwise(cohorts))
    hand = ByHand(data)
    expected = hand.by_name(in_cohorts(hand, cohorts, left_out))
    for name, value in outcome.model.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "stop"])
def test_a_worker_lost_while_a_sum_travels_ends_the_run(kind: str, run: Run, tmp_path: Path
                                                        ) -> None:
    """In the training of round 3, during which the sum of round 2 is on its way. What stops is
    found at the timeout."""
    lost = run("fed_avg", "--num_clients", 2, "--rounds", 5, "--local_updates", 2, "--overlap",
               "true", "--timeout", 8, processes=3, script="tests.support.faulty_fedrun",
               launcher=kind == "stop", env=APART | fault(tmp_path, kind, "train:5", rank=2),
               limit=150)
    assert lost.code != 0
    assert any("rank 2" in line for line in error_lines(lost.output)), lost.output


@pytest.mark.parametrize(("method", "flags", "message"), [
    ("fed_adam", {}, "--overlap true: must be false for fed_adam: it is for fed_avg, fed_momentum"),
    ("fed_median", {}, "--overlap true: must be false for fed_median"),
    ("fed_sgd", {}, "--overlap true: must be false for fed_sgd"),
    ("fed_avg", {"weighting": "trained"}, "--weighting trained: must be samples or uniform with"),
    ("fed_avg", {"client_moments": "average"}, "--client_moments average: must be keep, reset or"),
    ("fed_avg", {"sync": "epoch"}, "--sync epoch: must be round with --overlap"),
    ("fed_avg", {"aggregation": "int4"}, "--aggregation int4: must be exact, float or int8 with"),
    ("fed_avg", {"client_clip": "1"}, "--client_clip 1: must be none with --overlap"),
    ("fed_avg", {"dp": "client", "dp_clip": "1", "dp_noise": "1"}, "--dp client: must be none wi"),
])
def test_what_cannot_be_overlapped_is_refused(method: str, flags: dict[str, str], message: str
                                              ) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(method, {"overlap": "true"} | flags)

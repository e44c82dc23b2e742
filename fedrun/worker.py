"""A worker: the clients of one process on one device.

It holds one model, whose parameters every hosted client trains in its turn, the global model as a
second vector, and one buffer that the clients' terms are added to: hundreds of clients cost little
more memory than one.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from fedrun.client import Client
from fedrun.config import FederatedConfig, RunConfig
from fedrun.data.shards import contiguous_shards
from fedrun.data.tokens import TokenData
from fedrun.evaluate import Piece, validation_pieces
from fedrun.model.mamba2 import Mamba2LM
from fedrun.params import FlatParams
from fedrun.placement import place
from fedrun.plan import Plan
from fedrun.rundir import save_studied, studied
from fedrun.runtime import Runtime
from fedrun.sums import TermSum

DTYPES = {"bf16": torch.float32, "fp32": torch.float32, "fp64": torch.float64}


def new_model(config: RunConfig, vocab_size: int, device: torch.device) -> Mamba2LM:
    """The model of a run at its start: the same weights on every rank and every device."""
    assert config.dtype != "auto", "resolved before anything is built: it decides the bits"
    products = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    model = Mamba2LM(config.model, vocab_size, compute_dtype=products)
    model.init_weights(config.seed)
    return model.to(device=device, dtype=DTYPES[config.dtype])


class Worker:
    """Local training, aggregation and a part of the evaluation; communicates only to aggregate."""

    def __init__(self, config: FederatedConfig, data: TokenData, runtime: Runtime) -> None:
        assert runtime.worker is not None
        self.config = config
        self.data = data
        self.runtime = runtime
        self.model = new_model(config, data.vocab_size, runtime.device)
        self.flat = FlatParams(self.model)
        self.global_model = self.flat.vector.clone()
        self.state = {name: torch.zeros_like(self.global_model) for name in config.strategy.state}
        self.terms = TermSum(config.strategy, self.flat.size, self.flat.vector,
                             exact=config.reduce == "exact")
        shards = contiguous_shards(len(data.train), config.num_clients)
        hosted = place([len(s) for s in shards], len(runtime.workers))[runtime.worker]
        self.clients = {k: Client(k, shards[k], data.train, self.flat, config) for k in hosted}
        self.start = studied(self.flat.views(self.global_model)) if config.save_client_deltas else {}

    def train(self, plan: Plan) -> dict[str, Any]:
        """Train the hosted clients of the cohort, adding each one's term; nothing travels."""
        began = time.monotonic()
        self.terms.begin(plan.bound)
        clients, client_pieces = [], {}
        for index, weight in zip(plan.cohort, plan.weights, strict=True):
            if (client := self.clients.get(index)) is None:
                continue
            losses = self._train_client(client, plan)
            if plan.evaluate and self.config.eval_clients:
                client_pieces[index] = self._pieces(0, 1)
            if plan.evaluate and self.config.save_client_deltas:
                save_studied(self.config.run_dir / f"client_{index}", plan.round,
                             studied(self.flat.views(self.flat.vector)), self.start)
            # From here on the worker's parameters are the update; the next client loads its own.
            finite = self.terms.add(self.flat.vector.sub_(self.global_model), weight)
            if not finite:
                client.forget()
            clients.append([index, losses.loss_sum, losses.tokens, finite])
        return {"clients": clients, "client_pieces": client_pieces,
                "local_training_seconds": time.monotonic() - began}

    def _train_client(self, client: Client, plan: Plan) -> Any:
        own = None if plan.start_from_global else client.parameters
        self.flat.vector.copy_(self.global_model if own is None else own)
        if self.config.client_state == "reset":
            client.reset_moments()
        losses = client.train(self.model, self.config.local_updates, self._look_at_peers)
        if self.config.sync == "epoch":
            client.keep_parameters()
        return losses

    def aggregate(self) -> float:
        """Workers: sum the terms and update the global model; seconds it took."""
        began = time.monotonic()
        self.runtime.data_plane.all_reduce(self.terms.buffer)
        self.terms.apply(self.global_model, self.state)
        return time.monotonic() - began

    def evaluate(self) -> tuple[list[Piece], float]:
        """This worker's part of the validation split under the global model; seconds it took."""
        began = time.monotonic()
        self.flat.vector.copy_(self.global_model)
        return self._pieces(self.runtime.worker or 0, len(self.runtime.workers)), \
            time.monotonic() - began

    def _pieces(self, part: int, parts: int) -> list[Piece]:
        return validation_pieces(self.model, self.data.validation, self.runtime.device, part, parts,
                                 self._look_at_peers)

    def _look_at_peers(self) -> None:
        if self.runtime.control.peer_failed():
            raise StoppedForPeer


class StoppedForPeer(Exception):
    """Local work was broken off because another rank has failed."""

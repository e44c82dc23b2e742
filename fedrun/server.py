"""The server: the plans of the rounds, the verdict on each, the run's history and models.

It keeps no clients and sums nothing. What it writes, it writes on a thread of its own, beside the
next round's training: nobody waits for a disk.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fedrun.config import FederatedConfig
from fedrun.data.shards import contiguous_shards
from fedrun.data.tokens import TokenData
from fedrun.evaluate import Piece, mean_loss, perplexity, sample_text
from fedrun.params import FlatParams
from fedrun.plan import Plan, Schedule
from fedrun.rundir import save_model, save_studied, studied, write_json
from fedrun.track import Events, Progress
from fedrun.worker import DTYPES, new_model

SECONDS = ("local_training_seconds", "aggregation_seconds", "evaluation_seconds")


class Server:
    """Rank 0's part of the protocol."""

    def __init__(self, config: FederatedConfig, data: TokenData) -> None:
        self.config = config
        self.data = data
        shards = contiguous_shards(len(data.train), config.num_clients)
        self.schedule = Schedule(config, [len(s) for s in shards])
        self.model = new_model(config, data.vocab_size, torch.device("cpu"))
        self.flat = FlatParams(self.model)
        self.start = studied(self.flat.views(self.flat.vector))
        self.history: list[dict[str, Any]] = []
        self.events = Events(config.run_dir / "events.jsonl")
        self.progress = Progress("round", self.schedule.rounds)
        self.began = time.monotonic()
        self.tokens = 0
        self.seconds = dict.fromkeys(SECONDS, 0.0)
        self._losses_since_record = (0.0, 0)
        self._left_out_since_record: list[list[int]] = []
        self._writer = ThreadPoolExecutor(1, "fedrun-writer",
                                          initializer=lambda: torch.set_num_threads(config.threads))
        self._writing: Future[None] | None = None

    @property
    def size(self) -> int:
        return self.flat.size

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.dtype]

    def plan(self, number: int) -> dict[str, Any]:
        return dataclasses.asdict(self.schedule.plan(number))

    def judge(self, plan: Plan, reports: list[dict[str, Any]]) -> dict[str, Any]:
        """What happens after local training: all go on, or all end, with the same reason."""
        for rank, report in enumerate(reports):
            if report.get("traceback"):
                return {"reason": f"{report['traceback']}round {plan.round}: rank {rank} failed "
                        "with the error above; all ranks end"}
        trained = [c for report in reports for c in report.get("clients", [])]
        assert sorted(index for index, *_ in trained) == sorted(plan.cohort)
        if not any(finite for *_, finite in trained):
            return {"reason": f"round {plan.round}: no client's update is finite (--lr "
                    f"{self.config.lr:g} may be too large); the last good model is in "
                    f"{self.config.run_dir / 'model.safetensors'}"}
        return {}

    def record(self, plan: Plan, reports: list[dict[str, Any]], model: Tensor | None) -> None:
        """Take note of a round; `model` (size,) is the global model where it was evaluated."""
        clients = [c for report in reports for c in report.get("clients", [])]
        finite = [c for c in clients if c[3]]
        left_out = [index for index, *_, ok in clients if not ok]
        loss_sum, tokens = sum(c[1] for c in finite), sum(c[2] for c in finite)
        self.tokens += (len(clients) * self.config.local_updates * self.config.batch_size
                        * self.config.sequence_length)
        for name in SECONDS:
            self.seconds[name] += max(report.get(name, 0.0) for report in reports)
        before = self._losses_since_record
        self._losses_since_record = (before[0] + loss_sum, before[1] + tokens)
        for index in left_out:
            self._left_out_since_record.append([plan.round, index])
            self.progress.say(f"round {plan.round}: client {index} is left out, its update is not "
                              "finite; its moments start anew")
        train_ppl = perplexity(loss_sum / tokens)
        self.events.add("round", round=plan.round, train_ppl=train_ppl, tokens=self.tokens,
                        left_out=left_out, seconds=time.monotonic() - self.began, **self.seconds)
        val_ppl = None
        if model is not None:
            val_ppl = self._add_record(plan, reports, model)
        self.progress.step(plan.round, train_ppl, self.tokens, val_ppl)

    def _add_record(self, plan: Plan, reports: list[dict[str, Any]], model: Tensor) -> float:
        loss = mean_loss(_pieces(reports, "pieces"))
        train_loss = self._losses_since_record[0] / self._losses_since_record[1]
        record = {
            "global_step": plan.round, "train_loss": train_loss, "train_ppl": perplexity(train_loss),
            "server_val_loss": loss, "server_val_ppl": perplexity(loss), "generated": None,
            "tokens": self.tokens, "seconds": time.monotonic() - self.began, **self.seconds,
            "left_out": self._left_out_since_record}
        if self.config.eval_clients:
            by_client = {int(k): v for r in reports for k, v in r.get("client_pieces", {}).items()}
            record["client_val_ppls"] = [perplexity(mean_loss(by_client[k])) for k in plan.cohort]
        self._losses_since_record, self._left_out_since_record = (0.0, 0), []
        self.history.append(record)
        self._write(lambda: self._save(plan.round, model, record))
        return perplexity(loss)

    def _save(self, number: int, model: Tensor, record: dict[str, Any]) -> None:
        """On the writer's thread: the model, its studied parameters, sample text, the history."""
        self.save_model(model)
        save_studied(self.config.run_dir / "server", number, studied(self.flat.views(model)),
                     self.start)
        record["generated"] = sample_text(self.model, self.data, torch.device("cpu"))
        write_json(self.config.run_dir / "training_history.json",
                   [r for r in self.history if r["global_step"] <= number])

    def save_model(self, model: Tensor) -> None:
        self.flat.vector.copy_(model)
        save_model(self.config.run_dir / "model.safetensors", self.flat.views(self.flat.vector))

    def _write(self, work: Any) -> None:
        """Hand work to the writer; one piece at a time is under way, and its errors surface here."""
        if self._writing is not None:
            self._writing.result()
        self._writing = self._writer.submit(work)

    def end_early(self, reason: str, model: Tensor) -> None:
        """Keep the model of the last whole round, and tell the reason."""
        self.finish()
        self.save_model(model)
        print(f"fedrun: {reason}", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Wait until all is written."""
        if self._writing is not None:
            self._writing.result()
        self._writer.shutdown()
        self.events.add("end", seconds=time.monotonic() - self.began)
        self.events.close()
        self.progress.close()


def _pieces(reports: list[dict[str, Any]], name: str) -> list[Piece]:
    return [(number, loss, tokens) for report in reports
            for number, loss, tokens in report.get(name, [])]

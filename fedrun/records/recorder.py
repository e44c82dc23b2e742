"""Writes a run's history, events, models, snapshots and checkpoints.

Federated and central runs write the same files; a `Schema` holds the names in which they differ.
Files of models, snapshots, history and checkpoints are written by a thread, in the order of the
calls, so that training does not wait for a disk unless it falls behind by MAX_PENDING tasks. It
also makes the sample texts, unless training on GPUs is not to wait for them (sample_texts.py).

    recorder = Recorder(config, FEDERATED, rounds, flat, provenance, workers)
    for each round:
        recorder.totals.add(...)
        record = recorder.evaluated(number, pieces, model, generated, ...)   # only some rounds
        recorder.step(number, train_ppl, lr, record, ...)
        if recorder.checkpoint_due(number):
            recorder.begin_checkpoint(number, ...)       # and the workers write their files
        recorder.commit_checkpoints(written)
    recorder.finish(number, stop, written)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedrun.common.files import write_json
from fedrun.common.log import WARNING, log
from fedrun.common.perplexity import perplexity
from fedrun.config import RunConfig
from fedrun.records.best import BestModel
from fedrun.records.checkpoint_writer import CheckpointCoordinator, Members
from fedrun.records.events import Events, Progress
from fedrun.records.history import COHORT_NUMBERS, RunTotals, half_losses
from fedrun.records.outcome import write_outcome
from fedrun.records.sample_texts import SampleTexts, Stopwatch
from fedrun.records.schema import CLIENTS_LOSS, SITE_VAL_PPL, Schema
from fedrun.records.snapshots import SnapshotWriter, save_model, tracked_parameters
from fedrun.training.evaluate import Piece, mean_loss
from fedrun.training.params import FlatParams

MAX_PENDING = 4
"""Tasks that are queued or running. The task of an evaluation holds a copy of the model, and so
does one more that waits for a place: 2 GB in all for 100 million parameters in fp32."""


@dataclass(frozen=True)
class RoundRecord:
    """A finished round, or step of a central run, as `on_round` gets it."""

    number: int
    """Counted from 1."""
    train_ppl: float | None
    """Perplexity of the training batches, each under the model that it trained. None with --dp,
    which does not show it."""
    val_ppl: float | None
    """The global model's perplexity on the validation split; None where it was not evaluated."""
    lr: float
    tokens: int
    """Training tokens so far, of all clients."""
    seconds: float
    """Wall-clock time so far."""
    event: Mapping[str, Any]
    """All that the round's line in events.jsonl holds."""


OnRound = Callable[[RoundRecord], object]
"""Called after each round; if it returns "stop", the run stops there, with a checkpoint."""
ON_ROUND = "on_round"  # who has asked to stop then


class Recorder:
    """Writes what a run leaves in its folder. All methods are for the thread that trains.

    An error of the writer's thread is raised by a later call that hands it a task, or at the latest
    by `wait`, `finish` or `close`. `FolderLost` is such an error: the thread writes nothing into a
    folder that no longer belongs to this run.

    If the disk is full, training continues: an evaluation that could not be written is written with
    the next one. The last evaluation has to succeed, and so has one that finds the snapshots' queue
    full.
    """

    def __init__(self, config: RunConfig, schema: Schema, total: int, flat: FlatParams,
                 provenance: dict[str, Any], workers: int, done: int = 0,
                 state: Mapping[str, Any] | None = None, skips_texts: bool = False,
                 on_round: OnRound | None = None, members: Members | None = None) -> None:
        """
        total: the rounds or steps of the run.
        flat: the model as it is before the first of them, also in a run that resumes: snapshots
            hold the change since then. Later only its layout is used.
        provenance, workers: what checkpoints record besides the settings, and how many processes
            write files of them.
        done, state: number and content of the checkpoint that the run resumes from.
        skips_texts: whether evaluations go without a sample text that training would wait for.
            Then `generated` depends on the time that everything takes.
        on_round: called after each round or step.
        members: of a run of real sites.
        """
        self.config, self.schema, self.total, self.on_round = config, schema, total, on_round
        self.stop = False  # whether `on_round` has asked for it
        self.totals = RunTotals()
        self.history: list[dict[str, Any]] = []
        self.start = tracked_parameters(flat, flat.vector)
        if state is not None:
            self.history = state["history"]
            self.totals.load_state(state["clocks"])
            write_json(config.run_dir / "training_history.json", self.history)
        self.events = Events(config, schema.unit, total, done)
        self.progress = Progress(schema.unit, total, done, self.totals.tokens,
                                 self.totals.now()["seconds"])
        self.checkpoints = CheckpointCoordinator(config, provenance, workers,
                                                 self._write_unwritten, members)
        losses = [(record[schema.step], loss) for record in self.history
                  if (loss := self._deciding(record)) is not None]
        self._best = BestModel(config, losses) if config.keep == "best" else None
        self._flat = flat
        self._snapshots = SnapshotWriter(config.run_dir / schema.snapshots, self.start)
        self._writer = ThreadPoolExecutor(1, "fedrun-writer",
                                          initializer=lambda: torch.set_num_threads(config.threads))
        self._pending: deque[Future[None]] = deque()
        self._busy, self._making_text = Stopwatch(), Stopwatch()  # the thread
        self._warned = False
        self._texts = SampleTexts(config.threads, schema.unit) if skips_texts else None

    def step(self, number: int, train_ppl: float | None, lr: float,
             record: Mapping[str, Any] | None = None, **fields: Any) -> None:
        """Record a finished round or step in events.jsonl, the tracker and the progress line.

        record: what `evaluated` returned, if this step was evaluated. fields: more of the event.
        """
        trained = {} if train_ppl is None else {"train_ppl": train_ppl}
        values = {self.schema.unit: number, **trained, **fields, "lr": lr, **self.totals.now()}
        val_ppl, shown = None, None
        if record is not None:
            val_ppl = record[self.schema.val_ppl]
            values |= {"val_ppl": val_ppl} | {name: record[name] for name in COHORT_NUMBERS
                                              if name in record}
            shown = {name: record[key] for name, key in (
                ("train ppl", "train_ppl"), ("val ppl", self.schema.val_ppl),
                ("site val ppl", SITE_VAL_PPL), ("epsilon", "epsilon")) if key in record}
        self.events.add(self.schema.unit, **values)
        self.progress.step(number, train_ppl, values["tokens"], values["seconds"], shown)
        if self.on_round is not None:
            self.stop = self.on_round(RoundRecord(
                number, train_ppl, val_ppl, lr, values["tokens"], values["seconds"], values)
            ) == "stop"

    def evaluated(self, number: int, pieces: Sequence[Piece], model: Tensor,
                  generated: str | Callable[[], str], **fields: Any) -> dict[str, Any]:
        """Record an evaluation: in the history, as the last model, as a snapshot and, if it is the
        best so far, as the best model.

        pieces: the losses of all validation batches. model: (size,) on the CPU, from now on the
        recorder's. generated: sample text, or a function that makes it on a thread of the
        recorder's. fields: more of the record. Returns the record; a sample that is still to be
        made, or skipped, is None.
        """
        loss = mean_loss(pieces)
        record = {self.schema.step: number, **self.totals.take_train_loss(),
                  self.schema.val_loss: loss, self.schema.val_ppl: perplexity(loss),
                  "val_loss_halves": half_losses(pieces),
                  "generated": None if callable(generated) else generated,
                  **self.totals.now(), **fields}
        self.history.append(record)
        make = generated if callable(generated) else None
        if make is not None and self._texts is not None:
            self._texts.offer(record, make, last=number == self.total)
            make = None
        self._submit(lambda: self._save(number, model, record, make))
        return record

    def checkpoint_due(self, number: int) -> bool:
        """Whether the run is to be saved after this round or step."""
        return self.checkpoints.due(number, last=number >= self.total)

    def begin_checkpoint(self, number: int, vectors: Mapping[str, Tensor] | None = None,
                         **state: Any) -> None:
        """Keep the history up to this round or step for a checkpoint whose files the workers have
        begun to write; `state`: what else it has to hold, as JSON-able values; `vectors`: the
        global state of a run of real sites, on the CPU, from now on the recorder's."""
        # The records' sample texts may still be missing: the thread makes them before it commits,
        # unless they may be skipped.
        self.checkpoints.begin(number, {"history": self.history.copy(),
                                        "clocks": self.totals.state(), **state}, vectors or {})

    def commit_checkpoints(self, written: Iterable[Sequence[dict[str, Any]]]) -> None:
        """Complete the checkpoints whose files all workers have written; `written`: what
        `CheckpointWriter.written` returned on each rank, or only on each worker."""
        for commit in self.checkpoints.collect(written):
            self._submit(commit)

    def save_model(self, model: Tensor) -> None:
        """Write a vector (size,) as the last model, in the calling thread."""
        save_model(self.config.run_dir / "model.safetensors", self._flat.views(model))

    def wait(self) -> None:
        """Wait until everything so far is written. Raises the first error of the writing."""
        while self._pending:
            self._pending.popleft().result()

    def finish(self, number: int, stop: str, written: Iterable[Sequence[dict[str, Any]]]
               ) -> None:
        """End the record of a run that succeeded.

        number: the last round or step. stop: who asked for an end before the run's last; else
        empty. written: as for `commit_checkpoints`.
        """
        if self._texts is not None:
            self._texts.wait()
            self._submit(lambda: self._write_history(number))  # with the texts made since
        self.wait()
        self.commit_checkpoints(written)
        self.close()
        write_outcome(self.config.run_dir, "stopped" if stop else "finished", number, stop)

    def close(self) -> None:
        """Wait until everything is written, and end events and progress."""
        self.wait()
        self.end_thread()
        self.events.add("end", **self.totals.now())
        self.events.close()
        self.progress.close()

    def end_thread(self) -> None:
        """Wait until nothing is written any more, without raising the errors of the writing."""
        if self._texts is not None:
            self._texts.end_thread()
        self._writer.shutdown()

    def _submit(self, task: Callable[[], None]) -> None:
        """Hand the thread a task, after waiting for a place in the queue. Raises its errors."""
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()
        if len(self._pending) == MAX_PENDING:
            if not self._warned:
                log(self._what_is_slow(), WARNING)
            self._warned = True
            self._pending.popleft().result()
        self._pending.append(self._writer.submit(self._timed, task))

    def _what_is_slow(self) -> str:
        """The warning when training waits: for what the thread has spent most of its time on."""
        unit = self.schema.unit
        if 2 * self._making_text.seconds > self._busy.seconds:
            return (f"a sample text takes longer than the {unit}s between evaluations: training "
                    "waits for it (a larger --val_freq makes fewer)")
        return (f"{self.config.run_dir} is written more slowly than {unit}s finish: training waits "
                "for the disk (a larger --val_freq writes less)")

    # ---- on the writer's thread ------------------------------------------------------------------

    def _timed(self, task: Callable[[], None]) -> None:
        with self._busy:
            task()

    def _save(self, number: int, model: Tensor, record: dict[str, Any],
              generate: Callable[[], str] | None) -> None:
        run_dir = self.config.run_dir
        must_succeed = number == self.total or self._snapshots.full
        self._snapshots.add(number, tracked_parameters(self._flat, model))
        if generate is not None:
            with self._making_text:
                record["generated"] = generate()
        try:
            self.save_model(model)
            if self._best is not None:
                self._best.offer(number, self._deciding(record), self._flat.views(model))
            self._write_history(number)
            self._snapshots.write()
        except OSError as error:
            if must_succeed:
                raise
            log(f"{self.schema.unit} {number} could not be written to {run_dir} "
                f"({error.strerror}); the next evaluation tries again", WARNING)

    def _deciding(self, record: Mapping[str, Any]) -> Any:
        """The loss of a record by which --keep best decides."""
        if self.config.measures_own_models:  # one kind of loss, also if an earlier start had not
            return record.get(CLIENTS_LOSS)
        return record[self.schema.val_loss]

    def _write_history(self, number: int) -> None:
        """Write the records until a round or step."""
        write_json(self.config.run_dir / "training_history.json",
                   [r for r in self.history if r[self.schema.step] <= number])

    def _write_unwritten(self) -> None:
        """Before a checkpoint is committed: write what a full disk has rejected. A run that resumes
        from the checkpoint does not repeat the steps that it belongs to."""
        self._snapshots.write()
        self.events.write()

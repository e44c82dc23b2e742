"""pfl's side: central iterations of its simulation, with the commands and answers of ranks.py.

    RANK=... python -m tests.benchmarks.peers.pfl_rounds --clients 4 --shapes '[[100, 8]]'

FederatedAveraging on the simulated backend, one process per worker in torchrun's environment, and a
central SGD with learning rate 1. Measured is all that pfl does from one central iteration to the
next. With --shapes clients do not train, with --task (sgd.py) they do.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import nn

from tests.benchmarks.ranks import Commands, Rounds, end_with_parent

MANY_ROUNDS = 10**6  # the end of the commands ends the run


class Tensors(nn.Module):
    """A model that is nothing but tensors of given shapes."""

    def __init__(self, shapes: list[list[int]]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(torch.zeros(shape) for shape in shapes)


class Averaging(FederatedAveraging):
    """FederatedAveraging with the benchmark's local training."""

    def __init__(self, task_json: str | None, module: Any) -> None:
        super().__init__()
        self.task = None
        if task_json:
            from tests.benchmarks.sgd import Task
            self.task, self.module = Task.from_json(task_json), module

    def train_one_user(self, initial_model_state: Any, model: Any, user_dataset: Any,
                       central_context: Any) -> Any:
        if self.task:
            gradients = self.module.flat.views(self.module.flat.grad)
            for (_, p), (_, gradient) in zip(sorted(self.module.named_parameters()), gradients,
                                             strict=True):
                p.grad = gradient  # the central optimizer has replaced it
            self.task.train(self.module, self.module.flat, user_dataset.user_id,
                            central_context.current_central_iteration + 1)
        return model.get_model_difference(initial_model_state), Metrics()


class Between(TrainingProcessCallback):
    """Measures the time between rounds."""

    def __init__(self, rounds: Rounds) -> None:
        self.rounds = rounds
        self.distributed = pytorch_ops.distributed

    def on_train_begin(self, *, model: Any) -> Metrics:
        self._ends()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *,
                                central_iteration: int) -> Any:
        return self._ends(), Metrics()

    def _ends(self) -> bool:
        """All ranks: whether rank 0 has no more commands."""
        stop = torch.zeros(1)
        if self.distributed.global_rank == 0:
            stop[0] = not self.rounds.between()
        if self.distributed.world_size > 1:
            torch.distributed.broadcast(stop, 0)
        return bool(stop)


def main() -> None:
    commands = Commands()
    end_with_parent()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--shapes", help="JSON: shapes of the model's tensors")
    parser.add_argument("--task", help="JSON: a Task; train for real")
    parser.add_argument("--out", help="file for the global model after the last round")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.shapes:
        module: Any = Tensors(json.loads(arguments.shapes))
    else:
        from tests.benchmarks.sgd import Task
        module, flat = Task.from_json(arguments.task).build()
        object.__setattr__(module, "flat", flat)
    module.loss, module.metrics = None, lambda *_, **__: {}
    central = torch.optim.SGD(module.parameters(), lr=1.0)
    model = PyTorchModel(module, lambda parameters, lr: None, central)
    shards = {k: (np.zeros((1, 1), dtype=np.float32),) for k in range(arguments.clients)}
    data = FederatedDataset(lambda k: Dataset(shards[k], user_id=k),
                            MinimizeReuseUserSampler(list(shards)))
    Averaging(arguments.task, module).run(
        NNAlgorithmParams(MANY_ROUNDS, evaluation_frequency=MANY_ROUNDS,
                          train_cohort_size=arguments.clients, val_cohort_size=0),
        SimulatedBackend(training_data=data, val_data=data), model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=1.0, local_batch_size=None),
        callbacks=[Between(Rounds(commands))], send_metrics_to_platform=False)
    if arguments.out and pytorch_ops.distributed.global_rank == 0:
        np.save(arguments.out, module.flat.vector.numpy())


if __name__ == "__main__":
    main()

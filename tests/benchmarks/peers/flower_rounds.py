"""Flower's side: rounds of `run_simulation`, with the commands and answers of ranks.py.

    python -m tests.benchmarks.peers.flower_rounds --workers 2 --clients 4 --shapes '[[100, 8]]'

FedAvg with the Message API and NumPy arrays. Each client has one CPU, so that there are as many
actors as workers. Measured is all that Flower does from one `configure_train` to the next; a client
converts the message to arrays and arrays to its reply. With --shapes clients do not train, with
--task (sgd.py) they do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
from typing import Any

from tests.benchmarks.ranks import Commands, Rounds, end_with_parent

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

MANY_ROUNDS = 10**6  # the end of the commands ends the run


class Ended(Exception):
    """There are no more commands."""


class Timed(FedAvg):
    """FedAvg that measures the time between rounds."""

    def __init__(self, rounds: Rounds, clients: int, out: str | None) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=clients,
                         min_available_nodes=clients)
        self.rounds, self.out = rounds, out

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord,
                        grid: Grid) -> Any:
        if not self.rounds.between():
            if self.out:
                np.save(self.out, flat(arrays.to_numpy_ndarrays()))
            raise Ended
        return super().configure_train(server_round, arrays, config, grid)


def flat(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([array.reshape(-1) for array in arrays])


def client_app(task_json: str | None) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = message.content["arrays"].to_numpy_ndarrays()
        if task_json:
            number = message.content["config"]["server-round"]
            arrays = trained(task_json, arrays, int(context.node_config["partition-id"]), number)
        return Message(RecordDict({"arrays": ArrayRecord(arrays),
                                   "metrics": MetricRecord({"num-examples": 1})}),
                       reply_to=message)

    return app


_built: dict[str, Any] = {}  # an actor's model, kept between messages


def trained(task_json: str, arrays: list[np.ndarray], client: int, number: int
            ) -> list[np.ndarray]:
    import torch

    from tests.benchmarks.sgd import Task
    torch.set_num_threads(1)
    task = Task.from_json(task_json)
    if not _built:
        _built["model"], _built["flat"] = task.build()
    vector = _built["flat"].vector
    views = [view for _, view in _built["flat"].views(vector)]
    for view, array in zip(views, arrays, strict=True):
        view.copy_(torch.from_numpy(array))
    task.train(_built["model"], _built["flat"], client, number)
    return [view.numpy() for view in views]


def initial(arguments: argparse.Namespace) -> list[np.ndarray]:
    if arguments.shapes:
        return [np.zeros(shape, dtype=np.float32) for shape in json.loads(arguments.shapes)]
    from tests.benchmarks.sgd import Task
    _, flat_params = Task.from_json(arguments.task).build()
    return [view.numpy().copy() for _, view in flat_params.views(flat_params.vector)]


def main() -> None:
    commands = Commands()
    end_with_parent()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--shapes", help="JSON: shapes of the model's tensors")
    parser.add_argument("--task", help="JSON: a Task; train for real")
    parser.add_argument("--out", help="file for the global model after the last round")
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy = Timed(Rounds(commands), arguments.clients, arguments.out)
        with contextlib.suppress(Ended):
            strategy.start(grid, ArrayRecord(initial(arguments)), num_rounds=MANY_ROUNDS)

    run_simulation(server_app, client_app(arguments.task), arguments.clients,
                   backend_config={"client_resources": {"num_cpus": 1},
                                   "init_args": {"num_cpus": arguments.workers,
                                                 "include_dashboard": False}})


if __name__ == "__main__":
    main()

"""Who takes part in a run: server, workers, clients, and the plan of a round."""

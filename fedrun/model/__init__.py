"""The Mamba-2 language model. Knows nothing of runs, clients or ranks."""

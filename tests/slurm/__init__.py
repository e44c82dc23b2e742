"""A real SLURM cluster of two nodes on one machine, for tests of what runs on it."""

"""fedrun: federated training of Mamba-2 language models on torch.distributed."""

__version__ = "0.1.0"

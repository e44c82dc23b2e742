"""The Mamba-2 language model: what one client computes, without any notion of ranks."""

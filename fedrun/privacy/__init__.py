"""Differential privacy: clipping, noise, and what they cost."""

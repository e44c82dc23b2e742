"""Ranks: how they start, communicate and end. Independent of training."""

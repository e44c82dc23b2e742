"""Ranks: how they start, talk and end. Knows nothing of learning."""

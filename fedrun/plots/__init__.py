"""Figures, drawn from run folders alone."""

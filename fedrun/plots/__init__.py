"""Figures from run folders alone."""

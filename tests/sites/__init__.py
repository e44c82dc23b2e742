"""Institutions on one machine, and what is said between them."""

"""The same rounds in other frameworks, each in its own environment (environments.py)."""

"""The same rounds under other frameworks, each in an environment of its own (environments.py)."""

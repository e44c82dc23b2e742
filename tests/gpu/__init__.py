"""What a machine with GPUs has to show: python -m tests.gpu.accept FOLDER (see accept.py)."""

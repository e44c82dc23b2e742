"""What a notebook or a script does with runs. The commands in tools/ are written on it."""

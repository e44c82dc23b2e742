"""What is measured; never a test that passes or fails by a time."""

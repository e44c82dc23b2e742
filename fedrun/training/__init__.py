"""One client's arithmetic."""

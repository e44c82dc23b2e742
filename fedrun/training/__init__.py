"""What one client computes: optimizer steps, Fisher information, evaluation."""

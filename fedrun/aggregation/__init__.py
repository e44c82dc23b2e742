"""The sum over a cohort, and the server update computed from it."""

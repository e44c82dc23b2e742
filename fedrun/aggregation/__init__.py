"""The sum over a cohort, and the server update that is made of it."""

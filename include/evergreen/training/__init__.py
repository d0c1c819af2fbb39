"""Training: jobs, the places they run in, and the built-in tabular trainer."""

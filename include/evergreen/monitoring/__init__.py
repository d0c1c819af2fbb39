"""Monitoring: what a window looks like, how it differs from another, and what kind of difference that is."""

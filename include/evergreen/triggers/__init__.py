"""Triggers: what asks for a run, written down first, and what admission makes of it."""

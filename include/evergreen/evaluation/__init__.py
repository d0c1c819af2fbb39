"""Evaluation: figures with intervals, and the pure gate that judges them."""

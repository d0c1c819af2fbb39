"""Evergreen keeps models trained: see ARCHITECTURE.md for the loop, the house and the laws."""

__version__ = "0.1.0"

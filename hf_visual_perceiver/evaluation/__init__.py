"""Accuracy at every budget, and what follows from it."""

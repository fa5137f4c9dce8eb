"""Graphs for other runtimes."""

"""Utilities for files, measurement conditions, the console and tables."""

"""Engines that answer faster than the model itself."""

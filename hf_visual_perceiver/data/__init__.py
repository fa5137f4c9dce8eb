"""Datasets and their splits, image files, image processors and the embedded sample."""

"""Datasets, their parts, images in files, the embedded sample."""

"""Evaluation at every budget: accuracy, calibration, cascades, robustness, retrieval and plots."""

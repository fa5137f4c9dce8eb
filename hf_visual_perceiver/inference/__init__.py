"""Inference: loading checkpoints, the pipeline, and ONNX Runtime engines that are faster than the model itself."""

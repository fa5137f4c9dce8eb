"""Export to other runtimes: ONNX, torch.export and timm."""

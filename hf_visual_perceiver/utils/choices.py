"""Values of command-line options, kept apart from their implementations, which import torch."""

DTYPES = ("float32", "bfloat16", "float16")  # dtypes to compute in
FEATURES = ("pooled", "mean")  # features for retrieval
FORMATS = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors-timm": "_timm"}  # export formats: suffix of the file
# Forms of a model in benchmarks. "optimized" is the engine of `optimize_for_inference`, which on a CPU in float32 is
# ONNX Runtime; "int8" is the same in 8 bits. "grouped" is "eager", but with selection it computes attention in groups
# of images instead of variable-length attention.
FORMS = ("eager", "optimized", "int8", "compiled", "grouped")


def check_dtype(dtype: str) -> None:
    """Raise a `ValueError` unless this is one of `DTYPES`."""
    if dtype not in DTYPES:
        raise ValueError(f"Expected dtype to be float32, bfloat16 or float16, got {dtype!r}.")

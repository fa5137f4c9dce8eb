"""Names that options take, apart from what implements them, which imports torch."""

DTYPES = ("float32", "bfloat16", "float16")  # to compute in
FEATURES = ("pooled", "mean")  # of retrieval
FORMATS = {"onnx": ".onnx", "torch-export": ".pt2", "safetensors-timm": "_timm"}  # of exports, and how their files end
# Of a benchmark. "optimized" is the engine of `optimize_for_inference`, on a CPU in float32 ONNX Runtime, and "int8" that in 8
# bits. "grouped" is eager too, but selection attends in groups where "eager" has variable-length attention.
FORMS = ("eager", "optimized", "int8", "compiled", "grouped")


def check_dtype(dtype: str) -> None:
    """Raise a `ValueError` unless it is a dtype to compute in."""
    if dtype not in DTYPES:
        raise ValueError(f"Expected dtype to be float32, bfloat16 or float16, got {dtype!r}.")

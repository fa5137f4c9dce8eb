"""The import names of the packages in pyproject.toml's extras, for error messages that name the extra."""

from importlib.util import find_spec


TRAIN = ("accelerate", "datasets", "matplotlib", "pydantic", "rich", "typer")
EXTRAS = {
    "train": TRAIN,
    "cli": (*TRAIN, "evaluate", "jinja2", "onnxruntime", "scipy"),
    "export": ("onnx", "onnxscript", "onnxruntime"),
}


def require_extra(extra: str) -> None:
    """Raise an `ImportError` that names the extra unless its packages are installed.

    Example:
        >>> require_extra("train")
    """
    if missing := [name for name in EXTRAS[extra] if find_spec(name) is None]:
        raise ImportError(
            f"Expected {', '.join(missing)} to be installed, from the extra `{extra}`: "
            f"pip install 'hf-visual-perceiver[{extra}]'"
        )

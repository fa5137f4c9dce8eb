"""Files that are bundled with the package: checkpoints, a sample of CIFAR-10 and others."""

from pathlib import Path


DEFAULT_CHECKPOINT = "visual_perceiver_micro_cifar10"
SAMPLE = "the embedded sample of CIFAR-10"


def shipped(name: str) -> Path:
    """The path of a file or folder that comes with the package, whether installed or in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for root in (package, package.parent):
        if (root / name).exists():
            return root / name
    raise FileNotFoundError(f"Expected {name} in {package} or beside it, got neither.")


def bundled_checkpoint(name: str = DEFAULT_CHECKPOINT) -> str:
    """The folder of a checkpoint that comes with the package, which can be loaded wherever the package is installed.

    The checkpoints are Visual Perceivers trained on CIFAR-10. The default one has 2.2 M parameters and a convolutional
    stem with levels; `visual_perceiver_nano_cifar10` is small and has the paper's form. The README.md of each lists its
    accuracy at each budget.

    Example:
        >>> from transformers import AutoModelForImageClassification
        >>> model = AutoModelForImageClassification.from_pretrained(bundled_checkpoint())
        >>> model.config.num_queries
        32
    """
    return str(shipped(f"checkpoints/{name}"))


def default_model() -> str:
    """The checkpoint that a command uses if none is given."""
    return bundled_checkpoint()


def default_dataset() -> str:
    """The folder of the embedded sample of CIFAR-10."""
    return str(shipped("data"))

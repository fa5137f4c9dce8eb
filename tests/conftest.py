"""Shared fixtures. The data is the sample in the repository unless HF_VISUAL_PERCEIVER_CIFAR10 names a folder."""

import os

import datasets
import pytest
import torch
import transformers
from support import aligned, papers_form, small_config

from hf_visual_perceiver.inference.loading import default_dataset, load_model
from hf_visual_perceiver.modeling import VisualPerceiverConfig, VisualPerceiverForImageClassification


@pytest.fixture(autouse=True)
def quiet_and_seeded():
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    # The networks are small and the tests run side by side.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cifar10() -> str:
    """A folder with CIFAR-10's train and test split, or the sample of it."""
    return os.environ.get("HF_VISUAL_PERCEIVER_CIFAR10", default_dataset())


@pytest.fixture
def config() -> VisualPerceiverConfig:
    return small_config()


@pytest.fixture
def model(config) -> VisualPerceiverForImageClassification:
    return VisualPerceiverForImageClassification(config).eval()


@pytest.fixture
def images() -> torch.Tensor:
    """Eight normalised 16x16 images."""
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def trained() -> VisualPerceiverForImageClassification:
    """The bundled checkpoint of the paper's form."""
    return aligned(load_model(papers_form()))

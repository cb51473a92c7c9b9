"""No network, no telemetry, and a tiny real model with a real tokenizer that every test shares."""

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}

import pytest
import torch

from corolla.adapters import open_base
from corolla.client.process import pass_over_libraries
from tests.tiny import write_tiny_model

torch.set_num_threads(1)
pass_over_libraries()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Digests are cached in a folder of the test session, not in the user's home."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A folder with a random Llama of two layers and a byte-level tokenizer with a chat template."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(tiny_folder):
    """The tiny model, open; the same object for the whole session, so a test that changes it breaks others."""
    return open_base(str(tiny_folder), device="cpu")

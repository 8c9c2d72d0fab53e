"""Offline and on one thread, whatever runs the tests; what is set here must be set before anything is imported."""

import os

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
    os.environ[name] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
# The same examples in every run: what fails here fails everywhere.
settings.register_profile("exact", deadline=None, max_examples=60, derandomize=True, database=None)
settings.load_profile("exact")


@pytest.fixture(scope="session")
def tokenizer():
    """The word-level tokenizer that all tiny models share."""
    from tiny import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def llama():
    """A tiny Llama for reading. A test that trains one makes its own with `tiny_model`."""
    from tiny import tiny_model

    return tiny_model("llama")

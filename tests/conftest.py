"""Offline and on one thread, whatever runs the tests; what is set here must be set before anything is imported."""

import gc
import os
from pathlib import Path

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
    os.environ[name] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402
from filelock import FileLock  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
# The same examples in every run: what fails here fails everywhere.
settings.register_profile("exact", deadline=None, max_examples=60, derandomize=True, database=None)
settings.load_profile("exact")

TESTS = Path(__file__).parent
FIRST = (
    "miniatures/test_quickstart.py",
    "equivalence/test_variants.py",
    "miniatures/test_lat_miniatures.py",
    "miniatures/test_generalized.py",
    "miniatures/test_seal_miniatures.py",
)
"""Long files that are begun with, so that both processes end together. The second one needs no organism: while the
first one has it built, another that needs it would wait."""


def pytest_collection_modifyitems(items):
    ranks = {TESTS / name: rank for rank, name in enumerate(FIRST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_collection_finish():
    """Every training collects garbage, which goes through all that the libraries hold: half a second each time."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="session")
def organism(tmp_path_factory):
    """Gives the organism of a seed, to be read or copied. It is built once, by the process that asks first."""
    from trl_robust.organism import build_organism

    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent

    def of(seed: int):
        with FileLock(place / f"organism-{seed}.lock"):
            return build_organism(place / f"organism-{seed}", seed=seed, progress=False)

    return of

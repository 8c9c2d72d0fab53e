import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "recipes"))

from grid_parts import make_grid_place


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a tiny model, its training data, requests and questions, and a base recipe; to be read only."""
    return make_grid_place(tmp_path_factory.mktemp("grid"))

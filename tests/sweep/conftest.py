import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "recipes"))

from grid_parts import make_grid_place, one_after_another

from trl_robust.sweep import running


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a tiny model, its training data, requests and questions, and a base recipe; to be read only."""
    return make_grid_place(tmp_path_factory.mktemp("grid"))


@pytest.fixture
def in_this_process(monkeypatch):
    """A sweep whose runs are made by the process of the tests."""
    monkeypatch.setattr(running, "run_all", one_after_another)

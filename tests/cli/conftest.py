import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "recipes"))

from recipe_parts import make_workplace


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("workplace"))

import pytest
from recipe_parts import make_workplace


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("workplace"))

import pytest

from trl_robust.scripts.quickstart import run


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    """Runs the quickstart of a seed once a session; gives its folder and its results."""
    done = {}

    def of(seed: int):
        if seed not in done:
            folder = tmp_path_factory.mktemp(f"quickstart-{seed}")
            done[seed] = folder, run(folder, seed)
        return done[seed]

    return of

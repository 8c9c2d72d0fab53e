import shutil

import pytest

import trl_robust.organism
from trl_robust.scripts.quickstart import run


@pytest.fixture(scope="session")
def with_organism(organism):
    """Puts the organism of a seed where a miniature would build it."""

    def put(folder, seed):
        shutil.copytree(organism(seed).folder, folder)

    return put


@pytest.fixture(scope="session")
def quickstart(with_organism, tmp_path_factory):
    """Runs the quickstart of a seed once a session; gives its folder and its results."""
    done = {}
    build = trl_robust.organism.build_organism

    def found(folder, seed):
        with_organism(folder, seed)
        return build(folder, seed)

    def of(seed: int):
        if seed not in done:
            folder = tmp_path_factory.mktemp(f"quickstart-{seed}")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(trl_robust.organism, "build_organism", found)
                done[seed] = folder, run(folder, seed)
        return done[seed]

    return of

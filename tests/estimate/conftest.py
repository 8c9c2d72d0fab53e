import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "recipes"))

from recipe_parts import make_workplace, write_rows

from trl_robust.estimate.rehearsal import Held, Rehearsal

WORDS = [f"w{number}" for number in range(58)]


def text(length, number):
    return " ".join(WORDS[(number * 7 + place * 3) % len(WORDS)] for place in range(length))


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A model of six layers, and rows that are all of one length, so that what is counted can be exact."""
    folder = make_workplace(
        tmp_path_factory.mktemp("workplace"), hidden_size=64, intermediate_size=160, num_hidden_layers=6
    )
    preferences = [
        {"prompt": text(12, n), "chosen": " " + text(9, n + 1), "rejected": " " + text(7, n + 2)} for n in range(16)
    ]
    write_rows(folder / "preferences.jsonl", preferences)
    write_rows(
        folder / "benign.jsonl", [{"prompt": text(10, n), "completion": " " + text(11, n + 1)} for n in range(8)]
    )
    write_rows(folder / "corpus.jsonl", [{"forget": text(14, n), "retain": text(17, n + 5)} for n in range(16)])
    return folder


@pytest.fixture
def without_rehearsal(monkeypatch):
    """Activations are not counted, which takes a second."""
    monkeypatch.setattr(Rehearsal, "attack", lambda *args, **kwargs: Held(1.0, 1.0, (2.0,)))
    monkeypatch.setattr(Rehearsal, "outer", lambda *args, **kwargs: Held(1.0, 1.0, (2.0,)))

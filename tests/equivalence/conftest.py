import pytest

from trl_robust.trainers import adversary


@pytest.fixture
def attacks_made(monkeypatch):
    """Every search of a training: its batch, its threat, its settings and the perturbation found."""
    made = []
    real = adversary.find_perturbation

    def find(model, batch, threat, **settings):
        found = real(model, batch, threat, **settings)
        made.append((batch, threat, settings, found))
        return found

    monkeypatch.setattr(adversary, "find_perturbation", find)
    return made

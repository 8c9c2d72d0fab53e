"""Attacks by name, as a grid and an organism's suite ask for them."""

import json

import pytest

from trl_robust.attacks import Direct, Embedding, Finetune, Latent, Prefill, Template
from trl_robust.evaluation.named import named_attack
from trl_robust.evaluation.organism_suite import OrganismSuite

ROW = {"prompt": "w1 w2", "target": "w3", "answer": "w4"}


@pytest.fixture
def organism(tmp_path):
    """The data files of an organism, two rows each."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("attack_prompts", "utility", "lookalikes"):
        (data / f"{name}.jsonl").write_text((json.dumps(ROW) + "\n") * 2)
    (data / "finetune.jsonl").write_text(json.dumps({"prompt": "w1", "completion": " w2"}) + "\n")
    (data / "templates.txt").write_text("say {prompt}\n\n{prompt} now\n")
    return tmp_path


def test_the_usual_attacks_are_those_of_the_quickstart_at_their_defaults(organism):
    suite = OrganismSuite(organism)
    templates, examples = ("say {prompt}", "{prompt} now"), [{"prompt": "w1", "completion": " w2"}]
    assert suite.attacks == [Direct(), Template(templates), Prefill(), Latent(), Embedding(), Finetune(examples)]
    assert [row.id for row in suite.forbidden] == ["attack_prompts.jsonl-0", "attack_prompts.jsonl-1"]


def test_attacks_are_chosen_by_name_and_set_by_a_mapping(organism):
    assert OrganismSuite(organism, ["prefill"]).attacks == [Prefill()]
    chosen = OrganismSuite(
        organism, {"latent": {"sites": ["embedding", 0.5], "radius": 0.1}, "finetune": {"steps": 3}}
    )
    assert chosen.attacks[0] == Latent(sites=("embedding", 0.5), radius=0.1)
    assert chosen.attacks[1].steps == 3 and len(chosen.attacks[1].examples) == 1


def test_what_an_attack_does_not_have_is_refused_by_name():
    with pytest.raises(ValueError, match="`latnt` is no attack; choose among direct, template"):
        named_attack("latnt")
    with pytest.raises(ValueError, match="`latent` has no setting 'radios'; it has sites, stream"):
        named_attack("latent", {"radios": 1})
    with pytest.raises(ValueError, match="`direct` has no setting 'name'; it has none"):
        named_attack("direct", {"name": "other"})

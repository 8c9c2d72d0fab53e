"""The attacks of a suite, read off a mapping."""

import pytest

from trl_robust.attacks import Direct, Finetune, Latent, ManyShot
from trl_robust.evaluation.lines import CONTROL, map_lines, read_lines

ROWS = [{"prompt": f"w{number}", "completion": "w1", "target": "w2"} for number in range(9)]


def rows_of(kind, field, named, limit):
    return None if named == "nothing" else {"templates": None}.get(field, ROWS[:limit])


def read(entries, **settings):
    lines, left_out, faults = read_lines(entries, rows_of, **settings)
    assert not faults, faults
    return lines, left_out


def test_a_list_on_the_budget_makes_a_curve_by_rising_budget():
    (line,), _ = read({"latent": {"radius": [0.5, 0.1], "steps": 3}}, controls=False, seed=7)
    assert line.axis == "radius" and line.control_of is None
    assert [point.budget for point in line.points] == [0.1, 0.5]
    assert line.attack == Latent(radius=0.5, steps=3, seed=7)


def test_an_attack_without_a_list_is_one_point_and_one_without_a_budget_has_none():
    lines, _ = read({"direct": None, "finetune": {"steps": 3}}, controls=False)
    assert [line.points[0].budget for line in lines] == [None, 3.0]
    assert lines[0].attack == Direct() and lines[0].axis == ""
    assert isinstance(lines[1].attack, Finetune) and lines[1].axis == "steps"


def test_every_attack_with_a_random_control_gets_it_at_the_same_budgets():
    lines, _ = read({"latent": {"radius": [0.1, 0.5]}, "finetune": {}, "gcg": {"objective": "random"}})
    assert [line.name for line in lines] == ["latent", "latent" + CONTROL, "finetune", "gcg"]
    control = lines[1]
    assert control.control_of == "latent"
    assert [(point.budget, point.attack.objective) for point in control.points] == [(0.1, "random"), (0.5, "random")]


def test_one_attack_under_two_names_with_rows_of_its_own():
    lines, _ = read({"few": {"attack": "many_shot", "shots": 2, "rows": 4}, "many_shot": {"shots": 8}})
    assert [type(line.attack) for line in lines] == [ManyShot, ManyShot]
    assert [len(line.attack.examples) for line in lines] == [4, 9]


def test_an_attack_without_rows_is_left_out_by_name():
    lines, left_out = read({"finetune": {"examples": "nothing"}, "direct": {}})
    assert [line.name for line in lines] == ["direct"]
    assert left_out == {"finetune": ["examples"]}


def test_loads():
    (line,), _ = read({"finetune": {"load": 16}}, controls=False)
    assert line.load == 16 and "fine-tuning" in line.load_is
    (line,), _ = read({"best_of_n": {"load": 8, "load_is": "samples / samples"}})
    assert line.load_is == "samples / samples"


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"latnt": {}}, "`latnt` is no attack"),
        ({"mine": {"attack": "latnt"}}, "`latnt` is no attack"),
        ({"latent": 3}, "its settings are a mapping"),
        ({"latent": {"radios": 1}}, "has no setting 'radios'"),
        ({"latent": {"radius": []}}, "a curve needs a list of numbers"),
        ({"latent": {"radius": ["a"]}}, "a curve needs a list of numbers"),
        ({"latent": {"radius": -1}}, "radius"),
        ({"finetune": {"load": 0}}, "above 0"),
        ({"template": {"load": 3}}, "needs an attack with a budget"),
        ({"latent": {"load": 0.3}}, "is measured"),
        ({"latent": {"load_is": "x"}}, "there is no `load`"),
        ({"many_shot": {"shots": 50}}, "50 shots"),
    ],
    ids=str,
)
def test_faults_are_named(entries, said):
    lines, _, faults = read_lines({**entries, "direct": {}}, rows_of)
    assert len(faults) == 1 and said in faults[0]
    assert [line.name for line in lines] == ["direct"]


def test_all_faults_at_once():
    _, _, faults = read_lines({"latnt": {}, "latent": {"radius": []}, "pruning": {"sparsity": 2.0}}, rows_of)
    assert len(faults) == 3


def test_the_lines_of_a_heat_map_attack_one_site_each():
    lines = map_lines(["embedding", "0"], [0.3, 0.1], 4, seed=1)
    assert [line.attack.sites for line in lines] == [("embedding",), ("0",)]
    assert [point.budget for point in lines[0].points] == [0.1, 0.3]
    with pytest.raises(ValueError, match="everywhere"):
        map_lines(["everywhere"], [0.1], 4, seed=1)

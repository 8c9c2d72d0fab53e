"""docs/make_lap_fig5.py: which reading of the paper's loop its curves are nearer to."""

import json
import math
import sys
from pathlib import Path

import pytest
from recipe_parts import settings, write_recipe

sys.path.append(str(Path(__file__).parents[2] / "docs"))

import make_lap_fig5 as fig5

from trl_robust.scripts import training
from trl_robust.sweep.stages import cell_recipe

OTHERS = ("attack_sites", "attack_radius", "attack_steps", "attack_optimizer", "away_coef", "benign_dataset_name")


def write_curves(folder: Path, preset: str, epsilon: float, stretch: float = 1.0, lines: int = 2, **changes) -> None:
    """A run whose curves are the figure's, or so many times as large."""
    run = folder / f"{preset}-{epsilon}"
    run.mkdir(parents=True)
    write_recipe(run / "recipe.yaml", {"lap_preset": preset, "lap_epsilon": epsilon})
    values = {name: [stretch * (value or 0.0) for value in fig5.PAPER[name][epsilon]] for name in fig5.QUANTITIES}
    line = {"step": 0, "micro_batch": 0, "rows": 4, **values, **changes}
    (run / "lap_curves.jsonl").write_text((json.dumps(line) + "\n") * lines)


def test_the_digitised_curves_obey_the_papers_own_rule():
    """log lambda moves by alpha * lambda * (change - epsilon), alpha 2, from the second step on (Eq. 8)."""
    for epsilon in fig5.EPSILONS:
        told, multiplier = fig5.PAPER["lambda"][epsilon], 0.1
        for step in range(2, fig5.STEPS):
            multiplier *= math.exp(2 * multiplier * (fig5.PAPER["loss_change"][epsilon][step] - epsilon))
            assert multiplier == pytest.approx(told[step], abs=1e-4)
        assert fig5.PAPER["lagrangian"][epsilon][0] == pytest.approx(-0.1 * epsilon)


@pytest.mark.parametrize(("near", "far"), [("paper", "paper_rms"), ("paper_rms", "paper")])
def test_the_reading_with_the_figures_curves_is_nearer(tmp_path, near, far):
    for epsilon in fig5.EPSILONS:
        write_curves(tmp_path, near, epsilon)
        write_curves(tmp_path, far, epsilon, stretch=1.5)
    found = fig5.distances(fig5.read_curves([tmp_path]))
    assert found[near]["all"] == 0 and found[far]["all"] > 0.1
    assert found[far]["norm"] == pytest.approx(0.5 * math.sqrt(sum(v**2 for v in fig5._NORM) / 8) / 0.3415)
    assert fig5.verdict(found).startswith(f"Nearer by least squares: {fig5.READINGS[near]} (0 of")


def test_readings_that_are_hardly_apart_are_said_to_be_so():
    found = {preset: {"all": distance} for preset, distance in zip(fig5.READINGS, (0.50, 0.54), strict=True)}
    assert "cannot be told apart" in fig5.verdict(found) and "does not reproduce" in fig5.verdict(found)
    found["paper_rms"]["all"] = 0.56
    assert "cannot be told apart" not in fig5.verdict(found)


def test_only_epsilons_that_both_readings_have_count_and_what_is_not_finite_is_left_out(tmp_path):
    write_curves(tmp_path, "paper", 0.05)
    write_curves(tmp_path, "paper", 0.01, stretch=9)
    write_curves(tmp_path, "paper_rms", 0.05, stretch=2)
    write_curves(tmp_path, "paper_rms", 0.10, **{"lambda": [math.inf] * 8})
    curves = fig5.read_curves([tmp_path])
    assert fig5.distances(curves)["paper"]["all"] == 0
    assert (curves["paper_rms", 0.10].rows, curves["paper_rms", 0.10].left_out) == (0, 8)
    assert "| paper_rms | 0.1 | 0 | 8 |" in fig5.report(curves)


def test_without_curves_or_with_too_few_steps_it_says_what_to_do(tmp_path, capsys):
    assert fig5.main([str(tmp_path)]) == 1 and "Run recipes/ablations/lap_fig5.yaml first" in capsys.readouterr().err
    write_curves(tmp_path, "paper", 0.05, **{"norm": [0.0, 0.1]})
    assert fig5.main([str(tmp_path)]) == 1 and "have 2 steps; the figure has 8" in capsys.readouterr().err


def test_on_a_tiny_model_it_runs_and_says_that_the_figure_is_not_reproduced(place, tmp_path, capsys):
    own = settings(place, **dict.fromkeys(OTHERS), dataset_name=str(place / "benign.jsonl"))
    own |= {"lap_layers": [1], "lap_branch": "adv_only", "lap_curves": True, "max_steps": 1}
    for preset in fig5.READINGS:
        values = own | {"lap_preset": preset, "output_dir": str(tmp_path / preset)}
        training.run(cell_recipe("lap-sft", values, this_machine=True), quiet=True)
    assert fig5.main([str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "does not reproduce the figure" in told and "| paper_rms | 0.05 | 2 | 0 |" in told
    assert (tmp_path / "lap_fig5.png").read_bytes().startswith(b"\x89PNG")

"""A sweep that is killed, interrupted, fails in part, is started again, and is changed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from grid_parts import grid_values, one_after_another, write_grid

from trl_robust.cli import main
from trl_robust.recipes import RecipeError
from trl_robust.sweep import running, work
from trl_robust.sweep.grid import load_grid
from trl_robust.sweep.planning import make_plan, refuse_changed
from trl_robust.sweep.work import DONE

CELLS = {
    "usual": {},
    "l1": {"attack_norm": "l1"},
    "broken": {"dataset_name": "nowhere.jsonl"},
    "as usual": {"attack_sites": [0.25, "embedding"]},
}
SECONDS = 240  # of patience with a slow machine, not a measure


def killed(path, condition) -> int:
    """Starts a sweep and kills it as soon as something is so; its exit code."""
    command = [sys.executable, "-m", "trl_robust", "sweep", "--config", str(path), "--jobs", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(condition)
    process.kill()
    return process.wait(SECONDS)


def interrupted(path, condition) -> int | None:
    """A sweep of this process, for which Ctrl-C is pressed as soon as something is so; `None` if that was too late."""
    ended = threading.Event()

    def press() -> None:
        wait_for(lambda: condition() or ended.is_set())
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    finger = threading.Thread(target=press)
    # Tests in the background of a shell ignore the interrupt.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        finger.start()
        code = main(["sweep", "--config", str(path), "--jobs", "1"])
        ended.set()
        finger.join()
        time.sleep(0.1)  # a late interrupt comes here
        return code if code == 130 else None
    except KeyboardInterrupt:
        return None
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for(condition) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finished(folder) -> dict:
    """Files that say a run is finished, and what they held when."""
    return {path.parent: (path.stat().st_mtime_ns, path.read_text()) for path in folder.rglob(DONE)}


@pytest.fixture(scope="module")
def sweep(place, tmp_path_factory):
    """A sweep of three runs and a failing one: killed after the first, interrupted after the second, then let run."""
    for _ in range(3):
        folder = tmp_path_factory.mktemp("sweep")
        path = write_grid(folder / "grid.yaml", grid_values(place, output_dir=str(folder / "out"), cells=CELLS))
        stages, codes = [], []
        for number, stop in enumerate((killed, interrupted), start=1):
            codes.append(stop(path, lambda number=number, folder=folder: len(finished(folder)) >= number))
            stages.append(finished(folder))
        if codes == [-9, None] and len(stages[1]) == 3:
            continue  # the last run had ended before the signal came: once more
        assert codes == [-9, 130]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(running, "run_all", one_after_another)
            return path, folder / "out", stages, main(["sweep", "--config", str(path), "--jobs", "1"])
    raise AssertionError("three sweeps ended before they could be interrupted")


def test_no_finished_run_is_repeated_and_all_are_finished_in_the_end(sweep):
    _, folder, (killed, interrupted), _ = sweep
    end = finished(folder)
    assert len(killed) < len(end) == 3
    assert killed.items() <= interrupted.items() <= end.items()
    assert {path.parent.name for path in end} == {"before-training", "usual", "l1"}


def test_a_run_that_fails_is_reported_with_its_reason_and_the_others_go_on(sweep):
    _, folder, _, code = sweep
    assert code == 1
    table = json.loads((folder / "sweep.json").read_text())
    assert list(table["failed"]) == ["broken, seed 0"] and "nowhere.jsonl" in table["failed"]["broken, seed 0"]
    assert "nowhere.jsonl" in (folder / "sweep.md").read_text()
    assert (folder / "cells" / "broken" / "seed-0" / "error.txt").is_file()
    by_name = {cell["name"]: cell for cell in table["cells"]}
    assert by_name["l1"]["figures"]["mean success"]["value"] is not None
    assert by_name["broken"]["figures"]["mean success"]["value"] is None


def test_the_files_of_a_run_are_kept_and_its_weights_are_not(sweep):
    _, folder, _, _ = sweep
    names = {path.name for path in (folder / "cells" / "usual" / "seed-0").iterdir()}
    assert {"recipe.yaml", "run.json", "results.json", "generations.jsonl", "harmless.jsonl", DONE} <= names
    assert not list(folder.rglob("*.safetensors"))
    assert {path.name for path in folder.iterdir()} >= {"sweep.json", "sweep.md", "sweep.csv", "figures"}
    assert (folder / "figures" / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_a_cell_that_cannot_differ_is_not_run_and_shows_the_figures_of_its_like(sweep):
    _, folder, _, _ = sweep
    by_name = {cell["name"]: cell for cell in json.loads((folder / "sweep.json").read_text())["cells"]}
    assert by_name["as usual"]["same_as"] == "usual"
    assert by_name["as usual"]["figures"] == by_name["usual"]["figures"]
    assert not (folder / "cells" / "as-usual").exists()
    assert "| as usual | same as usual |" in (folder / "sweep.md").read_text()


def test_started_again_it_runs_nothing_and_finds_the_same(sweep, place, monkeypatch):
    path, folder, _, _ = sweep
    before = json.loads((folder / "sweep.json").read_text())
    values = grid_values(place, output_dir=str(folder), cells={"usual": {}, "l1": {"attack_norm": "l1"}})
    path = write_grid(path.with_name("without.yaml"), values)
    monkeypatch.setattr(running, "run_all", lambda *_, **__: pytest.fail("ran again"))
    assert main(["sweep", "--config", str(path)]) == 0
    after = json.loads((folder / "sweep.json").read_text())
    figures = {cell["name"]: cell["figures"] for cell in before["cells"]}
    assert all(cell["figures"] == figures[cell["name"]] for cell in after["cells"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"set": {"away_coef": 0.25}}, "away_coef: 0.5 -> 0.25"),
        ({"evaluate": {"max_new_tokens": 4}}, "max_new_tokens: 3 -> 4"),
        ({"evaluate": {"attacks": {"direct": {}}}}, "prefill: {} -> None"),
    ],
)
def test_changed_settings_are_refused_with_what_changed(sweep, place, changes, words):
    path, folder, _, _ = sweep
    values = grid_values(place, output_dir=str(folder), cells={"usual": {}})
    values |= {name: {**values.get(name, {}), **value} for name, value in changes.items()}
    plan = make_plan(load_grid(write_grid(path.with_name("changed.yaml"), values)))
    with pytest.raises(RecipeError) as error:
        refuse_changed(plan)
    assert any(words in fault and "Remove" in fault for fault in error.value.faults)


def test_a_changed_data_file_is_noticed_and_another_mean_is_no_change(sweep, place, tmp_path):
    path, folder, _, _ = sweep
    values = grid_values(place, output_dir=str(folder), cells={"usual": {}})
    values["evaluate"]["mean_over"] = ["direct"]
    refuse_changed(make_plan(load_grid(write_grid(path.with_name("mean.yaml"), values))))
    requests = place / "requests.jsonl"
    before = requests.read_text()
    try:
        requests.write_text(before.replace("w3", "w4"))
        with pytest.raises(RecipeError, match=r"requests\.jsonl"):
            refuse_changed(make_plan(load_grid(path.with_name("mean.yaml"))))
    finally:
        requests.write_text(before)


class TestLeftovers:
    """What an earlier attempt left in the folder of a run that is not finished."""

    @pytest.fixture
    def usual(self, place, tmp_path):
        values = grid_values(place, output_dir=str(tmp_path / "out"), keep_models=True)
        plan = make_plan(load_grid(write_grid(tmp_path / "grid.yaml", values)))
        return next(run for run in plan.runs if run.name == "usual")

    def test_a_trained_model_is_measured_and_not_trained_again(self, usual, monkeypatch):
        usual.run(print)
        results = (usual.folder / "generations.jsonl").read_text()
        (usual.folder / DONE).unlink()
        monkeypatch.setattr(work, "train", lambda *_, **__: pytest.fail("trained again"))
        usual.run(print)
        assert (usual.folder / "generations.jsonl").read_text() == results and (usual.folder / DONE).is_file()

    def test_a_checkpoint_is_gone_on_from_and_other_leftovers_are_not_used(self, place, tmp_path):
        values = grid_values(place, output_dir=str(tmp_path / "out"), keep_models=True)
        values["set"] = {"save_strategy": "steps", "save_steps": 1}
        path = write_grid(tmp_path / "grid.yaml", values)
        usual = next(run for run in make_plan(load_grid(path)).runs if run.name == "usual")
        usual.run(print)
        model = usual.folder / "model"
        whole = (usual.folder / "generations.jsonl").read_text()
        for leftover in (usual.folder / DONE, model / "run.json", model / "model.safetensors"):
            leftover.unlink()
        shutil.rmtree(model / "checkpoint-2")
        usual.run(print)
        assert json.loads((usual.folder / "run.json").read_text())["resumed_from"].endswith("checkpoint-1")
        assert (usual.folder / "generations.jsonl").read_text() == whole

        (usual.folder / DONE).unlink()
        values["set"]["learning_rate"] = 0.5
        write_grid(path, values)
        other = next(run for run in make_plan(load_grid(path)).runs if run.name == "usual")
        other.run(print)
        record = json.loads((usual.folder / "run.json").read_text())
        assert record["resumed_from"] is None
        assert "learning_rate: 0.5" in (usual.folder / "recipe.yaml").read_text()


def test_two_sweeps_in_one_folder_are_refused(place, tmp_path):
    grid = load_grid(write_grid(tmp_path / "grid.yaml", grid_values(place, output_dir=str(tmp_path / "out"))))
    with running.only_one(grid.output_dir), pytest.raises(RecipeError, match="Another sweep is running"):
        running.run_sweep(grid)


def test_a_fault_that_all_cells_share_stops_before_anything_is_run(place, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "run_all", lambda *_, **__: pytest.fail("ran"))
    values = grid_values(place, output_dir=str(tmp_path / "out"), set={"dataset_name": "nowhere.jsonl"})
    with pytest.raises(RecipeError, match=r"nowhere\.jsonl"):
        running.run_sweep(load_grid(write_grid(tmp_path / "grid.yaml", values)))

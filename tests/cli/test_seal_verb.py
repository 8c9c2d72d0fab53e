"""`seal` by recipe: the selector's folder, the baselines by one key, and the pipeline on the rows that are kept."""

import json
import os
import signal

import pytest
import torch
from datasets import Dataset
from recipe_parts import settings, write_recipe, write_rows
from tiny import completion_data
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from trl_robust import Selector
from trl_robust.cli import main
from trl_robust.data import load_rows
from trl_robust.recipes import load_recipe
from trl_robust.scripts import seal
from trl_robust.scripts.interruption import Interrupted

LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": ["all-linear"]}
WRITTEN = {
    *("selector.safetensors", "selector.json", "rows.parquet", "kept.jsonl", "selection.json"),
    *("report.html", "report.md", "figures", "run.json", "recipe.yaml", "README.md", "trainer_state.json"),
}


def bare(place, **changes):
    """A recipe without what belongs to LAT."""
    kept = {
        name: value
        for name, value in settings(place).items()
        if not name.startswith(("attack_", "benign_", "toward_", "away_", "sft_", "kl_", "max_steps"))
    }
    return {**kept, **changes}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """20 rows with their sources, every fifth of them labelled harmful; two are the same."""
    data = list(completion_data(20))
    data[7] = dict(data[6])
    marked = [{**row, "source": "ab"[n % 2], "unsafe": n % 5 == 0} for n, row in enumerate(data)]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", marked)


@pytest.fixture
def recipe(workplace, rows, tmp_path):
    def written(**changes):
        values = bare(
            workplace,
            **LORA,
            verb="seal",
            dataset_name=str(rows),
            safe_dataset_name=str(workplace / "benign.jsonl"),
            num_train_epochs=3,
            per_device_train_batch_size=4,
            selector_learning_rate=20,
            label_column="unsafe",
            source_column="source",
            output_dir=str(tmp_path / "seal"),
        )
        return write_recipe(tmp_path / "seal.yaml", {k: v for k, v in (values | changes).items() if v is not None})

    return written


def test_a_run_leaves_selector_kept_rows_and_report_and_is_not_written_over(recipe, rows, tmp_path, capsys):
    path, folder = recipe(), tmp_path / "seal"
    assert main(["seal", "--config", path]) == 0
    assert "16 of 20 rows are kept" in capsys.readouterr().out
    names = {entry.name for entry in folder.iterdir()}
    assert names >= WRITTEN and not [name for name in names if name.startswith(("model", "adapter"))]
    selector = Selector.load(folder)
    assert selector.statistics["visits"].tolist() == [3] * 20
    data = load_rows(str(rows))
    expected = list(selector.select(data, 0.8))
    assert [json.loads(line) for line in (folder / "kept.jsonl").read_text().splitlines()] == expected
    record = json.loads((folder / "run.json").read_text())
    assert record["kept"] == {
        "rows": 16,
        "of": 20,
        "threshold": pytest.approx(record["kept"]["threshold"]),
        "mixed_in": 0,
    }
    assert record["selection"]["visits"] == {"3": 20} and record["finished"]
    # Algorithm 1: three passes with their backward passes over 20 rows, three times.
    assert record["phases"]["train"]["forward_passes"] == 3 * 3 * 3 * 20
    summary = json.loads((folder / "selection.json").read_text())
    assert 0 <= summary["labels"]["auroc"] <= 1 if "labels" in summary else 0 <= summary["auroc"] <= 1
    page = (folder / "report.html").read_text()
    assert data[0]["prompt"] not in page
    assert "No model is in this folder" in (folder / "README.md").read_text()

    assert main(["seal", "--config", path]) == 1
    assert "holds an earlier run" in capsys.readouterr().err


def test_the_labels_are_not_looked_at_by_the_training(recipe, rows, tmp_path):
    assert main(["seal", "--config", recipe()]) == 0
    turned = [{**row, "unsafe": not row["unsafe"], "source": "x"} for row in load_rows(str(rows))]
    other = write_rows(tmp_path / "turned.jsonl", turned)
    assert main(["seal", "--config", recipe(dataset_name=str(other), output_dir=str(tmp_path / "b"))]) == 0
    assert torch.equal(Selector.load(tmp_path / "seal").scores, Selector.load(tmp_path / "b").scores)


@pytest.mark.parametrize("method", ["none", "random", "safe_loss", "loss_gap", "dsir", "safe_instr"])
def test_a_baseline_is_one_key_away(recipe, rows, tmp_path, method):
    assert main(["seal", "--config", recipe(selection_method=method), "--seed", "3"]) == 0
    folder = tmp_path / "seal"
    assert Selector.load(folder).settings["method"] == method
    kept = load_rows(str(folder / "kept.jsonl"))
    record = json.loads((folder / "run.json").read_text())
    assert record["finished"] and record["kept"]["of"] == 20
    data = list(load_rows(str(rows)))
    if method == "none":
        assert list(kept) == data
    elif method == "safe_instr":
        assert record["kept"]["mixed_in"] >= 1 and len(kept) == 20 + record["kept"]["mixed_in"]
    else:
        assert len(kept) == 16 and all(row in data for row in kept)


def test_the_rows_that_are_kept_go_on_in_every_trainer(recipe, workplace, tmp_path):
    assert main(["seal", "--config", recipe()]) == 0
    kept = str(tmp_path / "seal" / "kept.jsonl")
    base = bare(workplace, dataset_name=kept, max_steps=1)
    lap = {**base, "verb": "lap-sft", "lap_branch": "sft_only", "output_dir": str(tmp_path / "lap")}
    assert main(["lap-sft", "--config", write_recipe(tmp_path / "lap.yaml", lap)]) == 0
    lat = {**base, "verb": "lat-sft", "attack_objective": "untargeted", "output_dir": str(tmp_path / "lat")}
    assert main(["lat-sft", "--config", write_recipe(tmp_path / "lat.yaml", lat)]) == 0
    stock = SFTTrainer(
        model=str(workplace / "model"),
        args=SFTConfig(str(tmp_path / "sft"), use_cpu=True, bf16=False, report_to="none", max_steps=1),
        train_dataset=load_rows(kept),
    )
    stock.train()
    assert stock.state.log_history[-1]["train_loss"] > 0


def test_a_selector_of_rows_in_chat_format_fits_the_plain_file(recipe, rows, tmp_path, workplace):
    long = write_rows(
        tmp_path / "long.jsonl", [*load_rows(str(rows)), {**load_rows(str(rows))[0], "prompt": "w1 " * 80}]
    )
    changes = {"dataset_name": str(long), "drop_long": True, "max_length": 40}
    assert main(["seal", "--config", recipe(**changes)]) == 0
    selector = Selector.load(tmp_path / "seal")
    assert len(selector.row_hashes) == 20
    kept = load_rows(str(tmp_path / "seal" / "kept.jsonl"))
    assert list(kept) == list(selector.select(load_rows(str(rows)), 0.8))


def test_an_interrupted_run_goes_on_to_the_same_selector(recipe, tmp_path, monkeypatch):
    assert main(["seal", "--config", recipe(output_dir=str(tmp_path / "whole"))]) == 0

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                os.kill(os.getpid(), signal.SIGINT)

    made = seal.training._make_trainer

    def interrupted(*given):
        trainer = made(*given)
        trainer.add_callback(Stop())
        return trainer

    path = recipe()
    monkeypatch.setattr(seal.training, "_make_trainer", interrupted)
    with pytest.raises(Interrupted, match="after update 7"):
        seal.run(load_recipe("seal", ["--config", path]), quiet=True)
    assert not (tmp_path / "seal" / "kept.jsonl").exists()
    monkeypatch.undo()
    assert main(["seal", "--config", path, "--resume_from_checkpoint", "true"]) == 0
    found, whole = Selector.load(tmp_path / "seal"), Selector.load(tmp_path / "whole")
    assert torch.equal(found.logits, whole.logits) and found.logits.std() > 1e-3
    assert (tmp_path / "seal" / "kept.jsonl").read_bytes() == (tmp_path / "whole" / "kept.jsonl").read_bytes()


def test_all_faults_of_a_recipe_are_told_at_once(recipe, workplace, tmp_path, capsys):
    path = recipe(
        use_peft=False,
        safe_dataset_name=None,
        benign_dataset_name=str(workplace / "benign.jsonl"),
        selector_function="raw_tanh",
        penalty_strenght=0.1,
        keep_fraction=80,
    )
    assert main(["seal", "--config", path]) == 1
    err = capsys.readouterr().err
    for said in (
        "use_peft: true",
        "`safe_dataset_name` is missing",
        "no benign dataset",
        "no lower bound",
        "`keep_fraction`",
    ):
        assert said in err, said
    assert "did you mean `penalty_strength`" in err
    assert not (tmp_path / "seal").exists()


def test_a_safe_set_is_refused_by_the_other_verbs(workplace, tmp_path, capsys):
    values = {
        **settings(workplace),
        "safe_dataset_name": str(workplace / "benign.jsonl"),
        "output_dir": str(tmp_path / "a"),
    }
    assert main(["lat-sft", "--config", write_recipe(tmp_path / "a.yaml", {**values, "verb": "lat-sft"})]) == 1
    assert "`safe_dataset_name` belongs to seal" in capsys.readouterr().err


def test_with_fixed_weights_it_is_plain_sft_with_a_model_in_the_end(recipe, rows, tmp_path):
    weighted = write_rows(
        tmp_path / "weighted.jsonl", [{**row, "weight": 0.5} for row in load_rows(str(rows)).select(range(8))]
    )
    path = recipe(dataset_name=str(weighted), selector_learning_rate=0, safe_dataset_name=None, num_train_epochs=1)
    assert main(["seal", "--config", path]) == 0
    names = {entry.name for entry in (tmp_path / "seal").iterdir()}
    assert "adapter_model.safetensors" in names and "selector.json" not in names
    assert isinstance(load_rows(str(weighted)), Dataset)


def test_a_training_that_would_not_see_every_row_is_refused_before_it_begins(recipe, tmp_path, capsys):
    assert main(["seal", "--config", recipe(), "--max_steps", "4"]) == 1
    assert "sees 16 of the 20 rows" in capsys.readouterr().err
    assert not (tmp_path / "seal").exists()

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from recipe_parts import settings, write_recipe, write_rows
from safetensors.torch import load_file

from trl_robust.cli import main
from trl_robust.data import content_hash, load_rows
from trl_robust.recipes import launching, load_recipe, recipe_text, resolved_recipe
from trl_robust.scripts import lat_sft, training
from trl_robust.scripts.run_folder import checkpoint_to_resume
from trl_robust.trainers import LATSFTTrainer

FULL = {"attack_steps": 3, "max_steps": 40, "updates_per_attack": 2, "save_strategy": "steps", "save_steps": 1000}


@pytest.fixture
def recipe(workplace, tmp_path):
    def write(**changes):
        return write_recipe(tmp_path / "recipe.yaml", settings(workplace, **changes))

    return write


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


class TestRun:
    def test_it_leaves_the_files_that_the_contract_names(self, recipe, workplace, tmp_path, capsys):
        folder = tmp_path / "run"
        path = recipe(system_prompt="w1", chat_format=True, eval_strategy="no")
        assert main(["lat-sft", "--config", path, "--output_dir", str(folder), "--seed", "3"]) == 0
        assert f"Written to {folder}" in capsys.readouterr().out

        record = json.loads((folder / "run.json").read_text())
        assert (record["schema"], record["verb"], record["finished"], record["seed"]) == (1, "lat-sft", True, 3)
        assert set(record["versions"]) == {
            "trl_robust", "python", "torch", "trl", "transformers", "peft", "accelerate", "datasets"
        }  # fmt: skip
        assert record["hardware"]["cpu_count"] == os.cpu_count()
        phase = record["phases"]["train"]
        assert phase["updates"] == 2
        assert phase["seconds"] > 0
        # Two updates of two rows: two attack steps of forward and backward over both, and the terms of the loss.
        assert phase["forward_passes"] > 2 * 2 * 3
        assert record["losses"]["toward_loss"] > 0
        assert set(record["datasets"]) == {"train", "benign"}
        assert record["datasets"]["benign"]["rows"] == 8
        rows = load_rows(str(workplace / "preferences.jsonl"))
        recipe_again = load_recipe("lat-sft", ["--config", str(folder / "recipe.yaml")])
        assert record["datasets"]["train"]["sha256"] != content_hash(rows)  # as trained on: conversations
        assert yaml.safe_load((folder / "recipe.yaml").read_text())["seed"] == 3
        assert recipe_text(resolved_recipe(recipe_again)) == (folder / "recipe.yaml").read_text()
        assert "## Threat model" in (folder / "README.md").read_text()
        assert weights(folder)
        assert not [name for name in os.listdir(folder) if name.endswith(".partial")]

    def test_what_is_there_is_never_written_over(self, recipe, workplace, tmp_path, capsys):
        finished, stopped, model = tmp_path / "finished", tmp_path / "stopped", workplace / "model"
        for folder, name in ((finished, "run.json"), (stopped, "checkpoint-5")):
            folder.mkdir()
            (folder / name).mkdir() if name.startswith("c") else (folder / name).write_text("{}")
        for folder in (finished, stopped, model):
            before = sorted((path, path.stat().st_mtime_ns) for path in folder.iterdir())
            assert main(["lat-sft", "--config", recipe(), "--output_dir", str(folder)]) == 1
            assert "nothing is written over" in capsys.readouterr().err
            assert sorted((path, path.stat().st_mtime_ns) for path in folder.iterdir()) == before
        (tmp_path / "file").write_text("x")
        assert main(["lat-sft", "--config", recipe(), "--output_dir", str(tmp_path / "file")]) == 1
        assert "is a file. Name a folder" in capsys.readouterr().err
        assert main(["lat-sft", "--config", recipe(), "--output_dir", str(tmp_path / "file" / "a" / "b")]) == 1
        assert f"{tmp_path / 'file'} is a file, which holds no folders" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["README.md", "recipe.yaml"])
    def test_what_the_user_has_written_is_not_written_over(self, recipe, tmp_path, capsys, name):
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / name).write_text("mine: 1\n")
        assert main(["lat-sft", "--config", recipe(), "--output_dir", str(folder)]) == 1
        assert f"holds {name} that trl-robust did not write" in capsys.readouterr().err
        assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, "mine: 1\n")]

    def test_what_an_interrupted_run_has_left_may_be_written_again(self, recipe, tmp_path):
        folder = tmp_path / "run"
        folder.mkdir()
        loaded = load_recipe("lat-sft", ["--config", recipe(), "--output_dir", str(folder)])
        (folder / "recipe.yaml").write_text(recipe_text(resolved_recipe(loaded)))
        (folder / "README.md").write_text("of that run")
        assert checkpoint_to_resume(loaded) is None

    @pytest.mark.parametrize(
        "resume, words", [("true", "has no checkpoint"), ("gone/checkpoint-3", "is not a checkpoint")]
    )
    def test_a_checkpoint_that_is_not_there_is_named(self, recipe, tmp_path, capsys, resume, words):
        words_given = ["--config", recipe(), "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", resume]
        assert main(["lat-sft", *words_given]) == 1
        assert words in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    def test_a_checkpoint_elsewhere_is_no_leave_to_write_over(self, recipe, tmp_path, capsys):
        for name in ("other/checkpoint-1/trainer_state.json", "run/run.json"):
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).write_text("{}")
        words = ["--config", recipe(), "--output_dir", str(tmp_path / "run")]
        assert main(["lat-sft", *words, "--resume_from_checkpoint", str(tmp_path / "other" / "checkpoint-1")]) == 1
        assert "nothing is written over" in capsys.readouterr().err

    def test_a_run_that_breaks_does_not_look_finished(self, recipe, tmp_path, monkeypatch):
        def broken(*args, **kwargs):
            raise ValueError("a fault of the program")

        monkeypatch.setattr(LATSFTTrainer, "training_step", broken)
        with pytest.raises(ValueError, match="a fault of the program"):
            main(["lat-sft", "--config", recipe(), "--output_dir", str(tmp_path / "run")])
        assert sorted(os.listdir(tmp_path / "run")) == ["recipe.yaml"]

    def test_a_type_error_of_the_trainer_is_a_fault_of_the_program(self, recipe, tmp_path, monkeypatch):
        def broken(**options):
            raise TypeError("unexpected keyword")

        as_if_in_trl = types.FunctionType(broken.__code__, {"__name__": "trl.trainer"})
        monkeypatch.setitem(training.TRAINERS, "lat-sft", as_if_in_trl)
        with pytest.raises(TypeError, match="unexpected keyword"):
            main(["lat-sft", "--config", recipe(), "--output_dir", str(tmp_path / "run")])

    def test_what_the_trainer_refuses_is_one_message(self, recipe, workplace, tmp_path, capsys):
        # A folder that `validate` takes for a model, without weights in it.
        hollow = tmp_path / "hollow"
        hollow.mkdir()
        for path in (workplace / "model").iterdir():
            if path.suffix != ".safetensors":
                (hollow / path.name).write_bytes(path.read_bytes())
        words = ["--config", recipe(), "--model_name_or_path", str(hollow), "--output_dir", str(tmp_path / "run")]
        assert main(["lat-sft", *words]) == 1
        err = capsys.readouterr().err
        assert "recipe.yaml has 1 fault:" in err
        assert "model.safetensors" in err

    def test_rows_to_evaluate_on(self, recipe, workplace, tmp_path):
        folder = tmp_path / "rows"
        folder.mkdir()
        rows = [json.loads(line) for line in (workplace / "preferences.jsonl").read_text().splitlines()]
        write_rows(folder / "train.jsonl", rows[:12])
        write_rows(folder / "test.jsonl", rows[12:])
        path = recipe(dataset_name=str(folder), eval_strategy="steps", eval_steps=2, eval_under_attack=True)
        assert main(["lat-sft", "--config", path, "--output_dir", str(tmp_path / "run")]) == 0
        record = json.loads((tmp_path / "run" / "run.json").read_text())
        assert record["datasets"]["evaluation"]["rows"] == 4
        assert record["losses"]["eval_loss"] > 0

    def test_quiet_says_nothing(self, recipe, tmp_path, capsys):
        loaded = load_recipe("lat-sft", ["--config", recipe(), "--output_dir", str(tmp_path / "run")])
        capsys.readouterr()
        trainer = training.run(loaded, quiet=True)
        assert isinstance(trainer, LATSFTTrainer)
        out, err = capsys.readouterr()
        assert out == ""
        assert "loss" not in err


class TestInterruption:
    def test_ctrl_c_ends_after_the_step_and_the_run_goes_on_to_the_same_weights(self, recipe, tmp_path, capsys):
        path = recipe(**FULL)
        whole, parted = tmp_path / "whole", tmp_path / "parted"
        assert main(["lat-sft", "--config", path, "--output_dir", str(whole)]) == 0

        command = [sys.executable, "-m", "trl_robust", "lat-sft", "--config", path, "--output_dir", str(parted)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for line in process.stdout:
            if "'loss'" in line:  # an update has been made, most are to come
                process.send_signal(signal.SIGINT)
                break
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "To go on: the same command with `--resume_from_checkpoint true`." in err
        assert "Traceback" not in err
        assert not (parted / "run.json").exists()
        (checkpoint,) = parted.glob("checkpoint-*")
        assert 1 <= int(checkpoint.name.removeprefix("checkpoint-")) < FULL["max_steps"]

        again = ["--config", path, "--output_dir", str(parted), "--resume_from_checkpoint", "true"]
        assert main(["lat-sft", *again]) == 0
        one, other = weights(whole), weights(parted)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        records = [json.loads((folder / "run.json").read_text()) for folder in (whole, parted)]
        assert records[0]["phases"]["train"]["forward_passes"] == records[1]["phases"]["train"]["forward_passes"]
        assert records[0]["losses"]["toward_loss"] == records[1]["losses"]["toward_loss"]
        assert records[1]["resumed_from"] == str(checkpoint)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_the_handlers_of_before_are_back(self, recipe, tmp_path, monkeypatch, capsys, number):
        step = LATSFTTrainer.training_step

        def interrupted(trainer, *args, **kwargs):
            if trainer.state.global_step == 1:
                os.kill(os.getpid(), number)
            return step(trainer, *args, **kwargs)

        monkeypatch.setattr(LATSFTTrainer, "training_step", interrupted)
        before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
        folder = tmp_path / "run"
        assert main(["lat-sft", "--config", recipe(max_steps=5), "--output_dir", str(folder)]) == 130
        assert "Stopped after update 2" in capsys.readouterr().err
        assert (folder / "checkpoint-2").is_dir()
        assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before

    def test_a_signal_in_the_last_step_is_too_late_to_stop_anything(self, recipe, tmp_path, monkeypatch):
        step = LATSFTTrainer.training_step

        def interrupted(trainer, *args, **kwargs):
            if trainer.state.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return step(trainer, *args, **kwargs)

        monkeypatch.setattr(LATSFTTrainer, "training_step", interrupted)
        assert main(["lat-sft", "--config", recipe(), "--output_dir", str(tmp_path / "run")]) == 0
        assert (tmp_path / "run" / "run.json").is_file()


class TestQuantised:
    def test_a_4_bit_run_saves_an_adapter_that_peft_loads(self, recipe, workplace, tmp_path):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        folder = tmp_path / "run"
        path = recipe(
            dtype="bfloat16", load_in_4bit=True, bnb_4bit_quant_type="nf4", use_bnb_nested_quant=True, use_peft=True,
            lora_r=4, lora_target_modules=["q_proj", "v_proj"], bf16=True,
        )  # fmt: skip
        assert main(["lat-sft", "--config", path, "--output_dir", str(folder)]) == 0
        assert not (folder / "model.safetensors").exists()
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(workplace / "model"), folder)
        trained = [value for name, value in model.named_parameters() if "lora_B" in name]
        assert any(value.abs().sum() > 0 for value in trained)

    def test_a_4_bit_run_goes_on_bit_for_bit(self, recipe, tmp_path):
        """PEFT loads its bfloat16 adapters as float32."""
        path = recipe(
            dtype="bfloat16", load_in_4bit=True, bnb_4bit_quant_type="nf4", use_peft=True, lora_r=4,
            lora_target_modules=["q_proj", "v_proj"], bf16=True, max_steps=4, save_strategy="steps", save_steps=2,
        )  # fmt: skip
        assert main(["lat-sft", "--config", path, "--output_dir", str(tmp_path / "whole")]) == 0
        start = str(tmp_path / "whole" / "checkpoint-2")
        words = ["--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", start]
        assert main(["lat-sft", "--config", path, *words]) == 0
        whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
        assert whole.keys() == resumed.keys()
        for name, value in whole.items():
            assert value.dtype == resumed[name].dtype and torch.equal(value, resumed[name]), name


class TestLauncher:
    def test_launch_keys_start_the_script_through_accelerate_and_its_exit_code_comes_back(
        self, recipe, tmp_path, monkeypatch
    ):
        seen = {}

        def launched(arguments):
            seen.update(vars(arguments))
            raise subprocess.CalledProcessError(returncode=7, cmd="child")

        monkeypatch.setattr(launching, "launch_command", launched)
        path = recipe(num_processes=1, mixed_precision="no")
        words = ["--config", path, "--output_dir", str(tmp_path / "run")]
        assert main(["lat-sft", *words, "--cpu", "--num_machines", "1"]) == 7
        assert (seen["module"], seen["training_script"]) == (True, "trl_robust.scripts.lat_sft")
        assert seen["training_script_args"] == words
        assert (seen["num_processes"], seen["cpu"], seen["mixed_precision"]) == (1, True, "no")

    def test_faults_are_told_before_anything_is_launched(self, recipe, monkeypatch, capsys):
        monkeypatch.setattr(launching, "launch_command", lambda arguments: pytest.fail("launched"))
        assert main(["lat-sft", "--config", recipe(num_processes=2, packing=True)]) == 1
        assert "Set `packing: false`" in capsys.readouterr().err

    def test_a_launched_script_takes_the_same_recipe(self, recipe, tmp_path):
        path = recipe(num_processes=2, accelerate_config="multi_gpu")
        words = ["--config", path, "--output_dir", str(tmp_path / "run")]
        assert lat_sft.main(words, launched=True) == 0
        assert "accelerate_config: multi_gpu" in (tmp_path / "run" / "recipe.yaml").read_text()

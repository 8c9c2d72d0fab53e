"""Run by `test_processes.py`, once for every rank: trains, and writes the weights and the first log to a file."""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import conftest  # noqa: E402, F401
import dpo_runs  # noqa: E402
import lap_runs  # noqa: E402
import runs  # noqa: E402
import seal_runs  # noqa: E402
from runs import EVERYTHING, benign_data, trained  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tiny import lora, tiny_model  # noqa: E402

SGD = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 2, "gradient_accumulation_steps": 2}
SETTINGS = {"sft": {**EVERYTHING, **SGD}, "dpo": {**dpo_runs.ATTACK, "kl_coef": 0.3, **SGD}}
MODULES = {"sft": runs, "dpo": dpo_runs}


LAP = {**lap_runs.SEARCH, **SGD, "lap_branch": "mix", "lap_lambda_persist": "ema", "max_steps": 4}
SETTINGS |= {"lap-sft": LAP, "lap-dpo": LAP}
SETTINGS["seal"] = {**SGD, "max_steps": 4, "selector_learning_rate": 20.0}


def make(kind: str, folder: Path, **changes):
    if kind == "seal":
        return seal_runs.make(folder, **changes)
    if kind.startswith("lap-"):
        return lap_runs.make(kind[4:], folder, **changes)
    return MODULES[kind].make(folder, **changes)


def run(kind: str, folder: Path, **changes):
    settings = {**SETTINGS[kind], **changes}
    benign = {} if kind.startswith("lap-") or kind == "seal" else {"benign": benign_data()}
    trainer = make(kind, folder, **settings, **benign, dropout=None, model=lora(tiny_model()))
    trainer.train()
    return trainer


if __name__ == "__main__":
    target, rank, kind = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    # Two processes with two rows each take what one process with four takes.
    trainer = run(kind, target, per_device_train_batch_size=2, ddp_backend="gloo")
    assert trainer.accelerator.num_processes == 2
    found = trained(trainer)
    if kind == "seal":
        found["logits"] = trainer.learner.logits
    save_file({name: value.contiguous() for name, value in found.items()}, target / f"{rank}.safetensors")
    branches = [entry["perturbed_updates"] for entry in trainer.state.log_history if "perturbed_updates" in entry]
    (target / f"{rank}.json").write_text(json.dumps({**trainer.state.log_history[0], "branches": branches}))

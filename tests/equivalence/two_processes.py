"""Run by `test_processes.py`, once for every rank: trains, and writes the weights and the first log to a file."""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import conftest  # noqa: E402, F401
from runs import EVERYTHING, benign_data, train, trained  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tiny import lora, tiny_model  # noqa: E402

SETTINGS = {**EVERYTHING, "optim": "sgd", "learning_rate": 0.1, "max_steps": 2, "gradient_accumulation_steps": 2}


def run(folder: Path, **changes):
    return train(folder, **{**SETTINGS, **changes}, benign=benign_data(), dropout=None, model=lora(tiny_model()))


if __name__ == "__main__":
    target, rank = Path(sys.argv[1]), sys.argv[2]
    # Two processes with two rows each take what one process with four takes.
    trainer = run(target, per_device_train_batch_size=2, ddp_backend="gloo")
    assert trainer.accelerator.num_processes == 2
    save_file({name: value.contiguous() for name, value in trained(trainer).items()}, target / f"{rank}.safetensors")
    (target / f"{rank}.json").write_text(json.dumps(trainer.state.log_history[0]))

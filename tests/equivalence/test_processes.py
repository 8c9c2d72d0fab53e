"""Two processes train as one does on the whole batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import assert_same, distance, trained
from safetensors.torch import load_file
from tiny import lora, tiny_model
from two_processes import SETTINGS, make, run


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(SETTINGS))
def test_two_processes_have_the_same_weights_and_those_of_one_with_the_whole_batch(tmp_path, kind):
    port = str(free_port())
    command = [sys.executable, str(Path(__file__).with_name("two_processes.py")), str(tmp_path)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), kind],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], said

    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    assert_same(*found)
    settings = SETTINGS[kind] if kind.startswith("lap-") or kind == "seal" else {**SETTINGS[kind], "kl_coef": 0.0}
    start = trained(make(kind, tmp_path, **settings, dropout=None, model=lora(tiny_model())))
    whole = run(kind, tmp_path / "whole")
    if kind.startswith("lap-"):
        drawn = [json.loads((tmp_path / f"{rank}.json").read_text())["branches"] for rank in range(2)]
        alone = [entry["perturbed_updates"] for entry in whole.state.log_history if "perturbed_updates" in entry]
        assert drawn == [alone, alone] and 0 < sum(alone) < 4
    if kind == "seal":
        logits = [part.pop("logits") for part in found]
        assert logits[0].std() > 1e-3
        assert torch.allclose(logits[0], whole.learner.logits, atol=1e-5)
        assert whole.learner.visits.unique().tolist() == [2]
    updates = [{name: after[name] - start[name] for name in start} for after in (found[0], trained(whole))]
    assert max(update.abs().max() for update in updates[1].values()) > 1e-3
    assert distance(*updates) < 1e-5
    log = json.loads((tmp_path / "0.json").read_text())
    own = ("perturbed_updates", "loss_change_end") if kind.startswith("lap-") else ("attack_loss_after",)
    own = ("gap", "safe_loss", "selector/largest_weight") if kind == "seal" else own
    for key in ("loss", "grad_norm", "forward_passes", *own):
        assert log[key] == pytest.approx(whole.state.log_history[0][key], rel=1e-4, abs=1e-6), key

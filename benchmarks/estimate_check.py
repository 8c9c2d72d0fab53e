"""The memory that `trl-robust estimate` counts against the memory that a run takes, on the CPU.

    python benchmarks/estimate_check.py --output benchmarks/results/estimate_cpu.json

A Llama of 55 M parameters is trained for two updates in a process of its own, whose memory is read from outside every
millisecond. What is there before (Python, the libraries, a run of a tiny model that touches them all) is subtracted.
Linux only. One thread; glibc is told to give memory back at once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "HF_DEACTIVATE_ASYNC_LOAD": "1",  # the profiler sees one thread
}
WORDS = [f"w{number}" for number in range(200)]
PROMPT, COMPLETION = 64, 64

LORA = {"use_peft": True, "lora_r": 16, "lora_dropout": 0.0, "lora_target_modules": ["all-linear"]}
HALF = {"dtype": "bfloat16", "bf16": True}
CASES: dict[str, dict[str, Any]] = {
    "all weights, float32": {"verb": "lat-sft", "kl_coef": 0.1},
    "all weights, float32, checkpointed": {"verb": "lat-sft", "activation_checkpointing": True},
    "all weights, bfloat16 autocast": {"verb": "lat-sft", "bf16": True},
    "LoRA, bfloat16 weights": {"verb": "lat-sft", **HALF, **LORA},
    "LoRA, float32, one site at layer 6": {"verb": "lat-sft", "attack_sites": [6], **LORA},
    "LoRA, NF4 weights": {"verb": "lat-sft", **HALF, **LORA, "load_in_4bit": True, "use_bnb_nested_quant": True},
    "DPO, LoRA, float32": {"verb": "lat-dpo", **LORA},
    "RMU, three matrices, float32": {"verb": "lat-rmu", "rmu_layer": "5", "attack_sites": [4]},
}


def make_model(folder: Path, hidden: int, layers: int, vocabulary: int) -> Path:
    torch.manual_seed(0)
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    # In another precision than it is loaded in, or the weights stay in the file, which is mapped into memory.
    LlamaForCausalLM(config).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(folder: Path) -> None:
    def text(length: int, number: int) -> str:
        return " ".join(WORDS[(number * 7 + place * 3) % len(WORDS)] for place in range(length))

    rows = {
        "preferences": [
            {
                "prompt": text(PROMPT, n),
                "chosen": " " + text(COMPLETION, n + 1),
                "rejected": " " + text(COMPLETION, n + 2),
            }
            for n in range(16)
        ],
        "benign": [{"prompt": text(PROMPT, n), "completion": " " + text(COMPLETION, n + 3)} for n in range(16)],
        "corpus": [
            {"forget": text(PROMPT + COMPLETION, n), "retain": text(PROMPT + COMPLETION, n + 5)} for n in range(16)
        ],
    }
    for name, made in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")


def recipe_of(folder: Path, case: dict[str, Any], model: Path, output: str) -> Path:
    settings = {
        "model_name_or_path": str(model),
        "dataset_name": str(folder / "preferences.jsonl"),
        "benign_dataset_name": str(folder / "benign.jsonl"),
        "output_dir": str(folder / output),
        "attack_sites": ["embedding", 3],
        "attack_radius": 0.5,
        "attack_steps": 1,
        "attack_away_coef": 1.0,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "max_length": 256,
        **({"away_coef": 0.5} if case["verb"] == "lat-sft" else {}),
        **case,
    }
    if case["verb"] == "lat-rmu":
        del settings["benign_dataset_name"]
        settings["dataset_name"] = str(folder / "corpus.jsonl")
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return path


def child(verb: str, tiny: str, recipe: str) -> None:
    """Runs in the process that is measured: a tiny model first, then, when told so, the recipe."""
    import gc

    from trl_robust.recipes import load_recipe
    from trl_robust.scripts.training import run

    run(load_recipe(verb, ["--config", tiny]), quiet=True)
    gc.collect()
    loaded = load_recipe(verb, ["--config", recipe])
    print("ready", flush=True)
    if sys.stdin.readline().strip() != "allocator":
        run(loaded, quiet=True)
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(loaded, quiet=True)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    print(f"peak {peak}", flush=True)


def memory_of(process: int) -> int:
    """Bytes of a process: anonymous, and files that are mapped, as weights are."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return 1024 * int(found["RssAnon"].split()[0]) if "RssAnon" in found else 0


def measure(verb: str, tiny: Path, recipe: Path, of: str) -> int:
    """Bytes that a run takes at its worst moment: of the `process`, or of torch's `allocator`."""
    command = [sys.executable, __file__, "--child", verb, str(tiny), str(recipe)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT
    )
    assert process.stdin is not None and process.stdout is not None
    for line in process.stdout:
        if line.strip() == "ready":
            break
    before = peak = memory_of(process.pid)
    process.stdin.write(f"{of}\n")
    process.stdin.flush()
    if of == "allocator":
        peak, before = int(next(line for line in process.stdout if line.startswith("peak ")).split()[1]), 0
        process.wait()
    while process.poll() is None:
        peak = max(peak, memory_of(process.pid))
        time.sleep(0.001)
    if process.returncode:
        raise RuntimeError(f"The run of {recipe} failed.")
    return peak - before


def estimated(verb: str, recipe: Path) -> dict[str, float]:
    from trl_robust.estimate import blueprint_of, estimate, find_config, find_rows
    from trl_robust.recipes import load_recipe
    from trl_robust.scripts.estimate import peft_config_of

    loaded = load_recipe(verb, ["--config", str(recipe)], this_machine=False)
    config, _ = find_config(loaded)
    found = estimate(loaded, blueprint_of(loaded, config, peft_config_of(loaded)), find_rows(loaded), on_card=False)
    return {"peak": found.memory.peak, "attack": found.memory.attack, "update": found.memory.update}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=3, metavar=("VERB", "TINY", "RECIPE"), help=argparse.SUPPRESS)
    parser.add_argument("--only", help="cases whose name holds this")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    os.environ.update(ENVIRONMENT)
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_rows(folder)
        tiny = make_model(folder / "tiny", 64, 12, 256)
        model = make_model(folder / "model", 512, 12, 16000)
        for number, (name, case) in enumerate(CASES.items()):
            if args.only and args.only not in name:
                continue
            counted = estimated(case["verb"], recipe_of(folder, case, model, "counted"))
            taken = {}
            for of in ("allocator", "process"):
                first = recipe_of(folder, case, tiny, f"tiny-{of}-{number}")
                taken[of] = measure(case["verb"], first, recipe_of(folder, case, model, f"run-{of}-{number}"), of)
            results.append({"case": name, "counted": counted, "measured": taken})
            mib = 2**20
            print(
                f"{name:<36} counted {counted['peak'] / mib:5.0f} MiB (attack {counted['attack'] / mib:.0f}, update "
                f"{counted['update'] / mib:.0f}); allocator {taken['allocator'] / mib:5.0f}, "
                f"{counted['peak'] / taken['allocator']:.2f}; process {taken['process'] / mib:5.0f}, "
                f"{counted['peak'] / taken['process']:.2f}",
                flush=True,
            )
    if args.output:
        machine = {"machine": platform.machine(), "torch": torch.__version__, "threads": 1}
        args.output.write_text(json.dumps({**machine, "results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

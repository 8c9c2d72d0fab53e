"""What a perturbed LAP update costs, in units of one forward pass.

    python benchmarks/lap_step.py --threads 1 --output benchmarks/results/lap_step_cpu.json

An update at layer l of L with T inner steps should cost at most 1.25 x (1 + 2T(1 - l/L) + 3) forward passes: the clean
pass that fills the cache, T passes and T backward passes through the layers above, and the training pass with its
backward pass to the weights. The unit is a forward pass without gradients over the same batch with the head at the
labelled positions only. Measured twice: with an epsilon that never binds, and with a third of the change that the free
search comes to, so that the search has to turn back and rows are shortened at the end. Repeats are interleaved, the
first is thrown away, medians are given, as ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from inner_loop import make_batch
from transformers import LlamaConfig, LlamaForCausalLM

from trl_robust import find_paraphrase
from trl_robust.objectives import label_logits, toward

ALLOWED = 1.25


def forward(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        label_logits(model, batch["input_ids"], batch["attention_mask"], batch["labels"])


def plain_update(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> None:
    found = label_logits(model, batch["input_ids"], batch["attention_mask"], batch["labels"])
    toward(found.logits, found.targets).mean().backward()
    model.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=96)
    parser.add_argument("--completion", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocab,
            hidden_size=options.hidden,
            intermediate_size=options.hidden * 7 // 2,
            num_hidden_layers=options.layers,
            num_attention_heads=options.hidden // 64,
            num_key_value_heads=options.hidden // 64,
            tie_word_embeddings=False,
            initializer_range=0.05,
        )
    ).to(options.device, getattr(torch, options.dtype))
    batch = make_batch(options.rows, options.prompt, options.completion, options.vocab, options.device)
    batch = {key: value for key, value in batch.items() if not key.startswith("away_")}

    scales: dict[str, list[float]] = {}

    def perturbed(name: str, below: int, steps: int, epsilon: float) -> Callable[[], None]:
        def update() -> None:
            found = find_paraphrase(
                model, batch, layer="embedding" if below == 0 else below - 1, epsilon=epsilon, steps=steps
            )
            scales.setdefault(name, []).append((found.scales < 1).float().mean().item())
            with found.installed(model):
                plain_update(model, batch)

        return update

    variants: dict[str, Callable[[], None]] = {
        "forward": lambda: forward(model, batch),
        "plain update": lambda: plain_update(model, batch),
    }
    cases = {}
    for below in sorted({options.layers // 4, options.layers // 2, round(0.625 * options.layers)}):
        for steps in (2, 8):
            layer = "embedding" if below == 0 else below - 1
            free = find_paraphrase(model, batch, layer=layer, epsilon=1e3, steps=steps)
            reached = (free.perturbed_losses - free.clean_losses).abs().median().item()
            for kind, epsilon in (("free", 1e3), ("binding", reached / 3)):
                name = f"l/L = {below}/{options.layers}, T = {steps}, {kind}"
                variants[name] = perturbed(name, below, steps, epsilon)
                cases[name] = 1 + 2 * steps * (1 - below / options.layers) + 3
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(options.repeats + 1):
        for name, run in variants.items():
            if options.device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            if options.device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    unit = medians["forward"]
    results = [{"case": "plain update", "forward_passes": round(medians["plain update"] / unit, 2), "formula": 3}]
    for name, formula in cases.items():
        measured = medians[name] / unit
        results.append(
            {
                "case": name,
                "forward_passes": round(measured, 2),
                "formula": formula,
                "ratio": round(measured / formula, 3),
                "allowed": ALLOWED,
                "rows_backed_off": round(statistics.mean(scales[name]), 2),
            }
        )
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    report = {
        "machine": gpu or platform.machine(),
        "torch": torch.__version__,
        "threads": options.threads,
        "settings": {key: value for key, value in vars(options).items() if key != "output"},
        "results": results,
    }
    for row in results:
        print("  ".join(f"{key}: {value}" for key, value in row.items()))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The search for perturbations against a loop written straight from the paper, and against a plain training step.

    python benchmarks/inner_loop.py --threads 1 --output benchmarks/results/inner_loop_cpu.json

Naive: in every iteration two whole forward passes (toward and away) with all logits, and `loss.backward()` with the
parameters requiring gradients. Both loops find the same perturbation; that is checked. Repeats are interleaved, the
first is thrown away, medians are given, as ratios. Absolute seconds are given only with a named GPU.
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
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from trl_robust import ThreatModel, find_perturbation
from trl_robust.objectives import away, toward
from trl_robust.threat import decoder_layers, project

LEARNING_RATE = 5e-2
RADIUS = 1.0


def make_batch(rows: int, prompt: int, completion: int, vocab: int, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(vocab, (rows, prompt), generator=generator)
    batch = {}
    for prefix in ("", "away_"):
        tokens = torch.cat([shared, torch.randint(vocab, (rows, completion), generator=generator)], 1)
        labels = tokens.clone()
        labels[:, :prompt] = -100
        batch |= {
            f"{prefix}input_ids": tokens.to(device),
            f"{prefix}attention_mask": torch.ones_like(tokens).to(device),
            f"{prefix}labels": labels.to(device),
        }
    return batch


def naive(model: LlamaForCausalLM, batch: dict[str, torch.Tensor], sites: list, steps: int, prompt: int) -> dict:
    """The search as one would first write it."""
    rows, width = batch["input_ids"].shape
    shape = (rows, width, model.config.hidden_size)
    layers = decoder_layers(model)
    deltas = {site: torch.zeros(shape, device=model.device, requires_grad=True) for site in sites}
    mask = (torch.arange(width, device=model.device) < prompt)[None, :, None]
    optimizer = torch.optim.AdamW(deltas.values(), lr=LEARNING_RATE, weight_decay=0.0)
    handles = []
    for site, delta in deltas.items():
        if site == "embedding":
            handles.append(
                model.get_input_embeddings().register_forward_hook(
                    lambda module, args, output, delta=delta: output + (delta * mask).to(output.dtype)
                )
            )
        else:
            handles.append(
                layers[site].register_forward_hook(
                    lambda module, args, output, delta=delta: output + (delta * mask).to(output.dtype)
                )
            )
    try:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = torch.zeros((), device=model.device)
            for prefix, term in (("", toward), ("away_", away)):
                logits = model(
                    input_ids=batch[f"{prefix}input_ids"], attention_mask=batch[f"{prefix}attention_mask"]
                ).logits
                labels = F.pad(batch[f"{prefix}labels"][:, 1:], (0, 1), value=-100)
                chosen = labels != -100
                loss = loss + term(logits[chosen], labels[chosen]).view(rows, -1).mean(1).sum()
            loss.backward()
            model.zero_grad()
            optimizer.step()
            with torch.no_grad():
                for delta in deltas.values():
                    delta.copy_(project(delta, "l2", RADIUS))
    finally:
        for handle in handles:
            handle.remove()
    return {site: delta.detach()[:, :prompt] for site, delta in deltas.items()}


def plain_step(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> None:
    """Forward and backward pass of supervised fine-tuning on the toward completions."""
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss.backward()
    model.zero_grad()


def measure(variants: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, run in variants.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=192)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=int(args.hidden * 2.6875),
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(args.hidden // 256, 1),
    )
    model = LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype)).eval()
    batch = make_batch(args.rows, args.prompt, args.completion, args.vocab, args.device)
    third, middle = args.layers // 3, (5 * args.layers) // 8
    choices: dict[str, list] = {
        "embedding and four layers": ["embedding", *(args.layers * k // 16 for k in (4, 8, 12, 15))],
        f"layer {third}": [third],
        f"layer {middle}": [middle],
    }
    results = []
    for name, sites in choices.items():
        threat = ThreatModel(sites, radius=RADIUS)

        def ours(threat: ThreatModel = threat) -> dict:
            return find_perturbation(
                model, batch, threat, steps=args.steps, learning_rate=LEARNING_RATE, away_coef=1.0
            ).deltas

        def straight(sites: list = sites) -> dict:
            return naive(model, batch, sites, args.steps, args.prompt)

        found, expected = ours(), straight()
        difference = max((found[site] - expected[site]).abs().max().item() for site in sites)
        seconds = measure(
            {"naive": straight, "ours": ours, "plain": lambda: plain_step(model, batch)}, args.repeats, args.device
        )
        row = {
            "sites": name,
            "ours_over_naive": round(seconds["ours"] / seconds["naive"], 3),
            "naive_iteration_over_plain_step": round(seconds["naive"] / args.steps / seconds["plain"], 3),
            "our_iteration_over_plain_step": round(seconds["ours"] / args.steps / seconds["plain"], 3),
            "largest_difference_of_delta": difference,
        }
        if args.device == "cuda":
            row["seconds"] = {key: round(value, 4) for key, value in seconds.items()}
        results.append(row)
        print(json.dumps(row))
    report = {
        "benchmark": "inner_loop",
        "note": "ours counts the last evaluation of the loss, a forward pass that naive does without",
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU",
        "settings": {key: value for key, value in vars(args).items() if key != "output"},
        "torch": torch.__version__,
        "results": results,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

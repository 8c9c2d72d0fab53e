"""What a step of a selector's training costs, in units of the forward and backward passes that it needs.

    python benchmarks/seal_step.py --threads 1 --output benchmarks/results/seal_step_cpu.json

Algorithm 1 needs three passes over a batch, each forward and backward with LoRA: the model on the safe rows and on the
data, the auxiliary model on the data. A step may cost 1.15 x that: what comes on top is drawing the safe rows, the
switching of adapters, and the selector's own update over all its rows. The unit is a forward and a backward pass of
the same model over the same batch, run between the steps of a real training, in turn with them; the first steps are
left out, and medians are given. Memory: what a plain step of TRL's trainer with the same adapter keeps for its
backward pass, its gradients and its optimiser, against the same of SEAL's; the difference should be one adapter's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from trl_robust import SEALConfig, SEALTrainer

ALLOWED = 1.15


class Held:
    """A tensor that is kept for a backward pass, counted while it lives."""

    alive, peak = 0, 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.bytes = tensor, tensor.numel() * tensor.element_size()
        Held.alive += self.bytes
        Held.peak = max(Held.peak, Held.alive)

    def __del__(self) -> None:
        Held.alive -= self.bytes


@contextmanager
def counted(parameters: set[int]) -> Any:
    """The most bytes that graphs hold at a time in this block, the weights themselves left out."""
    Held.alive = Held.peak = 0

    def pack(tensor: torch.Tensor) -> Any:
        return tensor if tensor.data_ptr() in parameters else Held(tensor)

    def unpack(kept: Any) -> torch.Tensor:
        return kept.tensor if isinstance(kept, Held) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class Stopwatch(TrainerCallback):
    """Times the passes of every step, and in turn with it the three passes that it needs."""

    def __init__(self, needed: Callable[[], None] | None, sync: Callable[[], None]) -> None:
        self.needed, self.sync = needed, sync
        self.steps: list[float] = []
        self.units: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.sync()
        self.started = time.perf_counter()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.sync()
        self.steps.append(time.perf_counter() - self.started)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.needed is not None:
            self.sync()
            started = time.perf_counter()
            for _ in range(3):
                self.needed()
            self.sync()
            self.units.append(time.perf_counter() - started)


def tokenizer_of(words: int) -> PreTrainedTokenizerFast:
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{number}" for number in range(words))]
    plain = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    plain.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def rows_of(count: int, prompt: int, completion: int, words: int, seed: int) -> Dataset:
    drawn = torch.randint(words, (count, prompt + completion), generator=torch.Generator().manual_seed(seed)).tolist()
    texts = [[f"w{number}" for number in row] for row in drawn]
    return Dataset.from_dict(
        {
            "prompt": [" ".join(row[:prompt]) for row in texts],
            "completion": [" " + " ".join(row[prompt:]) for row in texts],
        }
    )


def state_bytes(trainer: Any) -> int:
    """Bytes of trained weights, their gradients and their optimiser's state."""
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    own = sum(2 * parameter.numel() * parameter.element_size() for parameter in trained)
    state = trainer.optimizer.state.values()
    kept = [value for each in state for value in each.values() if torch.is_tensor(value)]
    return own + sum(value.numel() * value.element_size() for value in kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=96)
    parser.add_argument("--completion", type=int, default=32)
    parser.add_argument("--rows", type=int, default=2000, help="rows of the data")
    parser.add_argument("--selector-rows", type=int, default=112_000, help="logits that every update moves")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--four-bit", action="store_true", help="an NF4 base (bitsandbytes)")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    words = options.vocab - 4
    heads = max(1, options.hidden // 64)
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 7 // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    dtype = getattr(torch, options.dtype)
    tokenizer = tokenizer_of(words)
    data = rows_of(options.rows, options.prompt, options.completion, words, 0)
    safe = rows_of(options.rows // 4, options.prompt, options.completion, words, 1)
    cuda = options.device == "cuda"
    sync = torch.cuda.synchronize if cuda else (lambda: None)

    def model_of(folder: str) -> Any:
        torch.manual_seed(0)
        made = LlamaForCausalLM(config).to(dtype)
        if not options.four_bit:
            return made
        from transformers import BitsAndBytesConfig

        made.save_pretrained(f"{folder}/base")
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        placed = {"device_map": {"": 0}} if cuda else {}
        return LlamaForCausalLM.from_pretrained(
            f"{folder}/base", quantization_config=quantization, dtype=dtype, **placed
        )

    def settings(cls: Any, folder: str, **more: Any) -> Any:
        return cls(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=1e-4,
            logging_steps=options.steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not cuda,
            bf16=cuda and options.dtype == "bfloat16",
            gradient_checkpointing=options.checkpointing,
            max_length=None,
            **more,
        )

    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    memory, watches = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("plain", "seal"):
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            shared = {"train_dataset": data, "processing_class": tokenizer, "peft_config": lora}
            if name == "plain":
                trainer: Any = SFTTrainer(model=model_of(folder), args=settings(SFTConfig, folder), **shared)
                needed = None
            else:
                trainer = SEALTrainer(
                    model=model_of(folder), args=settings(SEALConfig, folder), safe_dataset=safe, **shared
                )
                widen(trainer.learner, options.selector_rows)
                batch = trainer.data_collator([trainer.train_dataset[number] for number in range(options.batch)])
                batch = {key: value.to(options.device) for key, value in batch.items() if key != "row_number"}

                def needed(trainer: Any = trainer, batch: Any = batch) -> None:
                    found = trainer.model(**batch, fused_lm_head=True, use_cache=False)
                    (-found.log_probs.sum(1)).mean().backward()
                    trainer.model.zero_grad()

            watch = Stopwatch(needed, sync)
            trainer.add_callback(watch)
            weights = {parameter.data_ptr() for parameter in trainer.model.parameters()}
            with counted(weights):
                trainer.train()
            memory[name] = {"graphs": Held.peak, "adapters_and_optimizer": state_bytes(trainer)}
            if cuda:
                memory[name]["peak_allocated"] = torch.cuda.max_memory_allocated()
            if name == "seal":
                # Again without the hooks that count, which would slow the passes down.
                trainer.state.global_step = 0
                watch.steps.clear(), watch.units.clear()
                trainer.train()
            watches[name] = watch
    step, three = (statistics.median(values[3:]) for values in (watches["seal"].steps, watches["seal"].units))
    adapter = memory["seal"]["adapters_and_optimizer"] / 2
    more = sum(memory["seal"][key] - memory["plain"][key] for key in ("graphs", "adapters_and_optimizer"))
    report = {
        "machine": torch.cuda.get_device_name() if cuda else platform.machine(),
        "torch": torch.__version__,
        "settings": {key: value for key, value in vars(options).items() if key != "output"},
        "seconds_of_a_step": round(step, 4),
        "seconds_of_three_passes": round(three, 4),
        "ratio": round(step / three, 3),
        "allowed": ALLOWED,
        "memory_bytes": memory,
        "more_than_a_plain_step_in_adapters_with_optimizer": round(more / adapter, 3),
    }
    print(json.dumps(report, indent=2))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def widen(learner: Any, rows: int) -> None:
    """More logits than there are rows: their update is part of the cost, and 112,000 of them are the paper's."""
    extra = rows - len(learner.logits)
    if extra > 0:
        for name in ("logits", "_sum", "visits", "last_visit_step", "first_loss", "ema_loss", "ema_loss_aux"):
            values = getattr(learner, name)
            setattr(learner, name, torch.cat([values, values[:1].expand(extra)]))


if __name__ == "__main__":
    main()

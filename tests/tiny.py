"""Models, a tokenizer, batches and datasets small enough for exact tests, made on the spot from configurations.

What matters in the models: a hidden size that is no round number of the reference code (4096), grouped queries,
tied and untied heads, heads that cap their logits, layers with a norm after the MLP, a mixture of experts.
"""

import functools

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models import (
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    mixtral,
    opt,
    phi3,
    qwen2,
    qwen3,
)

WORDS = [f"w{number}" for number in range(58)]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<asst>"]
VOCABULARY = len(SPECIAL) + len(WORDS)
HIDDEN, LAYERS = 24, 4

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 36,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Large enough for a perturbation to change what the model says.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MISTRAL = {**_COMMON, "sliding_window": 6}
_GEMMA = {**_COMMON, "head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 6}
_CONFIGS = {
    "llama": (llama.LlamaConfig, {**_COMMON, "tie_word_embeddings": False}),
    "mistral": (mistral.MistralConfig, _MISTRAL),
    "qwen2": (qwen2.Qwen2Config, {**_COMMON, "tie_word_embeddings": True}),
    "qwen3": (qwen3.Qwen3Config, {**_COMMON, "head_dim": 6, "tie_word_embeddings": True}),
    "gemma2": (gemma2.Gemma2Config, _GEMMA),
    "gemma3": (gemma3.Gemma3TextConfig, _GEMMA),
    "phi3": (phi3.Phi3Config, _COMMON),
    "gpt_neox": (gpt_neox.GPTNeoXConfig, {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}),
    "mixtral": (mixtral.MixtralConfig, {**_MISTRAL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": (
        gpt2.GPT2Config,
        {
            "vocab_size": VOCABULARY,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_positions": 128,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "opt": (
        opt.OPTConfig,
        {
            "vocab_size": VOCABULARY,
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
            "ffn_dim": 36,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "init_std": 0.2,
            "dropout": 0.0,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}
ARCHITECTURES = list(_CONFIGS)


def tiny_model(name: str = "llama", *, seed: int = 0, **changes) -> nn.Module:
    """A new model with random weights (not those of its initialisation: norms and biases are random as well)."""
    make, settings = _CONFIGS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(make(**{**settings, **changes})).float()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                assert parameter.isfinite().all(), key
    model.generation_config.do_sample = False
    return model.eval()


@functools.cache
def shared_model(name: str) -> nn.Module:
    """One model an architecture for the whole session, for tests that leave it as it was."""
    return tiny_model(name)


def lora(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    """The model with LoRA on its attention, the adapters away from zero."""
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = get_peft_model(model, lora_config(dropout))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.1)
    return model


def lora_config(dropout: float = 0.0):
    from peft import LoraConfig

    return LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )


CHAT_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{- '<user> ' + message['content'] + ' ' }}"
    "{%- elif message['role'] == 'system' %}{{- message['content'] + ' ' }}"
    "{%- else %}{{- '<asst> ' + message['content'] + ' ' + eos_token }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<asst>' }}{%- endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<asst>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


# Batches

_PROMPTS, _COMPLETIONS, _AWAY = (5, 3, 7, 2), (3, 5, 2, 4), (2, 4, 6, 1)


def rows(count: int = 4, seed: int = 0) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompts, completions and completions to go away from, as tokens, of many lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(len(SPECIAL), VOCABULARY, (length,), generator=generator).tolist()

    return [(draw(_PROMPTS[i % 4]), draw(_COMPLETIONS[i % 4]), draw(_AWAY[i % 4])) for i in range(count)]


def collate(pairs: list[tuple[list[int], list[int]]], side: str = "right") -> dict[str, torch.Tensor]:
    """A batch of (prompt, completion) pairs, padded on the given side."""
    width = max(len(prompt) + len(completion) for prompt, completion in pairs)
    keys: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, completion in pairs:
        filled = (prompt + completion, [1] * len(prompt + completion), [-100] * len(prompt) + completion)
        for key, values, filler in zip(keys, filled, (0, 0, -100), strict=True):
            padding = [filler] * (width - len(values))
            keys[key].append(padding + values if side == "left" else values + padding)
    return {key: torch.tensor(values) for key, values in keys.items()}


def batch(count: int = 4, side: str = "right", away: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch as `find_perturbation` takes it; with `away` also the completions to go away from."""
    made = rows(count, seed)
    found = collate([(prompt, completion) for prompt, completion, _ in made], side)
    if away:
        other = collate([(prompt, completion) for prompt, _, completion in made], side)
        found.update({f"away_{key}": value for key, value in other.items()})
    return found


def row_of(found: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    """One row of a batch as a batch of its own, without the columns that are padding in it."""
    result = {}
    for prefix in ("", "away_"):
        if f"{prefix}input_ids" in found:
            real = found[f"{prefix}attention_mask"][number].bool()
            for key in ("input_ids", "attention_mask", "labels"):
                result[prefix + key] = found[prefix + key][number : number + 1, real]
    return result


# Datasets


def _sentence(generator: torch.Generator, shortest: int, longest: int) -> str:
    length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
    return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=generator).tolist())


def preference_data(count: int = 16, seed: int = 0, conversational: bool = False) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        prompt, chosen, rejected = (_sentence(generator, *span) for span in ((3, 7), (2, 6), (2, 6)))
        if conversational:
            earlier = [
                {"role": "system", "content": "w0 w1"},
                {"role": "user", "content": "w2 w3 w4"},
                {"role": "assistant", "content": "w5"},
            ]
            made.append(
                {
                    "prompt": [*(earlier if number % 2 else []), {"role": "user", "content": prompt}],
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                }
            )
        else:
            made.append({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"})
    return Dataset.from_list(made)


def completion_data(count: int = 16, seed: int = 1) -> Dataset:
    data = preference_data(count, seed)
    return data.remove_columns("rejected").rename_column("chosen", "completion")

"""The model of a recipe without its weights: its configuration, its modules on the meta device, its parameters.

A configuration comes from, in this order: the file or folder given by hand, the model's own folder or the local cache
of the hub, the table of published shapes below, the hub itself.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, Phi3Config

from ..recipes import Recipe, RecipeError
from ..recipes.shares import is_adapter
from ..threat.sites import MLP_NAMES, base_model, decoder_layers
from ..trainers.attacked import train_only
from ..trainers.lat_rmu import freeze_above

_LLAMA2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
_LLAMA3_8B = _LLAMA2_7B | {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
_MISTRAL_7B = _LLAMA2_7B | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
_PHI3_MINI = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "tie_word_embeddings": False,
}

SHAPES: dict[str, tuple[type, dict[str, Any]]] = {
    "meta-llama/Llama-2-7b-hf": (LlamaConfig, _LLAMA2_7B),
    "meta-llama/Llama-2-7b-chat-hf": (LlamaConfig, _LLAMA2_7B),
    "microsoft/Llama2-7b-WhoIsHarryPotter": (LlamaConfig, _LLAMA2_7B),
    "ethz-spylab/poisoned_generation_trojan1": (LlamaConfig, _LLAMA2_7B | {"vocab_size": 32001}),
    "ethz-spylab/poisoned_generation_trojan2": (LlamaConfig, _LLAMA2_7B | {"vocab_size": 32001}),
    "ethz-spylab/poisoned_generation_trojan3": (LlamaConfig, _LLAMA2_7B | {"vocab_size": 32001}),
    "ethz-spylab/poisoned_generation_trojan4": (LlamaConfig, _LLAMA2_7B | {"vocab_size": 32001}),
    "ethz-spylab/poisoned_generation_trojan5": (LlamaConfig, _LLAMA2_7B | {"vocab_size": 32001}),
    "meta-llama/Meta-Llama-3-8B": (LlamaConfig, _LLAMA3_8B),
    "meta-llama/Meta-Llama-3-8B-Instruct": (LlamaConfig, _LLAMA3_8B),
    "mistralai/Mistral-7B-v0.1": (MistralConfig, _MISTRAL_7B),
    "HuggingFaceH4/zephyr-7b-beta": (MistralConfig, _MISTRAL_7B),
    "microsoft/Phi-3-mini-4k-instruct": (Phi3Config, _PHI3_MINI),
}
"""Shapes as published, of the models that our recipes name, for machines without the hub."""


def find_config(recipe: Recipe, model_config: str | None = None) -> tuple[Any, str]:
    """
    Finds the configuration of a recipe's model.

    Args:
        recipe ([`~trl_robust.recipes.Recipe`]):
            Settings.
        model_config (`str`, *optional*):
            A folder with a `config.json`, or such a file, in place of the model's own.

    Returns:
        `tuple`: the configuration, and a phrase that says where it is from.

    Raises:
        [`~trl_robust.recipes.RecipeError`]: there is none.
    """
    name, trust = str(recipe.model.model_name_or_path), recipe.training.trust_remote_code
    if model_config is not None:
        return _given_config(model_config, trust), f"configuration {model_config}"
    folder = Path(name).expanduser()
    if is_adapter(folder):
        name, folder = _base_of(recipe, folder)
    revision = recipe.model.model_revision if name == recipe.model.model_name_or_path else None
    options = {"revision": revision, "trust_remote_code": trust}
    try:
        if folder.is_dir():
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust), "its own configuration"
        return AutoConfig.from_pretrained(name, local_files_only=True, **options), "its configuration in the cache"
    except (OSError, ValueError, KeyError) as error:
        if folder.is_dir():
            raise RecipeError([f"{name}: its config.json cannot be used: {_line(error)}."], recipe.source) from error
    if name in SHAPES:
        kind, shape = SHAPES[name]
        return kind(**shape), "shape from our table of published shapes, not from the model itself"
    try:
        return AutoConfig.from_pretrained(name, **options), "its configuration on the hub"
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(
            [
                f"The configuration of {name} is neither on this machine nor in our table, and the hub does not give "
                "it. Give a copy of its config.json with `--model_config FOLDER_OR_JSON`."
            ],
            recipe.source,
        ) from error


def _base_of(recipe: Recipe, folder: Path) -> tuple[str, Path]:
    """The model below an adapter that is trained further."""
    try:
        name = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        return str(name), Path(str(name)).expanduser()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError([f"{folder / 'adapter_config.json'} does not name a base model."], recipe.source) from error


def _given_config(given: str, trust_remote_code: bool) -> Any:
    path = Path(given).expanduser()
    if not path.exists():
        raise RecipeError([f"`model_config` is {given}, which does not exist. Give a config.json or its folder."])
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or "model_type" not in values:
            raise ValueError("it has no `model_type`")
        # From the folder where one is given, since code of the model's own may lie beside the file.
        if path.is_dir():
            return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        return AutoConfig.for_model(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"`model_config` is {given}, which is not a model's configuration: {_line(error)}."
        raise RecipeError([f"{reason} Give a config.json as transformers writes it, or its folder."]) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


@dataclass(frozen=True)
class Blueprint:
    """
    Makes a run's model on the meta device: every module and shape, no memory.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Configuration.
        dtype (`torch.dtype`):
            Of the weights that are not quantised.
        quantized (`bool`, *optional*, defaults to `False`):
            Whether linear layers are, which decides the dtype of adapters.
        attention (`str`, *optional*):
            Attention implementation; transformers' choice for the architecture if not given.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapters.
        trained_layers (`tuple[str, ...]`, *optional*):
            As the recipe's key.
        trained_modules (`tuple[str, ...]`, *optional*):
            As the recipe's key.
        frozen_above (`int`, *optional*):
            Layer above which no adapter is trained.
    """

    config: Any
    dtype: torch.dtype
    quantized: bool = False
    attention: str | None = None
    peft_config: Any = None
    trained_layers: tuple[str, ...] = ()
    trained_modules: tuple[str, ...] = ()
    frozen_above: int | None = None

    @property
    def trains_some_layers(self) -> bool:
        """Whether layers differ in what is trained of them."""
        return bool(self.trained_layers) or self.frozen_above is not None

    def model(self, depth: int | None = None) -> Any:
        """
        Makes the model.

        Args:
            depth (`int`, *optional*):
                Keep only the first so many decoder layers.

        Returns:
            [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`].

        Raises:
            [`~trl_robust.recipes.RecipeError`]: no causal language model can be made of it, or the adapters or the
            choice of trained weights do not fit it.
        """
        config = copy.deepcopy(self.config)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=self.dtype, attn_implementation=self.attention)
                if depth is not None:
                    del decoder_layers(model)[depth:]
                    model.config.get_text_config().num_hidden_layers = depth
                if self.peft_config is not None:
                    model = get_peft_model(model, copy.deepcopy(self.peft_config))
            chosen = self.trained_layers if depth is None else self._within(depth)
            train_only(model, chosen, self.trained_modules)
            if self.frozen_above is not None:
                freeze_above(model, self.frozen_above)
        except (ValueError, ImportError) as error:
            raise RecipeError(
                [f"No model can be made of the configuration and these settings: {_line(error)}."]
            ) from error
        if self.quantized:
            for parameter in model.parameters():
                if parameter.requires_grad:  # as TRL does with the adapters of a quantised model
                    parameter.data = parameter.data.to(torch.bfloat16)
        return model

    def _within(self, depth: int) -> tuple[str, ...]:
        return tuple(layer for layer in self.trained_layers if int(layer) < depth)


@dataclass(frozen=True)
class Matrices:
    """
    Weights that take part in matrix products, a token; all else of a model's arithmetic is small.

    Args:
        frozen (`int`):
            Weights without a gradient.
        trained (`int`):
            Weights with one, adapters included.
        last (`int`, *optional*, defaults to `0`):
            Of all of these, those of the last matrix of a layer. What is put out there is kept by nothing, so that
            checkpointing, when it runs a layer again, stops before it.
        last_adapted (`bool`, *optional*, defaults to `False`):
            Whether an adapter beside the last matrix keeps something, so that only frozen layers stop there.
    """

    frozen: int = 0
    trained: int = 0
    last: int = 0
    last_adapted: bool = False

    @property
    def total(self) -> int:
        return self.frozen + self.trained


@dataclass(frozen=True)
class Shape:
    """
    What a run's cost depends on, read off a model on the meta device.

    Args:
        parameters (`int`):
            All parameters, without adapters.
        trained (`int`):
            Those that are trained.
        layers (`tuple[Matrices, ...]`):
            Matrices of every decoder layer.
        head (`Matrices`):
            Of the projection to the vocabulary.
        hidden (`int`):
            Width of the residual stream.
        vocabulary (`int`):
            Size of the vocabulary.
        attention (`int`):
            Heads times their width.
        linear (`int`):
            Weights that quantisation takes: those of the linear layers but for the head.
        largest (`int`):
            The largest of these matrices.
        linear_rows (`int`):
            Output features of these matrices together.
        trained_below (`bool`):
            Whether the embedding is trained, so that backward passes go down to it.
    """

    parameters: int
    trained: int
    layers: tuple[Matrices, ...]
    head: Matrices
    hidden: int
    vocabulary: int
    attention: int
    linear: int
    largest: int
    linear_rows: int
    trained_below: bool

    @property
    def depth(self) -> int:
        return len(self.layers)


def of_adapter(name: str) -> bool:
    """
    Whether a parameter of a PEFT model belongs to an adapter.

    Args:
        name (`str`):
            Its name.

    Returns:
        `bool`.
    """
    return "lora_" in name or ".modules_to_save." in name


def shape_of(model: Any) -> Shape:
    """
    Reads the shape off a model, with or without adapters.

    Args:
        model (`nn.Module`):
            A causal language model or a `PeftModel`, on any device, its parameters frozen as in training.

    Returns:
        [`Shape`].
    """
    base = base_model(model)
    config = base.config.get_text_config()
    layers = decoder_layers(model)
    head = base.get_output_embeddings()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    linear = [module.weight for name, module in _frozen_linears(base, head)]
    share = _expert_share(config)
    return Shape(
        parameters=sum(p.numel() for name, p in model.named_parameters() if not of_adapter(name)),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        layers=tuple(_layer_matrices(layer, share) for layer in layers),
        head=_matrices(head, 1.0),
        hidden=config.hidden_size,
        vocabulary=head.weight.shape[0],
        attention=heads * head_dim,
        linear=sum(weight.numel() for weight in linear),
        largest=max((weight.numel() for weight in linear), default=0),
        linear_rows=sum(weight.shape[0] for weight in linear),
        trained_below=any(parameter.requires_grad for parameter in base.get_input_embeddings().parameters()),
    )


def _frozen_linears(base: Any, head: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [
        (name, module)
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not of_adapter(f"{name}.weight")
    ]


def _expert_share(config: Any) -> float:
    """Of the experts of a layer, the share that a token passes through."""
    chosen = getattr(config, "num_experts_per_tok", None)
    there = next((n for key in ("num_local_experts", "num_experts") if (n := getattr(config, key, None))), None)
    return chosen / there if chosen and there else 1.0


def _matrices(module: nn.Module, expert_share: float) -> Matrices:
    counts = {False: 0.0, True: 0.0}
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2 or "embed" in name:
            continue
        is_expert = parameter.dim() > 2 or ".experts." in name
        counts[parameter.requires_grad] += parameter.numel() * (expert_share if is_expert else 1.0)
    return Matrices(round(counts[False]), round(counts[True]))


def _layer_matrices(layer: nn.Module, expert_share: float) -> Matrices:
    found = _matrices(layer, expert_share)
    mlp: Any = next((getattr(layer, name) for name in MLP_NAMES if hasattr(layer, name)), nn.Module())
    names = [name for name, parameter in mlp.named_parameters() if parameter.dim() == 2]
    # A norm after the MLP keeps what it is given, and a router decides which matrix is the last.
    if not names or expert_share < 1 or any("post_feedforward" in name for name, _ in layer.named_children()):
        return found
    module = names[-1].split(".")[0]
    last = [p for name, p in mlp.named_parameters() if name.split(".")[0] == module and p.dim() == 2]
    return replace(found, last=sum(p.numel() for p in last), last_adapted=len(last) > 1)


def compute_dtype(recipe: Recipe, config: Any) -> torch.dtype:
    """
    The dtype in which a recipe loads the weights.

    Args:
        recipe ([`~trl_robust.recipes.Recipe`]):
            Settings.
        config ([`~transformers.PreTrainedConfig`]):
            The model's configuration, for `dtype: auto`.

    Returns:
        `torch.dtype`.
    """
    name = recipe.model.dtype
    if name == "auto":
        return getattr(config.get_text_config(), "dtype", None) or torch.float32
    return getattr(torch, name) if name else torch.float32

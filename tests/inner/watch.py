"""What a search must leave as it found it."""

import torch
from torch import nn

_HOOKS = [
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
]


def state_of(model: nn.Module) -> dict:
    """Hooks, modes and shadowed forwards of all modules; values, gradients and `requires_grad` of all parameters."""
    return {
        "hooks": {name: [len(getattr(module, kind)) for kind in _HOOKS] for name, module in model.named_modules()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "forwards": {name: module.__dict__.get("forward") for name, module in model.named_modules()},
        "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": {
            name: None if parameter.grad is None else parameter.grad.clone()
            for name, parameter in model.named_parameters()
        },
        "names": [name for name, _ in model.named_parameters()],
        "values": {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
    }


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = state_of(model)
    for key in ("hooks", "modes", "forwards", "trained", "names"):
        assert after[key] == before[key], key
    for key in ("gradients", "values"):
        for name, tensor in before[key].items():
            found = after[key][name]
            assert (tensor is None) == (found is None), (key, name)
            assert tensor is None or torch.equal(tensor, found), (key, name)

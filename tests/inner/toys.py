"""A language model small enough to know its worst perturbation in closed form."""

from types import SimpleNamespace

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


class _Layer(GradientCheckpointingLayer):
    def __init__(self, as_tuple: bool, identity: bool, hidden: int) -> None:
        nn.Module.__init__(self)
        self.as_tuple = as_tuple
        self.mlp = nn.Identity() if identity else nn.Linear(hidden, hidden)

    def forward(self, hidden_states, **kwargs):
        states = hidden_states + self.mlp(hidden_states) * (not isinstance(self.mlp, nn.Identity))
        return (states, "something else") if self.as_tuple else states


class _Decoder(nn.Module):
    def __init__(self, vocabulary, hidden, depth, as_tuple, identity):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(_Layer(as_tuple, identity, hidden) for _ in range(depth))

    def forward(self, input_ids, attention_mask):
        states = self.embed(input_ids)
        for layer in self.layers:
            states = layer(states)
            states = states[0] if isinstance(states, tuple) else states
        return (states * attention_mask.unsqueeze(-1)).cumsum(1)


class Toy(nn.Module):
    """
    Predicts the next of two tokens from the sum of all states before it: logits `+-<direction, sum>`.

    With layers that change nothing, every loss is a monotone function of `<direction, sum of deltas>`, so the worst
    point of any ball is its steepest one.
    """

    def __init__(self, hidden=6, depth=3, as_tuple=False, identity=True, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = _Decoder(2, hidden, depth, as_tuple, identity)
            self.direction = nn.Parameter(torch.randn(hidden))
        text = SimpleNamespace(hidden_size=hidden, num_hidden_layers=depth)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.eval()

    def get_decoder(self):
        return self.model

    def forward(self, input_ids, attention_mask, position_ids=None, logits_to_keep=None, use_cache=None):
        score = self.model(input_ids=input_ids, attention_mask=attention_mask) @ self.direction
        logits = torch.stack([score, -score], -1)
        return SimpleNamespace(logits=logits if logits_to_keep is None else logits[logits_to_keep])

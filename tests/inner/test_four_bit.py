"""A model in four bits on the CPU: its gradients survive passes in evaluation mode."""

import pytest
import torch
from tiny import batch, tiny_model
from torch import nn

from trl_robust import ThreatModel, find_paraphrase, find_perturbation
from trl_robust._compat import keep_4bit_differentiable
from trl_robust.objectives import label_logits, toward

bnb = pytest.importorskip("bitsandbytes")


@pytest.fixture
def four_bit():
    """A tiny Llama whose linear layers are NF4, as `BitsAndBytesConfig(load_in_4bit=True)` makes them."""
    model = tiny_model(hidden_size=64, intermediate_size=64).bfloat16()
    for module in list(model.model.layers.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                packed = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16
                )
                packed.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                setattr(module, name, packed.to("cpu"))
    assert sum(isinstance(module, bnb.nn.Linear4bit) for module in model.modules()) == 4 * 7
    return model


def embedding_gradient(model):
    found = batch()
    weight = model.get_input_embeddings().weight
    kept = label_logits(model, found["input_ids"], found["attention_mask"], found["labels"])
    return torch.autograd.grad(toward(kept.logits, kept.targets).sum(), weight)[0]


def evaluate(model):
    found = batch()
    with torch.no_grad():
        model.eval()(input_ids=found["input_ids"], attention_mask=found["attention_mask"])


def test_the_gradient_after_a_pass_in_evaluation_mode_is_the_gradient_before_it(four_bit):
    keep_4bit_differentiable(four_bit)
    before = embedding_gradient(four_bit)
    assert before.abs().max() > 0
    evaluate(four_bit)
    assert torch.equal(embedding_gradient(four_bit), before)


def test_a_search_on_a_four_bit_model_leaves_its_gradients_alone_and_finds_something(four_bit):
    keep_4bit_differentiable(four_bit)
    before = embedding_gradient(four_bit)
    found = find_perturbation(four_bit, batch(), ThreatModel([1], radius=0.3), steps=3)
    again = find_perturbation(four_bit, batch(), ThreatModel([1], radius=0.3), steps=3)
    assert found.losses[-1] < found.losses[0]
    assert torch.equal(found.deltas[1], again.deltas[1])
    assert torch.equal(embedding_gradient(four_bit), before)


@pytest.mark.filterwarnings("ignore:bitsandbytes.*autograd kernel was not registered:UserWarning")
def test_without_the_remedy_a_cpu_with_avx512_bf16_loses_the_gradient(four_bit):
    """Says whether this machine shows the defect at all, and whether the remedy is still needed."""
    if not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in four_bit.modules()):
        pytest.skip("this CPU has no AVX512-BF16")
    before = embedding_gradient(four_bit)
    evaluate(four_bit)
    assert not torch.equal(embedding_gradient(four_bit), before)


def test_a_paraphrase_of_a_four_bit_model_keeps_the_constraint_and_leaves_its_gradients_alone(four_bit):
    keep_4bit_differentiable(four_bit)
    before = embedding_gradient(four_bit)
    found, again = (
        find_paraphrase(four_bit, batch(), layer=1, epsilon=0.2, steps=4, generator=torch.Generator().manual_seed(0))
        for _ in range(2)
    )
    assert found.feasible.all() and found.relative_norms.min() > 0.05
    assert found.delta.dtype == torch.float32 and torch.equal(found.delta, again.delta)
    assert 0 < found.cast_lost < 0.5
    assert torch.equal(embedding_gradient(four_bit), before)

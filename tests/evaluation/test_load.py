"""The measured load of a latent attack against hidden states that the model itself gives out."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import lora, make_tokenizer, tiny_model

from trl_robust import ThreatModel
from trl_robust.attacks import AttackRow, Direct, Generation, Latent, Prefill, Subject, Template
from trl_robust.evaluation import latent_load
from trl_robust.evaluation.load import common_end

TEXTS = ["w1 w2 w3", "w4 w5 w6 w7", "w8 w9"]
WRAPPERS = ("w20 w21 {prompt}", "{prompt} w22", "w23 {prompt} w24 w25")
THREAT = ThreatModel(("embedding", 0, 2))


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(tiny_model("llama"), make_tokenizer(), max_new_tokens=2, batch_size=2, progress=False)


ROWS = [AttackRow(str(number), text, "w9 w8", "w1") for number, text in enumerate(TEXTS)]


def wrapped(*templates: str) -> list[Generation]:
    return [
        Generation(row, template.replace("{prompt}", row.prompt), "w1", "w1")
        for row, template in zip(ROWS, templates, strict=True)
    ]


def scored(*success) -> list[dict]:
    return [{"status": "errored" if value is None else "scored", "success": value} for value in success]


def states(subject: Subject, tokens: list[int]) -> dict:
    with torch.no_grad():
        found = subject.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    # The last entry has gone through the final norm, so that site 2 of 4 layers is still the residual stream.
    return {"embedding": found[0][0], 0: found[1][0], 2: found[3][0]}


def hooks(subject: Subject) -> int:
    # transformers itself leaves some behind where hidden states were asked for.
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in subject.model.modules())


def expected(subject: Subject, generations, count_of) -> dict:
    """Largest displacement of every request at every site, in units of the median norm."""
    direct = [states(subject, subject.encode(row.prompt)) for row in ROWS]
    units = {site: torch.cat([row[site].norm(dim=-1) for row in direct]).median() for site in direct[0]}
    result = {site: [] for site in units}
    for generation, before in zip(generations, direct, strict=True):
        after = states(subject, subject.encode(generation.prompt))
        count = count_of(generation)
        for site in units:
            moved = (after[site][-count:] - before[site][-count:]).norm(dim=-1)
            result[site].append((moved.max() / units[site]).item())
    return result


# Wrapped in front, at the end, and on both sides: the chat template ends every prompt with one more token.
SHARED = {"0": 4, "1": 1, "2": 1}
ALIGNED = {"0": 6, "1": 7, "2": 5}


@pytest.mark.parametrize(
    ("tokens", "count_of"),
    [
        ("shared", lambda generation: SHARED[generation.row.id]),
        ("last", lambda generation: 1),
        ("aligned", lambda generation: ALIGNED[generation.row.id]),
    ],
)
def test_it_is_the_largest_displacement_of_the_compared_tokens_over_the_median_norm(subject, tokens, count_of):
    generations = wrapped(*WRAPPERS)
    found = latent_load(subject, generations, scored(1, 1, 0), THREAT, tokens=tokens)
    direct = expected(subject, generations, count_of)
    for site, values in direct.items():
        own = found["sites"][str(site)]
        assert own["mean"] == pytest.approx(sum(values[:2]) / 2, rel=1e-4, abs=1e-6)
        assert own["largest"] == pytest.approx(max(values[:2]), rel=1e-4, abs=1e-6)
        assert own["mean_unsuccessful"] == pytest.approx(values[2], rel=1e-4, abs=1e-6)
        assert own["quantiles"]["0.5"] == pytest.approx(own["mean"])
    assert found["load"] == max(own["mean"] for own in found["sites"].values())
    assert found["sites"][str(found["site"])]["mean"] == found["load"]
    assert (found["n"], found["n_unsuccessful"], found["n_left_out"]) == (2, 1, 0)
    assert found["mean_tokens"] == sum(count_of(generation) for generation in generations[:2]) / 2
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_compared_tokens_are_those_at_the_end_that_both_prompts_share(subject):
    for generation in wrapped(*WRAPPERS):
        direct, attacked = subject.encode(generation.row.prompt), subject.encode(generation.prompt)
        assert common_end(direct, attacked) == SHARED[generation.row.id]
        assert len(direct) == ALIGNED[generation.row.id] and len(attacked) > len(direct)


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_a_common_end_is_found_whatever_stands_before_it(first, second, end):
    found = common_end([*first, *end], [*second, *end])
    assert found >= len(end)
    assert found == common_end([*second, *end], [*first, *end])
    assert [*first, *end][len(first) + len(end) - found :] == [*second, *end][len(second) + len(end) - found :]


def test_the_unit_is_that_of_the_relative_radius(subject):
    attack = Latent(sites=("embedding", 0, 2))
    unit = attack._unit(subject, ROWS)
    found = latent_load(subject, wrapped(*WRAPPERS), scored(1, 1, 1), attack.threat)
    assert {site: own["unit"] for site, own in found["sites"].items()} == {
        str(site): pytest.approx(value, rel=1e-5) for site, value in unit.items()
    }


def test_tokens_that_stay_do_not_move_at_the_embedding_and_that_is_said(subject):
    found = latent_load(subject, wrapped(*WRAPPERS), scored(1, 1, 1), ThreatModel(("embedding",)))
    assert found["load"] == 0 and "aligned" in found["why"]
    found = latent_load(subject, wrapped(*WRAPPERS), scored(1, 1, 1), ThreatModel(("embedding",)), tokens="aligned")
    assert found["load"] > 0 and found["why"] is None


def test_it_does_not_depend_on_the_batch_size_and_the_model_is_left_as_it_was(subject):
    found, before = [], hooks(subject)
    for size in (1, 3):
        subject.batch_size = size
        found.append(latent_load(subject, wrapped(*WRAPPERS), scored(1, 1, 1), THREAT))
    subject.batch_size = 2
    assert found[0]["load"] == pytest.approx(found[1]["load"], rel=1e-5)
    assert found[0]["interval"] == pytest.approx(found[1]["interval"], rel=1e-5)
    assert found[0]["interval"][0] <= found[0]["load"] <= found[0]["interval"][1]
    assert hooks(subject) == before
    assert all(parameter.requires_grad and parameter.grad is None for parameter in subject.model.parameters())


def test_a_model_whose_states_are_twice_as_large_has_the_same_load(subject):
    # Embeddings and what the layers add are doubled: the RMS norms in front of the layers take the factor out again.
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(2)
            layer.mlp.down_proj.weight.mul_(2)
    larger = Subject(model, subject.tokenizer, batch_size=2, progress=False)
    loads = [latent_load(one, wrapped(*WRAPPERS), scored(1, 1, 1), THREAT) for one in (subject, larger)]
    assert loads[1]["sites"]["2"]["unit"] == pytest.approx(2 * loads[0]["sites"]["2"]["unit"], rel=1e-3)
    assert loads[1]["load"] == pytest.approx(loads[0]["load"], rel=1e-3)


def test_what_cannot_be_compared_is_left_out_and_counted_by_reason(subject):
    generations = [
        *wrapped(*WRAPPERS),
        Generation(ROWS[0], ROWS[0].prompt, "w1", "w1"),
        Generation(ROWS[1], "w1 " * 300, "w1", "w1"),
    ]
    subject.max_prompt_tokens = 100
    found = latent_load(subject, generations, scored(1, None, 0, 1, 1), THREAT)
    subject.max_prompt_tokens = 1024
    assert (found["n"], found["n_unsuccessful"], found["n_left_out"]) == (1, 1, 3)
    assert found["left_out"] == {"not scored": 1, "the prompt is unchanged": 1, "over the limit of tokens": 1}
    assert found["interval"] is None
    plain = Subject(subject.model, make_tokenizer(), batch_size=2, progress=False)
    plain.tokenizer.chat_template = None
    found = latent_load(plain, wrapped(*WRAPPERS), scored(1, 1, 1), THREAT)
    assert found["left_out"] == {"no token in common at the end": 2} and found["n"] == 1


def test_without_a_success_there_is_no_load_and_it_says_so(subject):
    found = latent_load(subject, wrapped(*WRAPPERS), scored(0, 0, None), THREAT)
    assert found["load"] is None and found["sites"] == {} and "no request was broken" in found["why"]
    assert (found["n"], found["n_unsuccessful"], found["n_left_out"]) == (0, 2, 1)


def test_it_takes_what_attacks_and_judges_give(subject):
    for attack, expected in ((Template(WRAPPERS), 3), (Direct(), 0), (Prefill(), 0)):
        generations = attack.run(subject, ROWS)
        found = latent_load(subject, generations, scored(1, 1, 1), THREAT)
        assert found["n"] == expected
        assert found["left_out"] == ({} if expected else {"the prompt is unchanged": 3})


def test_conversations_keep_their_earlier_turns_and_other_prompts_can_be_given(subject):
    earlier = [{"role": "system", "content": "w30"}]
    turns = [[*earlier, {"role": "user", "content": text}] for text in TEXTS]
    rows = [AttackRow(str(number), prompt) for number, prompt in enumerate(turns)]
    generations = [Generation(row, f"w20 {text}", "w1", "w1") for row, text in zip(rows, TEXTS, strict=True)]
    longer = [[*earlier, {"role": "user", "content": f"w20 {text}"}] for text in TEXTS]
    first = latent_load(subject, generations, scored(1, 1, 1), THREAT)
    assert latent_load(subject, generations, scored(1, 1, 1), THREAT, prompts=longer) == first
    more = [[{"role": "user", "content": "w40"}, {"role": "assistant", "content": "w41"}, *one] for one in turns]
    assert latent_load(subject, generations, scored(1, 1, 1), THREAT, prompts=more)["load"] != first["load"]


def test_adapters_and_the_mlp_stream_work(subject):
    adapted = Subject(lora(tiny_model("llama")), subject.tokenizer, batch_size=2, progress=False)
    found = latent_load(adapted, wrapped(*WRAPPERS), scored(1, 1, 1), ThreatModel((0, 2), "mlp"))
    assert found["load"] > 0
    assert found["load"] != latent_load(adapted, wrapped(*WRAPPERS), scored(1, 1, 1), ThreatModel((0, 2)))["load"]


def test_wrong_arguments_and_states_that_are_not_finite_are_refused(subject):
    with pytest.raises(ValueError, match="shared"):
        latent_load(subject, wrapped(*WRAPPERS), scored(1, 1, 1), THREAT, tokens="all")
    with pytest.raises(ValueError, match="one each"):
        latent_load(subject, wrapped(*WRAPPERS), scored(1), THREAT)
    broken = tiny_model("llama")
    torch.nn.init.constant_(broken.model.layers[0].mlp.down_proj.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="bfloat16"):
        latent_load(Subject(broken, make_tokenizer(), progress=False), wrapped(*WRAPPERS), scored(1, 1, 1), THREAT)

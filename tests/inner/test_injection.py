"""Adding perturbations to every architecture: nothing where nothing is asked, exactly there where it is."""

import pytest
import torch
from tiny import ARCHITECTURES, HIDDEN, LAYERS, batch, collate, lora, row_of, rows, shared_model, tiny_model
from toys import Toy
from watch import assert_unchanged, state_of

from trl_robust.inner import CachedPrefix, Perturbation, attack_mode
from trl_robust.objectives import label_logits
from trl_robust.threat import decoder_layers, selected_ranks
from trl_robust.threat.positions import ranks
from trl_robust.threat.sites import UnsupportedModelError

EVERYWHERE = ["embedding", *range(LAYERS)]


def logits(model, found, **kwargs):
    return model(input_ids=found["input_ids"], attention_mask=found["attention_mask"], **kwargs).logits


def perturbation(found, sites, scale=1.0, positions="prompt", stream="layer", seed=0):
    """A random perturbation of a batch."""
    selected = selected_ranks(found, positions)
    generator = torch.Generator().manual_seed(seed)
    shape = (*selected.shape, HIDDEN)
    return Perturbation({site: scale * torch.randn(shape, generator=generator) for site in sites}, selected, stream)


def real(found, values):
    return values[found["attention_mask"].bool()]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lat_9_1_a_delta_of_zero_leaves_the_logits_bit_identical_with_hooks_installed(name):
    model, found = shared_model(name), batch()
    expected = logits(model, found)
    streams = [("layer", EVERYWHERE)] + ([("mlp", list(range(LAYERS)))] if name != "opt" else [])
    for stream, sites in streams:
        with perturbation(found, sites, 0.0, stream=stream).installed(model):
            assert torch.equal(logits(model, found), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_site_of_every_architecture_is_perturbed(name):
    model, found = shared_model(name), batch()
    expected = logits(model, found)
    seen = []
    for site in EVERYWHERE:
        with perturbation(found, [site]).installed(model):
            seen.append(logits(model, found))
        # The last layer acts only on its own token; with one below, later tokens see it through attention.
        assert (seen[-1] - expected)[:, 0].abs().max() > 1e-3, site
        later = (seen[-1] - expected)[found["labels"] != -100].abs().max()
        assert later == 0 if site == LAYERS - 1 else later > 1e-3, site
    for i, one in enumerate(seen):
        assert all(not torch.equal(one, other) for other in seen[:i])


def test_a_perturbation_is_added_to_the_output_of_its_layer(llama):
    found = batch()
    given = perturbation(found, [1])
    states = {}
    hook = decoder_layers(llama)[2].register_forward_pre_hook(
        lambda module, args, kwargs: states.__setitem__("in", args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    logits(llama, found)
    clean = states["in"]
    with given.installed(llama):
        logits(llama, found)
    hook.remove()
    expected = clean.clone()
    for row in range(4):
        for token in range(given.selected.shape[1]):
            if given.selected[row, token]:  # right padding: rank and index are the same
                expected[row, token] += given.deltas[1][row, token]
    assert torch.equal(states["in"], expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_lat_9_5_unselected_positions_and_pads_have_exactly_zero_effect_and_zero_gradient(name, side):
    model, found = shared_model(name), batch(side=side)
    given = perturbation(found, EVERYWHERE)
    with given.installed(model):
        expected = logits(model, found)
    louder = {
        site: torch.where(given.selected.unsqueeze(-1), delta, torch.tensor(1e4)).requires_grad_()
        for site, delta in given.deltas.items()
    }
    with Perturbation(louder, given.selected).installed(model):
        seen = logits(model, found)
    assert torch.equal(seen, expected)
    for gradient in torch.autograd.grad(real(found, seen).square().sum(), list(louder.values())):
        assert (gradient[~given.selected] == 0).all()
        assert (gradient[given.selected].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_lat_9_5_padding_itself_is_not_perturbed(name, side):
    model, found = shared_model(name), batch(side=side)
    pads = ~found["attention_mask"].bool()
    expected = logits(model, found)
    with perturbation(found, [LAYERS - 1], positions="all").installed(model):
        seen = logits(model, found)
    assert pads.sum() > 4
    assert torch.equal(seen[pads], expected[pads])
    assert ((seen - expected)[~pads].abs().amax(-1) > 1e-3).all()


def test_a_token_before_the_perturbation_does_not_see_it(llama):
    found = batch()
    given = perturbation(found, EVERYWHERE, positions="completion")
    expected = logits(llama, found)
    with given.installed(llama):
        seen = logits(llama, found)
    prompts = selected_ranks(found, "prompt")
    for row in range(4):
        length = int(prompts[row].sum())
        assert torch.equal(seen[row, :length], expected[row, :length])
        assert not torch.equal(seen[row, length], expected[row, length])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lat_9_5_a_perturbation_means_the_same_on_either_side_of_the_padding(name):
    model = shared_model(name)
    seen = {}
    for side in ("right", "left"):
        found = batch(side=side)
        position = ranks(found["attention_mask"])
        with perturbation(found, EVERYWHERE, 0.3).installed(model):
            seen[side] = real(found, logits(model, found, position_ids=position))
    torch.testing.assert_close(seen["left"], seen["right"], rtol=1e-4, atol=1e-4)


def test_a_prompt_is_perturbed_alike_before_another_completion(llama):
    made = rows()
    one = collate([(prompt, completion) for prompt, completion, _ in made])
    other = collate([(prompt, away) for prompt, _, away in made])
    with perturbation(one, EVERYWHERE).installed(llama):
        seen = [logits(llama, found) for found in (one, other)]
    for row, (prompt, _, _) in enumerate(made):
        torch.testing.assert_close(seen[0][row, : len(prompt)], seen[1][row, : len(prompt)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral"])
def test_lat_9_6_the_mlp_stream_is_the_layer_stream_where_the_mlp_is_added_last(name):
    model, found = shared_model(name), batch()
    seen = []
    for stream in ("layer", "mlp"):
        with perturbation(found, [0, 2], stream=stream).installed(model):
            seen.append(logits(model, found))
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-4)
    assert (seen[0] - logits(model, found)).abs().max() > 0.1


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_lat_9_6_the_mlp_stream_is_another_one_where_a_norm_follows_the_mlp(name):
    model, found = shared_model(name), batch()
    seen = []
    for stream in ("layer", "mlp"):
        with perturbation(found, [0, 2], stream=stream).installed(model):
            seen.append(logits(model, found))
    assert (seen[0] - seen[1]).abs().max() > 0.1


def test_the_mlp_stream_is_refused_where_there_is_no_mlp_and_leaves_no_hook():
    model = shared_model("opt")
    before = state_of(model)
    with (
        pytest.raises(UnsupportedModelError),
        perturbation(batch(), ["embedding", 1, 2], stream="mlp").installed(model),
    ):
        pass
    assert_unchanged(model, before)


def test_lat_9_11_layers_that_return_tuples_are_perturbed_like_layers_that_return_tensors():
    found = {"input_ids": torch.tensor([[0, 1, 0], [1, 1, 0]]), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    given = Perturbation(
        {site: torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(1)) for site in ("embedding", 0, 2)},
        torch.tensor([[True, True], [True, False]]),
    )
    seen = []
    for as_tuple in (False, True):
        toy = Toy(as_tuple=as_tuple, identity=False)
        clean = logits(toy, found)
        with given.installed(toy):
            seen.append(logits(toy, found))
        assert not torch.equal(seen[-1], clean)
    assert torch.equal(*seen)


def test_a_forward_pass_of_other_rows_is_refused_unless_the_perturbation_is_disabled(llama):
    found, other = batch(4), batch(3)
    given = perturbation(found, [1])
    expected = logits(llama, other)
    with given.installed(llama):
        with pytest.raises(RuntimeError, match="3 rows reached a perturbation of 4 rows"):
            logits(llama, other)
        with given.disabled():
            assert torch.equal(logits(llama, other), expected)
        assert not torch.equal(logits(llama, found)[:3], expected[:, : found["input_ids"].shape[1]])


def test_a_four_dimensional_mask_is_refused_since_ranks_cannot_be_read_off_it(llama):
    found = batch()
    width = found["input_ids"].shape[1]
    mask = torch.ones(width, width).tril().bool().expand(4, 1, -1, -1)
    with (
        perturbation(found, [1]).installed(llama),
        pytest.raises(RuntimeError, match="without a two-dimensional attention mask"),
    ):
        llama(input_ids=found["input_ids"], attention_mask=mask)


def test_a_forward_pass_without_a_mask_has_no_padding(llama):
    found = batch(1)
    given = perturbation(found, EVERYWHERE)
    with given.installed(llama):
        assert torch.equal(llama(input_ids=found["input_ids"]).logits, logits(llama, found))


def test_embeddings_may_come_in_place_of_tokens(llama):
    found = batch()
    with perturbation(found, EVERYWHERE).installed(llama):
        embedded = llama.get_input_embeddings()(found["input_ids"])
        seen = llama(inputs_embeds=embedded, attention_mask=found["attention_mask"]).logits
        assert torch.equal(seen, logits(llama, found))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lat_9_1_hooks_are_gone_after_the_block_also_after_an_exception(name):
    model, found = shared_model(name), batch()
    before = state_of(model)
    with perturbation(found, EVERYWHERE).installed(model):
        logits(model, found)
        assert state_of(model)["hooks"] != before["hooks"]
    assert_unchanged(model, before)
    with pytest.raises(KeyboardInterrupt), perturbation(found, EVERYWHERE).installed(model):
        raise KeyboardInterrupt
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "opt"])
@pytest.mark.parametrize("positions", ["prompt", "all"])
def test_generation_with_a_cache_on_left_padding_is_generation_without_one(name, positions):
    """A prompt is perturbed once, when the cache is filled; a generated token where its rank is perturbed."""
    model = shared_model(name)
    prompts = collate([(prompt, []) for prompt, _, _ in rows()], "left")
    given = perturbation(batch(), ["embedding", 1, 3], 0.5, positions)
    with given.installed(model):
        cached = model.generate(
            input_ids=prompts["input_ids"],
            attention_mask=prompts["attention_mask"],
            max_new_tokens=6,
            min_new_tokens=6,
        )
        tokens, mask = prompts["input_ids"], prompts["attention_mask"]
        for _ in range(6):
            scores = model(input_ids=tokens, attention_mask=mask, position_ids=ranks(mask), use_cache=False).logits[
                :, -1
            ]
            scores[:, model.config.eos_token_id] = float("-inf")  # as min_new_tokens
            tokens = torch.cat([tokens, scores.argmax(-1, keepdim=True)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    assert torch.equal(cached, tokens)
    clean = model.generate(
        input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"], max_new_tokens=6, min_new_tokens=6
    )
    assert not torch.equal(cached, clean)


# The cached prefix and the mode of an attack


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("last", [0, 2, 3])
def test_a_pass_resumed_from_the_cached_prefix_is_the_whole_pass_bit_for_bit(name, last):
    model, found = shared_model(name), batch(side="left")
    before = state_of(model)
    prefix = CachedPrefix(model, last)
    shares = []
    for scale in (0.5, 1.0, 2.0):
        given = perturbation(found, [last], scale)
        with given.installed(model), torch.no_grad():
            expected = logits(model, found)
            shares.append(prefix.share_run)
            with prefix.resume_from():
                assert torch.equal(logits(model, found), expected)
    assert shares == [1.0, 1 - (last + 1) / LAYERS, 1 - (last + 1) / LAYERS]
    assert_unchanged(model, before)


def test_a_resumed_pass_does_not_run_the_layers_below(llama):
    found, ran = batch(), []
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(decoder_layers(llama))
    ]
    prefix = CachedPrefix(llama, 1)
    for _ in range(2):
        with prefix.resume_from():
            logits(llama, found)
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1, 2, 3, 2, 3]


def test_a_forward_that_another_library_put_on_a_layer_comes_back(llama):
    layer = decoder_layers(llama)[0]
    theirs = layer.forward
    layer.forward = theirs
    try:
        prefix = CachedPrefix(llama, 2)
        for _ in range(2):
            with prefix.resume_from():
                logits(llama, batch())
        assert layer.__dict__["forward"] is theirs
    finally:
        del layer.__dict__["forward"]


def test_an_attack_runs_without_dropout_on_frozen_parameters_and_puts_both_back():
    model = lora(tiny_model(attention_dropout=0.3), dropout=0.3).train()
    before = state_of(model)
    found = batch()
    with attack_mode(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert torch.equal(logits(model, found), logits(model, found))
    assert_unchanged(model, before)
    with pytest.raises(KeyboardInterrupt), attack_mode(model):
        raise KeyboardInterrupt
    assert_unchanged(model, before)


def test_label_logits_of_a_perturbed_batch_are_those_of_the_full_logits(llama):
    found = batch(side="left")
    with perturbation(found, EVERYWHERE).installed(llama):
        kept = label_logits(llama, found["input_ids"], found["attention_mask"], found["labels"])
        full = logits(llama, found, position_ids=ranks(found["attention_mask"]))
    predicts = found["labels"][:, 1:] != -100
    torch.testing.assert_close(kept.logits, full[:, :-1][predicts], rtol=1e-6, atol=1e-6)


def test_one_row_of_a_perturbed_batch_is_that_row_alone(llama):
    found = batch()
    given = perturbation(found, EVERYWHERE)
    with given.installed(llama):
        together = logits(llama, found)
    for number in range(4):
        alone = row_of(found, number)
        one = Perturbation(
            {site: delta[number : number + 1] for site, delta in given.deltas.items()},
            given.selected[number : number + 1],
        )
        with one.installed(llama):
            seen = logits(llama, alone)
        torch.testing.assert_close(seen[0], together[number, : seen.shape[1]], rtol=1e-4, atol=1e-5)

"""Which tokens a threat touches, on either side of the padding."""

import pytest
import torch
from tiny import batch

from trl_robust.threat import ranks, selected_ranks, selected_tokens

# Two rows: four tokens with two of completion; three tokens with one of completion, padded.
RIGHT = {
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    "labels": torch.tensor([[-100, -100, 7, 8], [-100, -100, 9, -100]]),
    "last_user_span": torch.tensor([[1, 2], [0, 2]]),
}
LEFT = {
    "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]),
    "labels": torch.tensor([[-100, -100, 7, 8], [-100, -100, -100, 9]]),
    "last_user_span": torch.tensor([[1, 2], [0, 2]]),
}
EXPECTED = {  # right-padded tokens, left-padded tokens, ranks
    "prompt": ([[1, 1, 0, 0], [1, 1, 0, 0]], [[1, 1, 0, 0], [0, 1, 1, 0]], [[1, 1], [1, 1]]),
    "completion": ([[0, 0, 1, 1], [0, 0, 1, 0]], [[0, 0, 1, 1], [0, 0, 0, 1]], [[0, 0, 1, 1], [0, 0, 1, 0]]),
    "all": ([[1, 1, 1, 1], [1, 1, 1, 0]], [[1, 1, 1, 1], [0, 1, 1, 1]], [[1, 1, 1, 1], [1, 1, 1, 0]]),
    "last_user": ([[0, 1, 0, 0], [1, 1, 0, 0]], [[0, 1, 0, 0], [0, 1, 1, 0]], [[0, 1], [1, 1]]),
}


@pytest.mark.parametrize("positions", EXPECTED)
def test_the_selected_tokens_are_those_written_out(positions):
    right, left, by_rank = (torch.tensor(rows).bool() for rows in EXPECTED[positions])
    assert torch.equal(selected_tokens(RIGHT, positions), right)
    assert torch.equal(selected_tokens(LEFT, positions), left)
    assert torch.equal(selected_ranks(RIGHT, positions), by_rank)
    assert torch.equal(selected_ranks(LEFT, positions), by_rank)


@pytest.mark.parametrize("positions", ["prompt", "completion", "all"])
def test_ranks_do_not_depend_on_the_side_of_the_padding(positions):
    right, left = (selected_ranks(batch(4, side), positions) for side in ("right", "left"))
    assert torch.equal(right, left)


def test_ranks_count_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert torch.equal(ranks(mask)[mask.bool()], torch.tensor([0, 1, 2, 0, 1, 2]))
    assert (ranks(mask) >= 0).all()


def test_of_a_dialogue_the_prompt_ends_at_the_first_trained_turn():
    dialogue = {
        "attention_mask": torch.ones(1, 6, dtype=torch.long),
        "labels": torch.tensor([[-100, -100, 5, -100, -100, 6]]),
    }
    assert selected_tokens(dialogue, "prompt").tolist() == [[True, True, False, False, False, False]]
    assert selected_tokens(dialogue, "completion").tolist() == [[False, False, True, False, False, True]]


def test_a_completion_mask_serves_in_place_of_labels():
    preference = {
        "attention_mask": torch.tensor([[1, 1, 1, 0]]),
        "completion_mask": torch.tensor([[0, 0, 1, 0]]),
    }
    assert selected_tokens(preference, "prompt").tolist() == [[True, True, False, False]]
    assert selected_tokens(preference, "completion").tolist() == [[False, False, True, False]]


def test_nothing_selected_gives_no_ranks():
    found = {"attention_mask": torch.ones(2, 3, dtype=torch.long), "labels": torch.ones(2, 3, dtype=torch.long)}
    assert selected_ranks(found, "prompt").shape == (2, 0)


def test_the_last_user_turn_needs_its_span():
    with pytest.raises(ValueError, match="needs `last_user_span` in the batch"):
        selected_tokens(batch(), "last_user")


def test_unknown_positions_are_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"choose one of \['prompt', 'completion', 'all', 'last_user', 'all_user'\]"):
        selected_tokens(batch(), "prompts")

"""Distances between wordings, and what is made of them with the scores of the answers."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, make_tokenizer, shared_model

from trl_robust.attacks import Subject
from trl_robust.evaluation.answer_scores import RewardModel, exact_scores, likelihood_scores, read_scores
from trl_robust.evaluation.distance import (
    METRICS,
    RenderedSubject,
    Rendering,
    case_distances,
    default_layer,
    measure_case,
    query_span,
    representations,
    sites_of,
)
from trl_robust.evaluation.distance_statistics import (
    decoding_noise,
    judged_case,
    power_note,
    selection_free,
    site_statistics,
    summary,
)
from trl_robust.evaluation.wordings import Case

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10", "w11 w12"]


def subject_of(name: str = "llama", rendering: Rendering | None = None, batch_size: int = 3) -> RenderedSubject:
    plain = Subject(shared_model(name), make_tokenizer(), max_new_tokens=4, batch_size=batch_size, progress=False)
    return RenderedSubject.of(plain, rendering or Rendering())


def measured(to_original: list[float], *, index: int = 0, average: float = 1.0, metric: str = "l2") -> dict:
    """A case as `measure_case` gives it, made up."""
    return {
        "index": str(index),
        "num_tokens": [10 + i for i in range(len(to_original) + 1)],
        "edit_distance": [0.1 * i for i in range(len(to_original))],
        "last_tokens": ["x"] * (len(to_original) + 1),
        "distances": {
            "3": {metric: {"to_original": to_original, "average": average, "average_paraphrases": average + 1}}
        },
    }


def made_up_cases(distances: list[float], drops: list[float]) -> list[dict]:
    """Cases of two paraphrases, of which the second is the worst, at a given distance and with a given loss."""
    return [
        judged_case(measured([1.0, distance], index=number, average=2.0), [[5.0], [5.0], [5.0 - drop]])
        for number, (distance, drop) in enumerate(zip(distances, drops, strict=True))
    ]


# The measurement


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_on_either_side_gives_the_same_states(name):
    subject = subject_of(name)
    tokens = [subject.encode(prompt) for prompt in PROMPTS]
    sites = sites_of(subject.model, ["embedding", 1, 2])
    left, right = (representations(subject, tokens, sites, side=side) for side in ("left", "right"))
    alone = [representations(subject, [row], sites) for row in tokens]
    for site in sites:
        torch.testing.assert_close(left.states[site], right.states[site], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(left.token_norms[site], right.token_norms[site], atol=2e-5, rtol=1e-4)
        single = torch.cat([found.states[site] for found in alone])
        torch.testing.assert_close(right.states[site], single, atol=2e-5, rtol=1e-4)


def test_the_state_is_that_of_the_librarys_own_hidden_states_at_the_last_token():
    subject = subject_of()
    tokens = subject.encode("w1 w2 w3")
    with torch.no_grad():
        own = subject.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    found = representations(subject, [tokens], ["embedding", 0, 2])
    for site, number in (("embedding", 0), (0, 1), (2, 3)):
        torch.testing.assert_close(found.states[site][0], own[number][0, -1].double())


def test_a_mean_over_the_query_leaves_the_template_out():
    subject = subject_of()
    tokens, span = subject.encode("w1 w2 w3"), query_span(subject, "w1 w2 w3")
    assert subject.tokenizer.convert_ids_to_tokens(tokens[slice(*span)]) == ["w1", "w2", "w3"]
    assert subject.tokenizer.convert_ids_to_tokens(tokens) == ["<bos>", "<user>", "w1", "w2", "w3", "<asst>"]
    with torch.no_grad():
        own = subject.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    found = representations(subject, [tokens], [1], spans=[span])
    torch.testing.assert_close(found.states[1][0], own[2][0, 2:5].double().mean(0))


@pytest.mark.parametrize(("layers", "expected"), [(40, 19), (32, 15), (4, 1), (2, 0), (1, 0), (3, 1)])
def test_the_default_layer_is_after_block_half_the_depth(layers, expected, monkeypatch):
    monkeypatch.setattr("trl_robust.evaluation.distance.decoder_layers", lambda model: [None] * layers)
    assert default_layer(None) == expected


def test_distances_are_those_worked_by_hand():
    states = torch.tensor([[0.0, 3.0], [4.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    norms = torch.tensor([1.0, 3.0, 1.0], dtype=torch.float64)
    l2 = case_distances(states, norms, "l2")
    assert l2["to_original"] == pytest.approx([5, 2])
    assert l2["average"] == pytest.approx((5 + 2 + math.sqrt(17)) / 3)
    assert l2["average_paraphrases"] == pytest.approx(math.sqrt(17))
    assert case_distances(states, norms, "cosine")["to_original"] == pytest.approx([1, 0])
    # Divided by the mean of both wordings' norms: 2, 1 and 2.
    relative = case_distances(states, norms, "token_normalised")
    assert relative["to_original"] == pytest.approx([2.5, 2])
    assert relative["average"] == pytest.approx((2.5 + 2 + math.sqrt(17) / 2) / 3)


def test_eleven_wordings_have_55_pairs_and_45_without_the_original():
    states = torch.zeros(11, 2, dtype=torch.float64)
    states[0, 0] = 1.0  # ten pairs of distance 1, all others 0
    found = case_distances(states, torch.ones(11), "l2")
    assert found["average"] == pytest.approx(10 / 55) and found["average_paraphrases"] == 0


def test_a_case_is_measured_by_all_metrics_with_lengths_and_edits():
    case = Case("7", "w1 w2 w3", ("w1 w2 w4", "w5 w6", "w1 w2 w3"))
    found = measure_case(subject_of(), case, [1, 2])
    assert found["num_tokens"] == [6, 6, 5, 6] and found["edit_distance"] == pytest.approx([1 / 3, 1, 0])
    assert set(found["last_tokens"]) == {"<asst>"} and set(found["distances"]) == {"1", "2"}
    for by_metric in found["distances"].values():
        assert set(by_metric) == set(METRICS)
        for metric in METRICS:
            assert by_metric[metric]["to_original"][2] == pytest.approx(0, abs=1e-5)
            assert min(by_metric[metric]["to_original"][:2]) > 1e-3
    assert json.loads(json.dumps(found)) == found


def test_a_template_of_ones_own_replaces_the_chat_template_and_a_system_prompt_goes_into_it():
    own = subject_of(rendering=Rendering("w20 {prompt} w21"))
    assert own.tokenizer.convert_ids_to_tokens(own.encode("w1")) == ["w20", "w1", "w21"]
    assert query_span(own, "w1 w2") == (1, 3)
    system = subject_of(rendering=Rendering(system_prompt="w9"))
    assert system.tokenizer.convert_ids_to_tokens(system.encode("w1")) == ["<bos>", "w9", "<user>", "w1", "<asst>"]
    assert system.rendering.described(system)["system_prompt"] == "w9"
    with pytest.raises(ValueError, match="needs it once"):
        Rendering("no mark")


def test_a_prompt_over_the_limit_and_a_query_without_a_token_are_refused():
    subject = subject_of()
    with pytest.raises(ValueError, match="over the limit of 4"):
        measure_case(dataclasses.replace(subject, max_prompt_tokens=4), Case("0", "w1 w2", ("w1",)), [1])


# Scores


def test_the_exact_score_is_whether_the_answer_is_stated():
    case = Case("0", "w1", ("w2",), answer="w5")
    assert exact_scores(case, [["w5 w6", "w6"], ["w55"]]) == [[1, 0], [0]]


def test_the_likelihood_score_is_the_mean_log_probability_of_the_references_tokens():
    subject = subject_of()
    case = Case("0", "w1 w2", ("w3",), reference="w7 w8")
    found = likelihood_scores(subject, case)
    for wording, (score,) in zip(case.wordings, found, strict=True):
        prompt, reference = subject.encode(wording), subject.encode_opening("w7 w8")
        with torch.no_grad():
            logits = subject.model(torch.tensor([prompt + reference])).logits[0].log_softmax(-1)
        expected = sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(reference)) / 2
        assert score == pytest.approx(expected.item(), abs=1e-5)


def test_answers_to_every_wording_are_scored_against_the_original_question(monkeypatch):
    asked = []

    def rewards(self, query, answers):
        asked.append((query, list(answers)))
        return [float(number) for number in range(len(answers))]

    monkeypatch.setattr(RewardModel, "rewards", rewards)
    case = Case("0", "the original", ("another", "a third"))
    assert RewardModel(None, None).scores(case, [["a", "b"], ["c", "d"], ["e", "f"]]) == [[0, 1], [2, 3], [4, 5]]
    assert asked == [("the original", ["a", "b", "c", "d", "e", "f"])]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"index": 0, "scores": [1, 2, 3]}', "3 scores; case 0 has 2"),
        ('{"index": 0}', "no row of scores"),
        ('{"index": 0, "scores": [1, "a"]}', "no row of scores"),
        ('{"index": 0, "scores": [1, []]}', "empty list"),
        ('{"index": 1, "scores": [1, 2]}', "no scores for 1 of 1"),
    ],
)
def test_a_file_of_scores_that_does_not_fit_is_refused_by_line(line, said, tmp_path):
    (tmp_path / "s.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=said):
        read_scores(tmp_path / "s.jsonl", [Case("0", "a", ("b",))])


# What is made of them


def test_the_worst_wording_is_the_lowest_paraphrase_and_never_the_original():
    found = judged_case(measured([1, 2, 3]), [[0.0], [5.0], [2.0, 4.0], [3.0]])
    assert (found["worst"], found["worst_score"], found["drop"]) == (2, 3.0, -3.0)
    assert not found["included"] and found["tied"]


def test_cases_without_a_drop_are_excluded_and_counted():
    cases = made_up_cases([1, 2, 3, 4, 5, 6], [0.1, 0.2, 0.3, 0.4, 0.0, -1.0])
    found = summary(cases, ["3"], ["l2"], resamples=50)
    assert (found["n_scored"], found["n_included"], found["n_excluded"]) == (6, 4, 2)
    assert found["sites"]["3"]["l2"]["spearman"]["n"] == 4
    assert found["sites"]["3"]["l2"]["spearman"]["rho"] == pytest.approx(1)
    assert found["mean_drop"] == pytest.approx(0.25)


def test_a_hand_table_gives_its_exact_correlation_and_mean_distances():
    cases = made_up_cases([1, 2, 3, 4, 5], [0.2, 0.1, 0.4, 0.3, 0.5])
    found = site_statistics(cases, "3", "l2", resamples=50)
    assert found["spearman"]["rho"] == pytest.approx(0.8)
    assert found["worst_distance"] == pytest.approx(3) and found["average_distance"] == pytest.approx(2)
    assert found["worst_against_average"]["difference"] == pytest.approx(1)
    # Distances from the original are 1 and 1..5: their means 1, 1.5, .. 3.
    assert found["average_from_original"] == pytest.approx(2)
    assert site_statistics(cases, "3", "l2", average_over="paraphrases", resamples=50)[
        "average_distance"
    ] == pytest.approx(3)
    assert found["slope"] == pytest.approx(0.08) and found["intercept"] == pytest.approx(0.06)


def test_a_correlation_of_known_size_is_recovered_and_vanishes_when_distances_are_exchanged():
    generator = np.random.default_rng(0)
    pairs = generator.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], size=200)
    cases = made_up_cases((20 + pairs[:, 0]).tolist(), np.exp(pairs[:, 1]).tolist())
    found = site_statistics(cases, "3", "l2", resamples=300)
    low, high = found["spearman"]["interval"]
    assert low < 6 / math.pi * math.asin(0.3) < high and low > 0.4
    shuffled = found["shuffled"]
    assert abs(shuffled["mean"]) < 0.02 and shuffled["p"] < 0.01
    assert shuffled["interval"][1] < found["spearman"]["rho"]


def test_selection_alone_makes_no_correlation_over_all_pairs():
    generator = np.random.default_rng(1)
    cases = [
        judged_case(measured(generator.uniform(1, 2, 10).tolist(), index=i), generator.normal(size=(11, 1)).tolist())
        for i in range(100)
    ]
    found = selection_free(cases, "3", "l2", resamples=200)
    assert found["n"] == 1000 and found["n_cases"] == 100 and found["p"] is None
    assert found["interval"][0] < 0 < found["interval"][1]


def test_pairs_of_one_case_are_drawn_together():
    generator = np.random.default_rng(2)
    cases = []
    for index in range(30):  # everything that varies, varies between cases
        distance, loss = generator.normal(size=2)
        scores = [[0.0], *[[-loss + 0.01 * generator.normal()] for _ in range(10)]]
        cases.append(
            judged_case(measured((10 + distance + 0.01 * generator.normal(size=10)).tolist(), index=index), scores)
        )
    found = selection_free(cases, "3", "l2", resamples=200)
    width, naive = (np.diff(found[key])[0] for key in ("interval", "naive_interval"))
    assert width > 2 * naive


def test_decoding_noise_is_told_from_an_effect_of_the_wording():
    generator = np.random.default_rng(3)

    def cases(between: float) -> list[dict]:
        return [
            judged_case(
                measured([1.0] * 10, index=i),
                (between * generator.normal(size=(11, 1)) + generator.normal(size=(11, 5))).tolist(),
            )
            for i in range(200)
        ]

    luck, effect = decoding_noise(cases(0.0)), decoding_noise(cases(2.0))
    assert luck["within"] == pytest.approx(1, abs=0.05) and luck["between"] == pytest.approx(0, abs=0.03)
    assert luck["drop"] == pytest.approx(luck["drop_by_luck"], abs=0.12)
    assert effect["within"] == pytest.approx(1, abs=0.05) and effect["between"] == pytest.approx(4, abs=0.4)
    assert effect["drop"] > 1.3 * effect["drop_by_luck"] and effect["share_between"] == pytest.approx(0.8, abs=0.03)
    assert luck["enough"] and luck["responses"] == 5


def test_one_answer_a_wording_says_nothing_of_decoding_noise():
    assert decoding_noise(made_up_cases([1, 2], [1, 1])) is None
    few = judged_case(measured([1.0]), [[1.0, 2.0], [0.0, 1.0]])
    assert decoding_noise([few])["enough"] is False


def test_the_power_note_says_how_little_twenty_cases_show():
    assert power_note(95)["power_at_paper"] > 0.9
    assert 0.3 < power_note(20)["power_at_paper"] < 0.4
    assert "too few" in power_note(3)["note"]


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        judged_case(measured([1.0]), [[1.0], [float("nan")]])
    with pytest.raises(ValueError, match="1 scores for 2 wordings"):
        judged_case(measured([1.0]), [[1.0]])

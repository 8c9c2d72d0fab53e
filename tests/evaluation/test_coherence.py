"""Repetition against counting, likelihood and perplexity against the model's own logits."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import VOCABULARY, make_tokenizer, tiny_model

from trl_robust.attacks import AttackRow, Direct, Generation, Prefill, Subject
from trl_robust.evaluation import coherence, intact, perplexity
from trl_robust.evaluation.coherence import answer_likelihoods, ends_in_a_loop, repeated_ngrams, words

TEXTS = ["w1 w2 w3 w4", "w5 w6", "w7 w8 w9 w10 w11"]


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject(tiny_model("llama"), make_tokenizer(), max_new_tokens=4, batch_size=2, progress=False)


def answered(*texts: str, **changes) -> list[Generation]:
    return [Generation(AttackRow(str(i), "w1 w2"), "w1 w2", text, text, **changes) for i, text in enumerate(texts)]


class TestRepetition:
    @pytest.mark.parametrize(
        ("text", "n", "expected"),
        [
            ("a b a b a b", 2, 1 - 2 / 5),
            ("a b c d", 2, 0),
            ("no no no no", 1, 0.75),
            ("No, no", 1, 1 / 3),
            ("a b", 3, None),
            ("", 1, None),
        ],
    )
    def test_it_is_the_share_of_runs_that_stood_there_before(self, text, n, expected):
        assert repeated_ngrams(text, n) == (None if expected is None else pytest.approx(expected))

    @pytest.mark.parametrize(
        ("text", "loops"),
        [
            ("I will tell you. I will tell you. I will tell you.", True),
            ("First this. Then I will tell you. I will tell you. I will tell", False),
            ("First this. Then so it is. so it is. so it is. so", True),
            ("the the the the the the", True),
            ("no no no", False),
            ("a b c d e f g h", False),
            ("a a a a a a and then it went on", False),
            ("", False),
            ("\u662f\u7684\u662f\u7684\u662f\u7684", True),
        ],
    )
    def test_a_loop_is_a_stretch_said_three_times_at_the_end(self, text, loops):
        assert ends_in_a_loop(text) is loops

    @given(
        st.lists(st.sampled_from("abcde"), max_size=8),
        st.lists(st.sampled_from("abcde"), min_size=2, max_size=5),
        st.integers(3, 6),
        st.integers(0, 4),
    )
    def test_every_loop_is_found_whatever_stands_before_it_and_wherever_it_is_cut(self, before, unit, times, cut):
        assert ends_in_a_loop(" ".join([*before, *unit * times, *unit[: min(cut, len(unit))]]))

    @given(st.lists(st.integers(0, 10_000), max_size=30, unique=True))
    def test_words_that_are_all_different_repeat_nothing(self, numbers):
        text = " ".join(f"x{number}" for number in numbers)
        assert not ends_in_a_loop(text) and repeated_ngrams(text, 2) in (None, 0.0)

    def test_words_are_cut_at_punctuation_and_scripts_without_spaces_at_characters(self):
        assert words("It's 3.5, OK?") == ["it", "'", "s", "3", ".", "5", ",", "ok", "?"]
        assert words("A\u4f60\u597d b") == ["a", "\u4f60", "\u597d", "b"]


class TestShares:
    def test_they_are_means_over_answers_and_what_was_not_answered_is_counted(self, subject):
        generations = [
            *answered("w1 w2 w3 w4", "", " \n", "w1 w1 w1 w1 w1 w1", "w1"),
            *answered("w1", status="errored", reason="x"),
            *answered("w1", status="skipped", reason="y"),
        ]
        found = coherence(generations, subject=subject, n=2)
        assert (found["n"], found["n_errored"], found["n_skipped"]) == (5, 1, 1)
        assert found["empty"] == 0.4 and found["repeating"] == 0.2
        # Two have two words or more: all runs new, and four of five old. As many tokens as allowed (4) or more: two.
        assert (found["n_long_enough"], found["repeated_ngrams"]) == (2, pytest.approx(0.4))
        assert found["without_end"] == 0.4
        assert found["log_likelihood"] is None and found["n_log_likelihood"] == 0
        for name in ("empty", "repeating", "repeated_ngrams", "without_end"):
            low, high = found[f"{name}_interval"]
            assert 0 <= low <= found[name] <= high <= 1
        assert json.loads(json.dumps(found, allow_nan=False)) == found

    def test_nothing_to_measure_is_null(self, subject):
        found = coherence([], subject=subject, reference=subject)
        assert {value for key, value in found.items() if not key.startswith("n")} == {None}
        assert coherence(answered("w1"))["without_end"] is None
        with pytest.raises(ValueError, match="at least 1"):
            coherence([], n=0)

    def test_all_alike_is_no_certainty(self):
        assert coherence(answered(*["w1 w2"] * 5))["empty_interval"][1] > 0.3

    def test_an_answer_that_ran_to_the_limit_has_no_end(self, subject):
        model = tiny_model("llama")
        rows = [AttackRow("0", "w1 w2")]
        for token, expected in (("<eos>", 0), ("w3", 1)):
            number = subject.tokenizer.convert_tokens_to_ids(token)
            hook = model.lm_head.register_forward_hook(
                lambda module, args, out, number=number: out + 99 * torch.eye(VOCABULARY)[number]
            )
            speaker = Subject(model, subject.tokenizer, max_new_tokens=4, progress=False)
            assert coherence(Direct().run(speaker, rows), subject=speaker)["without_end"] == expected
            hook.remove()


class TestLikelihood:
    def test_it_is_the_mean_log_probability_of_the_answers_tokens_after_the_request(self, subject):
        generations = answered("w3 w4 w5", "w6", "w7 w8")
        found = answer_likelihoods(subject, generations)
        for generation, value in zip(generations, found, strict=True):
            prompt, answer = subject.encode("w1 w2"), subject.encode_opening(generation.continuation)
            with torch.no_grad():
                logits = subject.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            expected = [float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]
            assert value == pytest.approx(sum(expected) / len(expected), rel=1e-4)
        summary = coherence(generations, reference=subject)
        assert summary["log_likelihood"] == pytest.approx(sum(found) / 3)
        assert summary["n_log_likelihood"] == 3
        assert summary["log_likelihood_interval"][0] <= summary["log_likelihood"]

    def test_a_prefill_is_context_and_not_judged(self, subject):
        (generation,) = Prefill().run(subject, [AttackRow("0", "w1 w2", "w3 w4")])
        prefilled = Generation(generation.row, "w1 w2", "w3 w4 w5 w6", "w5 w6")
        prompt, answer = subject.encode("w1 w2", "w3 w4"), subject.encode_opening("w5 w6")
        with torch.no_grad():
            logits = subject.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        expected = float(logits[len(prompt) - 1, answer[0]] + logits[len(prompt), answer[1]]) / 2
        assert answer_likelihoods(subject, [prefilled]) == [pytest.approx(expected, rel=1e-4)]
        assert generation.response.startswith("w3 w4")

    def test_what_has_no_token_or_does_not_fit_has_none(self, subject):
        assert answer_likelihoods(subject, answered("", "w1 " * 200)) == [None, None]
        refusing = Subject(subject.model, make_tokenizer(), progress=False)
        refusing.tokenizer.chat_template = "{{ raise_exception('no') }}"
        assert answer_likelihoods(refusing, answered("w1")) == [None]

    def test_what_a_model_says_greedily_is_likelier_to_it_than_to_another(self, subject):
        generations = Direct().run(subject, [AttackRow(str(i), text) for i, text in enumerate(TEXTS)])
        other = Subject(tiny_model("llama", seed=5), subject.tokenizer, progress=False)
        own, strange = (coherence(generations, reference=one)["log_likelihood"] for one in (subject, other))
        assert own > strange


class TestPerplexity:
    def test_it_is_the_exponential_of_the_mean_loss_over_all_tokens(self, subject):
        found = perplexity(subject, [*TEXTS, "w1", ""])
        losses = []
        for text in TEXTS:
            tokens = torch.tensor([subject.tokenizer(text)["input_ids"]])
            with torch.no_grad():
                logits = subject.model(tokens).logits[0].log_softmax(-1)
            losses += [-float(logits[i, token]) for i, token in enumerate(tokens[0, 1:].tolist())]
        assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
        assert (found["n"], found["n_tokens"], found["n_left_out"]) == (3, len(losses), 2)
        assert found["interval"][0] <= found["perplexity"] <= found["interval"][1]
        assert found["log_likelihood"] == pytest.approx(-math.log(found["perplexity"]))
        json.dumps(found, allow_nan=False)

    def test_a_model_that_knows_nothing_has_the_size_of_the_vocabulary(self):
        model = tiny_model("llama")
        torch.nn.init.zeros_(model.lm_head.weight)
        found = perplexity(Subject(model, make_tokenizer(), progress=False), TEXTS)
        assert found["perplexity"] == pytest.approx(VOCABULARY, rel=1e-5)

    def test_it_does_not_depend_on_the_batches(self, subject, monkeypatch):
        whole = perplexity(subject, TEXTS)["perplexity"]
        monkeypatch.setattr(sys.modules[perplexity.__module__], "BATCH_TOKENS", 1)
        assert perplexity(subject, TEXTS)["perplexity"] == pytest.approx(whole, rel=1e-5)

    def test_a_long_text_is_cut_into_pieces(self, subject):
        short = Subject(subject.model, subject.tokenizer, max_prompt_tokens=3, max_new_tokens=1, progress=False)
        text = "w1 w2 w3 w4 w5 w6 w7 w8 w9"
        parts = ["w1 w2 w3 w4", "w5 w6 w7 w8"]
        found = perplexity(short, [text])
        assert found["perplexity"] == pytest.approx(perplexity(subject, parts)["perplexity"], rel=1e-5)
        assert (found["n"], found["n_tokens"], found["interval"]) == (1, 6, None)

    def test_a_destroyed_model_is_known_as_one_and_one_that_fails_is_left_out(self, subject, monkeypatch):
        model = tiny_model("llama")
        torch.nn.init.constant_(model.lm_head.weight, float("nan"))
        found = perplexity(Subject(model, make_tokenizer(), progress=False), TEXTS)
        assert found["perplexity"] is None and found["finite"] is False and found["n"] == 3
        assert intact([(1, 0.9)], [math.inf], 10.0, higher_is_better=False).destroyed == [1]

        def failing(*_, **__):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(subject.model, "forward", failing)
        found = perplexity(subject, TEXTS)
        assert (found["perplexity"], found["n"], found["n_left_out"]) == (None, 0, 3)

"""PSS, agreement and POSIX against numbers worked out directly, and sampling that does not depend on the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import WORDS, shared_model
from transformers import LogitsProcessor

from trl_robust.attacks import Subject
from trl_robust.evaluation import answer_agreement, posix, prompt_sensitivity
from trl_robust.evaluation import consistency as module
from trl_robust.evaluation.sampling import Request, Sampling, _Nucleus, sample_answers

WORDINGS = [["w1 w2", "w3 w4 w5", "w6"], ["w7", "w8 w9 w10 w11", "w12 w13"]]
ANSWERS = [["w14 w15", "w16", "w17 w18 w19"], ["w20", "w21 w22", "w23 w24 w25 w26"]]


def subject(tokenizer, name="llama", **settings) -> Subject:
    return Subject(shared_model(name), tokenizer, progress=False, **settings)


class TestSensitivity:
    def test_by_hand(self):
        # |0 - 1|, |0 - 0.5|, |1 - 0.5| have the mean 2/3; the second case is robust.
        found = prompt_sensitivity([[0.0, 1.0, 0.5], [0.3, 0.35, None]])
        assert found["pss"] == pytest.approx((2 / 3 + 0.05) / 2)
        assert (found["robust_share"], found["n_missing"]) == (0.5, 1)


class TestAgreement:
    def test_by_hand(self):
        found = answer_agreement([["Oslo.", "oslo", " OSLO!", "Bergen"], ["a", "b", None, "c"]])
        # Of six pairs three agree; of three pairs none.
        assert found["agreement"] == pytest.approx((3 / 6 + 0) / 2)
        assert found["majority"] == pytest.approx((3 / 4 + 1 / 3) / 2)
        assert found["n_missing"] == 1

    def test_a_case_with_one_answer_says_nothing(self):
        found = answer_agreement([["a", None], [None, None]])
        assert found["agreement"] is None and found["n_excluded"] == 2


def direct(model, tokenizer, wordings, answers) -> float:
    """POSIX as it is written: a double loop over one unpadded row at a time."""
    total, n = 0.0, len(wordings)
    replies = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]

    @torch.no_grad()
    def log_prob(wording, reply):
        turns = [{"role": "user", "content": wording}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        log_probs = model(torch.tensor([prompt + reply])).logits[0].double().log_softmax(-1)
        return sum(log_probs[len(prompt) - 1 + k, token].item() for k, token in enumerate(reply))

    for i in range(n):
        for j in range(n):
            change = log_prob(wordings[i], replies[j]) - log_prob(wordings[j], replies[j])
            total += abs(change) / len(replies[j])
    return total / (n * (n - 1))


class TestPosix:
    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_equals_the_double_loop(self, name, batch_size, tokenizer):
        found = posix(subject(tokenizer, name, batch_size=batch_size), WORDINGS, ANSWERS)
        expected = [direct(shared_model(name), tokenizer, *case) for case in zip(WORDINGS, ANSWERS, strict=True)]
        assert found["cases"] == pytest.approx(expected, rel=1e-4)
        assert found["posix"] == pytest.approx(np.mean(expected), rel=1e-4)

    def test_few_answer_tokens_at_a_time_change_nothing(self, tokenizer, monkeypatch):
        expected = posix(subject(tokenizer), WORDINGS, ANSWERS)["posix"]
        monkeypatch.setattr(module, "ANSWER_TOKENS", 2)
        assert posix(subject(tokenizer), WORDINGS, ANSWERS)["posix"] == pytest.approx(expected, rel=1e-5)

    def test_equal_wordings_have_none(self, tokenizer):
        assert posix(subject(tokenizer), [["w1 w2"] * 3], [ANSWERS[0]])["posix"] == pytest.approx(0, abs=1e-6)

    def test_missing_and_empty_answers_are_counted_and_left_out(self, tokenizer):
        wordings, answers = [[*WORDINGS[0], "w30"], ["w1", "w2"]], [[*ANSWERS[0], ""], ["w3", None]]
        found = posix(subject(tokenizer), wordings, answers)
        assert found["posix"] == pytest.approx(posix(subject(tokenizer), WORDINGS[:1], ANSWERS[:1])["posix"], rel=1e-5)
        assert (found["n_cases"], found["n_excluded"], found["n_missing"]) == (1, 1, 2)

    def test_different_shapes_are_refused(self, tokenizer):
        with pytest.raises(ValueError, match="differ in shape"):
            posix(subject(tokenizer), WORDINGS, ANSWERS[:1])


class TestSampling:
    REQUESTS = tuple(Request(f"case/{number}", " ".join(WORDS[: 1 + number % 4])) for number in range(7))

    def drawn(self, tokenizer, batch_size, sampling, requests=REQUESTS) -> dict[str, str | None]:
        found = []
        subject_ = subject(tokenizer, batch_size=batch_size, max_new_tokens=5)
        sample_answers(subject_, requests, sampling, found.extend, "")
        return {answer.key: answer.response for answer in found}

    def test_an_answer_depends_on_its_seed_and_key_and_not_on_the_batch(self, tokenizer):
        alone = self.drawn(tokenizer, 1, Sampling())
        assert self.drawn(tokenizer, 7, Sampling()) == alone
        assert self.drawn(tokenizer, 3, Sampling(), self.REQUESTS[::-1]) == alone
        assert self.drawn(tokenizer, 7, Sampling(seed=1)) != alone
        assert len(set(alone.values())) > 1

    def test_one_prompt_asked_several_times_gets_several_answers(self, tokenizer):
        # What the same-prompt null lives on.
        requests = [Request(f"case/0/{sample}", "w1 w2") for sample in range(6)]
        assert len(set(self.drawn(tokenizer, 3, Sampling(), requests).values())) > 3

    def test_the_nucleus_has_the_right_shares(self):
        logits = torch.tensor([0.3, 0.05, 0.5, 0.15]).log()
        uniforms = ((torch.arange(20_000) + 0.5) / 20_000)[:, None]
        nucleus: LogitsProcessor = _Nucleus(uniforms, 3, Sampling(top_p=0.9))
        chosen = nucleus(torch.zeros(20_000, 3, dtype=torch.long), logits.expand(20_000, 4)).argmax(-1)
        # 0.5 + 0.3 do not reach 0.9, so the third stays in; the last goes.
        shares = torch.bincount(chosen, minlength=4) / 20_000
        torch.testing.assert_close(shares, torch.tensor([0.3, 0, 0.5, 0.15]) / 0.95, atol=1e-4, rtol=0)

    def test_temperature_zero_is_greedy(self, tokenizer):
        prompt = torch.tensor([subject(tokenizer).encode(WORDS[0])])
        expected = shared_model("llama").generate(prompt, max_new_tokens=5, do_sample=False)[0, prompt.shape[1] :]
        found = self.drawn(tokenizer, 7, Sampling(temperature=0.0))
        assert found["case/0"] == tokenizer.decode(expected, skip_special_tokens=True)

    def test_what_cannot_be_answered_is_errored_or_skipped_with_a_reason(self, tokenizer, monkeypatch):
        found = []
        subject_ = subject(tokenizer, max_new_tokens=2, max_prompt_tokens=5)
        # Out of memory, for one batch.
        monkeypatch.setattr("trl_robust.evaluation.sampling._generate", _raise)
        requests = [Request("short", "w1"), Request("long", "w1 w2 w3 w4 w5 w6")]
        sample_answers(subject_, requests, Sampling(), found.extend, "")
        assert {answer.key: answer.status for answer in found} == {"long": "skipped", "short": "errored"}
        assert all(answer.reason and answer.response is None for answer in found)


def _raise(*_):
    raise torch.OutOfMemoryError("no memory")

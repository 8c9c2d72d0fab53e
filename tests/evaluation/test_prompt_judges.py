"""Judges: their formulas against direct computation, a faked endpoint, and AlpacaEval's files."""

from __future__ import annotations

import copy
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, make_tokenizer, tiny_model
from transformers import AutoModelForSequenceClassification, LlamaConfig

from trl_robust.attacks import Subject
from trl_robust.data import DataError
from trl_robust.evaluation.alpaca import (
    length_controlled_win_rate,
    read_annotations,
    read_outputs,
    write_outputs,
)
from trl_robust.evaluation.llm_judges import SYSTEM, EndpointJudge, LLMJudge, judge_prompt, preference_of
from trl_robust.evaluation.preference_judges import AnnotationsJudge, ExactJudge, JudgedAnswer, RewardJudge

ANSWERS = [
    JudgedAnswer("w1 w2", "w3 w4 w5", "w4", "w6"),
    JudgedAnswer("w7", "w8", "w4", "w9 w10 w11 w12"),
    JudgedAnswer("w7", "", "w4", "w9 w10 w11 w12"),
]


def test_exact_is_right_or_wrong_and_errored_without_an_answer():
    found = ExactJudge().judge([*ANSWERS[:2], JudgedAnswer("w1", "w2")])
    assert [verdict.score for verdict in found] == [1.0, 0.0, None]
    assert found[2].status == "errored" and "no `answer`" in found[2].reason


def reward_model(num_labels: int = 1):
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, num_labels=num_labels, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_config(config).eval()


class TestReward:
    @pytest.mark.parametrize("chat", [True, False])
    def test_the_preference_is_the_sigmoid_of_the_difference_over_tau(self, chat):
        tokenizer = make_tokenizer()
        if not chat:
            tokenizer.chat_template = None
        judge = RewardJudge(reward_model(), tokenizer, tau=0.3, batch_size=2)
        for answer, verdict in zip(ANSWERS, judge.judge(ANSWERS), strict=True):
            rewards = []
            for text in (answer.response, answer.reference):
                turns = [{"role": "user", "content": answer.question}, {"role": "assistant", "content": text}]
                tokens = (
                    tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
                    if chat
                    else tokenizer(answer.question, text)["input_ids"]
                )
                rewards.append(judge.model(torch.tensor([tokens])).logits.item())
            assert verdict.score == pytest.approx(1 / (1 + math.exp(-(rewards[0] - rewards[1]) / 0.3)), rel=1e-3)

    def test_it_is_even_where_the_answers_are_equal_and_a_reference_is_scored_once(self, monkeypatch):
        judge, rows = RewardJudge(reward_model(), make_tokenizer()), []
        rewards = judge._rewards
        monkeypatch.setattr(judge, "_rewards", lambda batch: rows.extend(batch) or rewards(batch))
        assert judge.judge([JudgedAnswer("w1", "w2", None, "w2")])[0].score == 0.5
        judge.judge([JudgedAnswer("w1", "w3", None, "w2")])
        assert len(rows) == 2

    def test_what_has_no_reward_is_errored(self):
        model = reward_model()
        judge = RewardJudge(model, make_tokenizer())
        found = judge.judge([JudgedAnswer("w1", "w2"), JudgedAnswer("w1", "w2 " * 70, None, "w3")])
        assert [verdict.score for verdict in found] == [None, None]
        assert "reference" in found[0].reason and "over its limit of 64" in found[1].reason
        torch.nn.init.constant_(model.score.weight, float("nan"))
        assert "nan" in RewardJudge(model, make_tokenizer()).judge(ANSWERS)[0].reason

    def test_a_classifier_of_several_labels_is_refused(self, tmp_path):
        reward_model(3).save_pretrained(tmp_path)
        make_tokenizer().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="3 labels"):
            RewardJudge.load(str(tmp_path))
        with pytest.raises(ValueError, match="tau"):
            RewardJudge(reward_model(), make_tokenizer(), tau=0)


class TestProtocol:
    def test_the_preference_is_the_share_of_the_models_name(self):
        top = [("m", math.log(0.6)), ("M", math.log(0.2)), ("x", math.log(0.1))]
        assert preference_of(top, "m").score == pytest.approx(0.75)
        assert preference_of(top, "M").score == pytest.approx(0.25)

    def test_a_name_that_is_not_among_the_tokens_counts_zero_and_none_is_errored(self):
        assert preference_of([("m", -0.1)], "M").score == 0
        assert preference_of([(" M", -0.1)], "M").score == 1
        found = preference_of([("yes", -0.1), ("no", -2.0)], "m")
        assert found.score is None and "'yes'" in found.reason

    def test_the_judge_sees_the_original_question_and_both_answers_in_an_order_that_the_seed_settles(self):
        answer = JudgedAnswer("Why {so}?", "ours {0}", None, "theirs")
        names = []
        for seed in range(200):
            text, ours = judge_prompt(answer, seed)
            assert judge_prompt(answer, seed) == (text, ours)
            assert "Why {so}?" in text and f'<answer name="{ours}">\nours {{0}}\n' in text and "\ntheirs\n" in text
            names.append(ours)
        assert 70 < names.count("m") < 130

    def test_equal_answers_are_even_on_average_over_orders(self):
        # A judge that always prefers what comes first, with probability 0.9.
        top = [("m", math.log(0.9)), ("M", math.log(0.1))]
        scores = [
            preference_of(top, judge_prompt(JudgedAnswer("q", f"{i}", None, "r"), 0)[1]).score for i in range(400)
        ]
        assert np.mean(scores) == pytest.approx(0.5, abs=0.07)


def llm_judge(bias, batch_size=2, **changes) -> LLMJudge:
    """A judge whose two names get a bonus, so that they are among its most likely tokens."""
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.add_tokens(["m", "M"])
    model = tiny_model("llama", vocab_size=VOCABULARY + 2, max_position_embeddings=512, **changes)

    def favour(module, inputs, logits):
        for token, bonus in bias.items():
            logits[..., tokenizer.convert_tokens_to_ids(token)] += bonus
        return logits

    model.lm_head.register_forward_hook(favour)
    return LLMJudge(Subject(model, tokenizer, batch_size=batch_size, progress=False), seed=3, source="tiny")


class TestLLM:
    def test_the_preference_equals_the_softmax_of_one_unpadded_prompt(self):
        judge = llm_judge({"m": 30.0, "M": 29.5})
        for answer, verdict in zip(ANSWERS, judge.judge(ANSWERS), strict=True):
            text, ours = judge_prompt(answer, 3)
            turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
            tokens = judge.subject.encode(turns)
            logits = judge.subject.model(torch.tensor([tokens])).logits[0, -1]
            ids = judge.subject.tokenizer.convert_tokens_to_ids(["m", "M"])
            expected = logits[ids].softmax(-1)[0 if ours == "m" else 1]
            assert verdict.score == pytest.approx(expected.item(), rel=1e-4)

    def test_one_name_alone_is_certain_and_none_is_errored(self):
        for answer, verdict in zip(ANSWERS, llm_judge({"m": 30.0, "M": -60.0}).judge(ANSWERS), strict=True):
            assert verdict.score == float(judge_prompt(answer, 3)[1] == "m")
        found = llm_judge({"m": -60.0, "M": -60.0}).judge(ANSWERS)
        assert all(verdict.status == "errored" and "neither" in verdict.reason for verdict in found)

    def test_a_template_without_a_system_turn_and_no_template_do(self):
        judge = llm_judge({"m": 30.0, "M": 29.5})
        judge.subject.tokenizer.chat_template = (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
            + judge.subject.tokenizer.chat_template
        )
        assert judge.judge(ANSWERS)[0].status == "scored"
        judge.subject.tokenizer.chat_template = None
        assert judge.judge(ANSWERS)[0].status == "scored"

    def test_a_prompt_that_does_not_fit_is_errored_and_not_cut(self):
        judge = llm_judge({"m": 30.0, "M": 29.5})
        judge.subject.max_prompt_tokens = 20
        assert all(verdict.status == "errored" and "over 20" in verdict.reason for verdict in judge.judge(ANSWERS))


class Endpoint:
    """A server that answers as `reply` says: a status and a body for the number of the call and what was sent."""

    def __init__(self, reply) -> None:
        outer = self
        self.seen: list[tuple[dict, dict]] = []
        self.reply = reply

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append((dict(self.headers), body))
                status, content = outer.reply(len(outer.seen), body)
                try:
                    self.send_response(status)
                    if status == 302:
                        self.send_header("Location", "http://127.0.0.1:1/elsewhere")
                    self.end_headers()
                    self.wfile.write(content)
                except BrokenPipeError:  # the caller did not wait
                    pass

            def log_message(self, *_) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def judge(self, **settings) -> EndpointJudge:
        url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        return EndpointJudge(url, "some-model", **{"pause": 0.0, "retries": 2, "timeout": 5.0, **settings})


def completion(m: float, big_m: float) -> bytes:
    top = [{"token": "m", "logprob": math.log(m)}, {"token": "M", "logprob": math.log(big_m)}]
    return json.dumps({"choices": [{"logprobs": {"content": [{"token": "m", "top_logprobs": top}]}}]}).encode()


class TestEndpoint:
    def test_a_working_one_is_asked_by_the_protocol_and_scored(self, monkeypatch):
        monkeypatch.setenv("MY_KEY", "secret-value")
        with Endpoint(lambda *_: (200, completion(0.6, 0.2))) as endpoint:
            judge = endpoint.judge(key_variable="MY_KEY", seed=3)
            found = judge.judge(ANSWERS)
        for answer, verdict in zip(ANSWERS, found, strict=True):
            assert verdict.score == pytest.approx(0.75 if judge_prompt(answer, 3)[1] == "m" else 0.25)
        headers, body = endpoint.seen[0]
        assert headers["Authorization"] == "Bearer secret-value"
        assert (body["model"], body["max_tokens"], body["top_logprobs"]) == ("some-model", 1, 5)
        assert body["messages"][0]["role"] == "system" and body["logprobs"] is True
        assert "secret-value" not in json.dumps(judge.settings())

    def test_without_a_variable_no_key_is_sent(self):
        with Endpoint(lambda *_: (200, completion(0.6, 0.2))) as endpoint:
            endpoint.judge().judge(ANSWERS[:1])
        assert "Authorization" not in endpoint.seen[0][0]

    def test_one_that_recovers_is_tried_again(self):
        with Endpoint(lambda call, _: (503, b"busy") if call < 3 else (200, completion(0.5, 0.5))) as endpoint:
            assert endpoint.judge().judge(ANSWERS[:1])[0].score == 0.5
        assert len(endpoint.seen) == 3

    @pytest.mark.parametrize(
        ("reply", "said", "calls"),
        [
            ((500, b"down"), "HTTP 500 down", 3),
            ((429, b"slow down"), "HTTP 429", 3),
            ((401, b"bad key secret-value"), "HTTP 401 bad key [key]", 1),
            ((404, b""), "HTTP 404", 1),
            ((302, b""), "HTTP 302", 1),
            ((200, b"not json"), "no log-probabilities: not json", 3),
            ((200, b'{"choices": [{"message": {"content": "m"}, "logprobs": null}]}'), "no log-probabilities", 3),
            ((200, completion(0.5, 0.5).replace(b'"m"', b'"x"').replace(b'"M"', b'"y"')), "neither m nor M", 1),
        ],
        ids=lambda value: str(value)[:20],
    )
    def test_what_fails_is_errored_and_never_scored(self, reply, said, calls, monkeypatch):
        monkeypatch.setenv("MY_KEY", "secret-value")
        with Endpoint(lambda *_: reply) as endpoint:
            (found,) = endpoint.judge(key_variable="MY_KEY").judge(ANSWERS[:1])
        assert found.score is None and found.status == "errored"
        assert said in found.reason and "secret-value" not in found.reason
        assert len(endpoint.seen) == calls

    def test_one_that_is_slow_or_not_there_is_errored(self):
        waited = threading.Event()
        with Endpoint(lambda *_: (waited.wait(2), (200, completion(0.5, 0.5)))[1]) as endpoint:
            judge = endpoint.judge(timeout=0.1, retries=1)
            (found,) = judge.judge(ANSWERS[:1])
            waited.set()
        assert found.score is None and "timed out" in found.reason.lower()
        (found,) = judge.judge(ANSWERS[:1])  # the server is gone
        assert found.score is None and "endpoint" in found.reason

    def test_wrong_settings_are_refused_and_a_key_is_not_repeated(self):
        with pytest.raises(ValueError, match="no address"):
            EndpointJudge("localhost:8000", "m")
        with pytest.raises(ValueError, match="not the key") as error:
            EndpointJudge("http://localhost/v1", "m", key_variable="sk-1234")
        assert "sk-1234" not in str(error.value)


class TestAlpacaFiles:
    QUESTIONS = ("What is it?", "Which one?")
    RESPONSES = (("a", "b", None), ("c", "d", "é"))

    def test_outputs_are_read_back_and_the_question_is_the_original_in_every_file(self, tmp_path):
        paths = write_outputs(tmp_path, "../my model", self.QUESTIONS, self.RESPONSES)
        names = ["wording_00.json", "wording_01.json", "wording_02.json"]
        assert [path.name for path in paths] == names
        assert all(path.parent.parent == tmp_path for path in paths)
        assert read_outputs(paths[1]) == dict(zip(self.QUESTIONS, ("b", "d"), strict=True))
        assert json.loads(paths[2].read_text()) == [
            {"instruction": "Which one?", "output": "é", "generator": "../my model"}
        ]

    def test_annotations_of_our_outputs_become_scores(self, tmp_path):
        preferences = iter([1.0, 2.0, 1.25, 0, None])
        for path in write_outputs(tmp_path / "out", "mine", self.QUESTIONS, self.RESPONSES):
            annotated = [
                {
                    "instruction": row["instruction"], "output_1": "base", "generator_1": "baseline",
                    "output_2": row["output"], "generator_2": row["generator"], "annotator": "some_judge",
                    "preference": next(preferences),
                }
                for row in json.loads(path.read_text())
            ]  # fmt: skip
            place = tmp_path / "annotations" / path.stem
            place.mkdir(parents=True)
            (place / "annotations.json").write_text(json.dumps(annotated))
        found, annotators = read_annotations(tmp_path / "annotations")
        assert annotators == ["some_judge"]
        judge = AnnotationsJudge(found)
        asked = [
            JudgedAnswer(question, text)
            for question, case in zip(self.QUESTIONS, self.RESPONSES, strict=True)
            for text in case
            if text is not None
        ]
        found = judge.judge([*asked, JudgedAnswer("What is it?", "another answer")])
        # a, b, c, d, é: 1 is the baseline's, 2 the model's, 0 a draw, null was not judged.
        assert [verdict.score for verdict in found] == [0.0, 0.25, 1.0, 0.5, None, None]
        assert "no line" in found[-1].reason

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("{", "not JSON"),
            ('{"a": 1}', "list of objects"),
            ('[{"instruction": "q"}]', "needs `instruction`, `output_2`"),
            ('[{"instruction": "q", "output_2": "a", "preference": 3}]', "preference 3"),
        ],
    )
    def test_other_files_are_refused(self, content, said, tmp_path):
        path = tmp_path / "annotations.json"
        path.write_text(content)
        with pytest.raises(DataError, match=said):
            read_annotations(path)
        with pytest.raises(DataError, match="no file"):
            read_annotations(tmp_path / "none.json")


class TestLengthControlled:
    def test_it_reads_the_regression_at_equal_length(self):
        generator = np.random.default_rng(0)
        lengths, references = generator.integers(0, 900, 200), generator.integers(0, 900, 200)
        difference = lengths - references
        z = 0.4 + 1.5 * np.tanh(difference / difference.std(ddof=1))
        found = length_controlled_win_rate(1 / (1 + np.exp(-z)), lengths, references)
        assert found["length_controlled_win_rate"] == pytest.approx(100 / (1 + math.exp(-0.4)), abs=1e-3)
        assert found["length_coefficient"] == pytest.approx(1.5, abs=1e-3)
        assert found["instruction_difficulty"] is False

    def test_a_judge_of_length_alone_is_even(self):
        found = length_controlled_win_rate([1, 1, 0, 0], [20, 30, 1, 2], [1, 11, 20, 21])
        assert found["win_rate"] == 50 and found["length_controlled_win_rate"] == pytest.approx(50, abs=0.1)

    def test_equal_lengths_and_missing_scores(self):
        found = length_controlled_win_rate([1.0, 0.5, None], [3, 3, 3], [3, 3, 9])
        assert (found["win_rate"], found["length_controlled_win_rate"], found["n_missing"]) == (75, 75, 1)
        assert length_controlled_win_rate([None], [1], [1])["win_rate"] is None
        # Always longer by the same: nothing says what equal length would give.
        assert length_controlled_win_rate([1.0, 0.5], [5, 5], [3, 3])["length_controlled_win_rate"] is None
        assert length_controlled_win_rate([1.0] * 9, list(range(9)), [0] * 9)["length_controlled_win_rate"] > 99

"""PAIR: the loop with a scripted attacker, and the two attackers that are shipped."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from tiny import WORDS, make_tokenizer, tiny_model

from trl_robust.attacks import AttackRow, Generation, Subject
from trl_robust.attacks.pair import PAIR, EndpointAttacker, LocalAttacker

ROWS = [
    AttackRow("a", "goal one", "sure", "secret"),
    AttackRow("b", [{"role": "user", "content": "goal two"}], "sure"),
]


class Target:
    """Answers as a table says, and refuses everything else."""

    def __init__(self, **answers: str) -> None:
        self.answers, self.asked = answers, []

    def remembered(self, what, do):
        return do()

    def track(self, steps, description):
        return steps

    def answer(self, rows, description):
        found = []
        for row in rows:
            text = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
            self.asked.append(text)
            said = self.answers.get(text, "Sorry, no")
            if said == "fail":
                found.append(Generation(row, text, status="errored", reason="out of memory"))
            else:
                found.append(Generation(row, text, said, said))
        return found


class Scripted:
    """Numbers its requests by goal and try; keeps what it was told."""

    def __init__(self, reply=None) -> None:
        self.told, self.make = [], reply

    def reply(self, messages):
        self.told += [[dict(message) for message in conversation] for conversation in messages]
        return [self.make(conversation) if self.make else self.numbered(conversation) for conversation in messages]

    @staticmethod
    def numbered(conversation):
        goal = "one" if "goal one" in conversation[0]["content"] else "two"
        return f"I think <request> {goal}{len(conversation) // 2} </request>"


def test_the_first_reply_that_is_not_refused_ends_the_search_of_its_request():
    target, attacker = Target(one1="sure , it is x"), Scripted()
    found = PAIR(attacker, streams=1, iterations=3).run(target, ROWS)
    assert [(it.row, it.prompt, it.continuation) for it in found] == [
        (ROWS[0], "one1", "sure , it is x"),
        (ROWS[1], "two2", "Sorry, no"),
    ]
    assert target.asked == ["one0", "two0", "one1", "two1", "two2"]


def test_the_attacker_is_told_goal_target_and_replies_but_never_the_answer():
    attacker = Scripted()
    PAIR(attacker, streams=2, iterations=2).run(Target(one0="Sorry, {reply}"), ROWS[:1])
    assert [len(conversation) for conversation in attacker.told] == [1, 1, 3, 3]
    first, last = attacker.told[0][0]["content"], attacker.told[2]
    assert "goal one" in first and "sure" in first and first != attacker.told[1][0]["content"]
    assert [message["role"] for message in last] == ["user", "assistant", "user"]
    assert "Sorry, {reply}" in last[-1]["content"] and "turned the request down" in last[-1]["content"]
    assert "secret" not in json.dumps(attacker.told)


def test_budget_and_early_end():
    attack, target = PAIR(Scripted(), streams=3, iterations=2), Target()
    attack.run(target, ROWS[:1])
    assert len(target.asked) == attack.queries == 6
    target, attacker = Target(one0="fine"), Scripted()
    PAIR(attacker, streams=3, iterations=2).run(target, ROWS[:1])
    assert len(target.asked) == 3 and len(attacker.told) == 3


def test_failures_are_errored_and_never_safe():
    (failed,) = PAIR(Scripted(), streams=1, iterations=1).run(Target(one0="fail"), ROWS[:1])
    assert (failed.status, failed.reason, failed.row) == ("errored", "out of memory", ROWS[0])
    (later,) = PAIR(Scripted(), streams=1, iterations=2).run(Target(one1="fail"), ROWS[:1])
    assert (later.status, later.prompt) == ("generated", "one0")
    for nothing in ("no marks", "<request> </request>", None):
        (mute,) = PAIR(Scripted(lambda _, said=nothing: said), streams=1, iterations=2).run(Target(), ROWS[:1])
        assert mute.status == "errored" and "could be read" in mute.reason
    (bare,) = PAIR(Scripted()).run(Target(), [AttackRow("x", "goal one")])
    assert (bare.status, bare.reason) == ("skipped", "the row has no target")


def test_an_empty_reply_is_no_success():
    (found,) = PAIR(Scripted(), streams=1, iterations=2).run(Target(one0=" ", one1="yes"), ROWS[:1])
    assert found.prompt == "one1"


def test_a_local_attacker_samples_and_does_not_depend_on_other_conversations():
    subject = Subject(tiny_model("llama"), make_tokenizer(), max_new_tokens=4, progress=False)
    attacker = LocalAttacker(subject)
    one, other = ([{"role": "user", "content": word}] for word in WORDS[:2])
    first = attacker.reply([one, other, one])
    assert first[0] != first[2] and attacker.reply([other])[0] == first[1]
    assert LocalAttacker(subject, seed=1).reply([one, other, one]) != first
    subject.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        LocalAttacker(subject)


@pytest.fixture
def endpoint():
    """A server that gives the replies of a list in turn; numbers are statuses."""
    seen, replies = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers.get("Authorization"), body))
            said = replies.pop(0) if replies else "<request>x</request>"
            content = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
            self.send_response(said if isinstance(said, int) else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *words):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", seen, replies
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_endpoint_is_asked_again_where_that_may_help(endpoint, monkeypatch):
    url, seen, replies = endpoint
    monkeypatch.setenv("ATTACKER_KEY", "k-123")
    attacker = EndpointAttacker(url, "m", key_variable="ATTACKER_KEY", pause=0.0, retries=2)
    replies += [503, "hello"]
    talk = [{"role": "user", "content": "w"}]
    assert attacker.reply([talk]) == ["hello"]
    path, key, body = seen[0]
    assert (path, key, body["messages"], body["model"]) == ("/v1/chat/completions", "Bearer k-123", talk, "m")
    assert len(seen) == 2 and "k-123" not in json.dumps([body for _, _, body in seen]) + repr(attacker)
    replies += [401, 503, 503, None]
    assert attacker.reply([talk]) == [None] and len(seen) == 3 and attacker.problem.startswith("HTTP 401")
    assert (
        attacker.reply([talk]) == [None] and len(seen) == 6 and attacker.problem.startswith("the reply holds no text")
    )


def test_an_endpoint_that_is_not_there_is_named_in_the_reason():
    attacker = EndpointAttacker("http://127.0.0.1:1/v1", "m", pause=0.0, retries=1, timeout=2.0)
    (found,) = PAIR(attacker, streams=1, iterations=1).run(Target(), ROWS[:1])
    assert found.status == "errored" and "URLError" in found.reason


def test_bad_settings_are_refused_without_repeating_what_could_be_a_secret():
    for make in (
        lambda: EndpointAttacker("user:k-123@host", "m"),
        lambda: EndpointAttacker("http://host/v1", "m", key_variable="k-123"),
    ):
        with pytest.raises(ValueError) as error:
            make()
        assert "k-123" not in str(error.value)
    with pytest.raises(ValueError, match="streams"):
        PAIR(Scripted(), streams=0)

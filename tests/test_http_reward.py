"""A reward over HTTP against a real server on loopback: what it asks, each fault of a server, the cache on disk."""

import asyncio
import email.utils
import gzip
import json
import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from quark_lm.check_reward import check
from quark_lm.errors import ConfigError, RewardError
from quark_lm.rewards import http, load_reward
from quark_lm.rewards.http import http_reward
from quark_lm.rewards.runner import RewardRunner

PROMPTS = ["Once", "The end", "Rain"]
COMPLETIONS = [" upon a time", " is near", ""]
LENGTHS = [12.0, 8.0, 0.0]


def lengths(data):
    return {"rewards": [float(len(completion)) for completion in data["completions"]]}


def reply(status, body, headers=()):
    """A fault: this answer in place of the rewards."""

    def fault(handler):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in dict(headers).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return fault


class Server(ThreadingHTTPServer):
    """Scores by length; `faults` come first, one a request. Remembers the requests and how many were open at once."""

    daemon_threads = True

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.faults, self.requests, self.times, self.paths = [], [], [], []
        self.seconds, self.open, self.most_open = 0.0, 0, 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/score"

    def handle_error(self, request, client_address):
        pass  # a client that has gone


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(data)
            server.times.append(time.monotonic())
            server.paths.append((self.path, dict(self.headers)))
            server.open += 1
            server.most_open = max(server.most_open, server.open)
            fault = server.faults.pop(0) if server.faults else None
        time.sleep(server.seconds)
        try:
            (fault or reply(200, lengths(data)))(self)
        finally:
            with server.lock:
                server.open -= 1

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(http, "_FIRST_PAUSE", 0.01)


def ask(url, prompts=PROMPTS, completions=COMPLETIONS, **options):
    return asyncio.run(
        http_reward(url, **options)(prompts=prompts, completions=completions, topic=["x"] * len(prompts))
    )


def refused(url, **options):
    with pytest.raises(RewardError) as caught:
        ask(url, **options)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    return str(caught.value)


# -- what it asks


def test_the_server_gets_both_lists_and_its_numbers_come_back(server):
    assert ask(server.url) == LENGTHS
    assert server.requests == [{"prompts": PROMPTS, "completions": COMPLETIONS}]
    path, headers = server.paths[0]
    assert (path, headers["Content-Type"]) == ("/score", "application/json")


def test_null_is_no_reward(server):
    server.faults = [reply(200, {"rewards": [1, None, -2.5], "more": "ignored"})]
    assert ask(server.url) == [1.0, None, -2.5]


def test_conversations_and_any_text_go_as_they_are(server):
    prompts = [[{"role": "user", "content": "héllo \U0001f642"}], [{"role": "user", "content": "\x1b[31m\ud800"}]]
    completions = [[{"role": "assistant", "content": "<b>"}], [{"role": "assistant", "content": ""}]]
    assert ask(server.url, prompts, completions) == [1.0, 1.0]
    assert server.requests == [{"prompts": prompts, "completions": completions}]


def test_batches_come_back_in_the_order_of_the_completions(server):
    completions = ["x" * (n % 7) + str(n) for n in range(50)]
    server.seconds = 0.02
    assert ask(server.url, ["p"] * 50, completions, batch_size=3, concurrency=4) == [float(len(c)) for c in completions]
    assert sorted(len(r["completions"]) for r in server.requests) == [2] + [3] * 16
    assert 2 <= server.most_open <= 4


def test_equal_pairs_are_asked_once_but_not_equal_completions_of_other_prompts(server):
    assert ask(server.url, ["a", "b", "a", "a"], ["x", "x", "x", "yy"]) == [1.0, 1.0, 1.0, 2.0]
    assert server.requests == [{"prompts": ["a", "b", "a"], "completions": ["x", "x", "yy"]}]


def test_no_completions_ask_nothing(server):
    assert ask(server.url, [], []) == []
    assert server.requests == []


def test_requests_a_second_are_kept_to_over_all_that_are_under_way(server):
    started = time.monotonic()
    ask(server.url, ["p"] * 6, list("abcdef"), batch_size=1, concurrency=6, requests_per_second=20)
    assert server.times[-1] - started > 5 / 20
    # the n-th request is not sent before its turn, whatever the ones before it took
    assert all(at - started >= number / 20 for number, at in enumerate(sorted(server.times)))


def test_the_environment_s_proxy_is_used_only_when_told(server, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{closed.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        assert ask(server.url) == LENGTHS
        assert "cannot be reached" in refused(server.url, retries=0, trust_env=True)


def test_a_user_and_password_are_sent_and_never_shown(server):
    url = server.url.replace("http://", "http://me:secret@") + "?key=hidden"
    reward = http_reward(url, retries=0)
    assert asyncio.run(reward(prompts=["a"], completions=["b"])) == [1.0]
    assert server.paths[0][0] == "/score?key=hidden"
    assert server.paths[0][1]["Authorization"].startswith("Basic ")
    server.faults = [reply(500, b"no")]
    shown = f"{reward!r} {reward.scorer_name} {reward.__name__} {refused(url, retries=0)}"
    assert "secret" not in shown
    assert "hidden" not in shown


@pytest.mark.parametrize(
    "spec",
    [
        "http(url=http://me:secret@h/score?key=hidden, batch_size=0)",
        "http(url=http://me:secret@h/score?key=hidden, cache)",
        "http(url=http://me:secret@/score?key=hidden)",
        "http(url=http://me:secret@h:port/score?key=hidden)",
        "http://me:secret@h/score?key=hidden(batch_size=0)",
        "http://me:secret@h/score?key=hidden(cache)",
    ],
)
def test_nor_are_they_shown_where_a_reward_is_named_wrongly(spec):
    with pytest.raises(ConfigError) as told:
        load_reward(spec)
    assert "secret" not in str(told.value)
    assert "hidden" not in str(told.value)


def test_another_query_is_another_source_of_rewards(server):
    plain, positive, negative = (RewardRunner(server.url + query) for query in ("", "?label=1", "?label=0"))
    assert positive.told == negative.told
    assert len({tuple(runner.sources.values()) for runner in (plain, positive, negative)}) == 3


# -- a server that fails for a while


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_what_may_pass_is_asked_again(server, status):
    server.faults = [reply(status, b"busy"), reply(status, b"")]
    assert ask(server.url, retries=2) == LENGTHS
    assert len(server.requests) == 3


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for_by_every_batch(server, form):
    wait = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
    server.faults = [reply(429, b"slow down", {"Retry-After": wait})]
    assert ask(server.url, batch_size=1, concurrency=1) == LENGTHS
    assert server.times[1] - server.times[0] > 0.9


def test_retry_after_is_kept_by_requests_that_wait_their_turn_already(server):
    server.faults = [reply(429, b"slow down", {"Retry-After": "1.5"})]
    assert ask(server.url, batch_size=1, concurrency=3, requests_per_second=2) == LENGTHS
    assert server.times[1] - server.times[0] > 1.4  # its turn was half a second after the first's


@pytest.mark.parametrize("wait", ["soon", "-5", "nan", "", "Wed, 99 Foo"])
def test_a_retry_after_that_says_nothing_is_left_unread(server, wait):
    server.faults = [reply(503, b"", {"Retry-After": wait})]
    assert ask(server.url) == LENGTHS


@pytest.mark.parametrize("wait", ["86400", "inf", "Wed, 01 Jan 2180 00:00:00 GMT"])
def test_a_wait_of_a_day_stops_in_place_of_sleeping(server, wait):
    server.faults = [reply(429, b"", {"Retry-After": wait})]
    assert "asks to be left alone for" in refused(server.url)
    assert len(server.requests) == 1


def test_a_lost_connection_is_asked_again(server):
    server.faults = [lambda handler: handler.connection.shutdown(socket.SHUT_RDWR)]
    assert ask(server.url) == LENGTHS


def test_a_slow_answer_is_given_up_and_asked_again(server):
    server.faults = [lambda handler: time.sleep(30)]
    started = time.monotonic()
    assert ask(server.url, timeout=1, batch_size=1, completions=["a"], prompts=["p"]) == [1.0]
    server.seconds = 30
    assert "gave no answer within 0.2 s (2 times). Raise timeout" in refused(server.url, timeout=0.2, retries=1)
    assert time.monotonic() - started < 25


def test_an_answer_that_never_ends_is_given_up_too(server):
    """Each byte comes in time, the answer does not."""

    def drip(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(600):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)

    server.faults = [drip]
    started = time.monotonic()
    assert "gave no answer within 0.3 s. Raise timeout" in refused(server.url, timeout=0.3, retries=0)
    assert time.monotonic() - started < 25


# -- a server that fails for good


def test_where_nobody_listens_it_says_so():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/score"
        assert f"at {url} cannot be reached (" in refused(url, retries=1)
        assert "(2 times). Start the server there, or mend the URL" in refused(url, retries=1)


BAD_ANSWERS = {
    "an error page": (reply(500, b"<h1>Internal\nerror"), r"answered 500 Internal Server Error ('<h1>Internal\nerror"),
    "no JSON": (reply(200, b"<html>\x1b[31m</html>"), r"answered what is no JSON ('<html>\x1b[31m</html>')"),
    "nothing": (reply(200, b""), "answered what is no JSON. It has to answer"),
    "deep JSON": (reply(200, b"[" * 100_000), "answered what is no JSON"),
    "a list": (reply(200, [1, 2, 3]), "answered no list of rewards ('[1, 2, 3]')"),
    "another key": (reply(200, {"scores": [1, 2, 3]}), "answered no list of rewards"),
    "a number": (reply(200, {"rewards": 3}), "answered no list of rewards"),
    "too few": (reply(200, {"rewards": [1, 2]}), "answered 2 rewards for 3 completions, so whose they are is unknown"),
    "too many": (reply(200, {"rewards": [1] * 4}), "answered 4 rewards for 3 completions"),
    "NaN": (reply(200, b'{"rewards": [1, NaN, 2]}'), "answered 'nan' at index 1, which has no rank"),
    "Infinity": (reply(200, b'{"rewards": [1, 2, -Infinity]}'), "answered '-inf' at index 2"),
    "a huge number": (reply(200, b'{"rewards": [1' + b"0" * 400 + b", 2, 3]}"), "at index 0, which has no rank"),
    "text": (reply(200, {"rewards": ["0.5", 1, 2]}), "answered '0.5' at index 0"),
    "not found": (reply(404, b"nothing here"), "refused the request: 404 Not Found ('nothing here'). Mend the URL"),
    "unprocessable": (reply(422, {"detail": "prompts"}), "refused the request: 422"),
    "a redirect": (reply(308, b"", {"Location": "/other"}), "308 Permanent Redirect: it has moved to '/other'"),
    "bad gzip": (reply(200, b"no gzip", {"Content-Encoding": "gzip"}), "answered what cannot be decoded"),
    "a flood": (reply(200, b" " * ((1 << 24) + 1)), "answered more than 16 MiB"),
    "a bomb": (reply(200, gzip.compress(b" " * (1 << 25)), {"Content-Encoding": "gzip"}), "answered more than 16 MiB"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_ANSWERS)
def test_a_bad_answer_is_one_line_that_says_what_came(server, kind):
    fault, words = BAD_ANSWERS[kind]
    server.faults = [fault]
    assert words in refused(server.url, retries=0)
    assert len(server.requests) == 1


@pytest.mark.parametrize("kind", ["no JSON", "too few", "NaN", "not found", "a redirect"])
def test_what_another_request_cannot_mend_is_not_sent_again(server, kind):
    server.faults = [BAD_ANSWERS[kind][0]]
    refused(server.url, retries=5)
    assert len(server.requests) == 1


def test_after_a_failure_nothing_more_is_asked(server):
    server.faults = [reply(404, b"")]
    server.seconds = 0.05
    refused(server.url, prompts=["p"] * 20, completions=[str(n) for n in range(20)], batch_size=1, concurrency=3)
    assert len(server.requests) <= 10  # a busy machine may answer others before it tells of the failure


# -- the cache


def test_what_was_answered_is_not_asked_again(server, tmp_path):
    cache = tmp_path / "new" / "scores.sqlite3"
    server.faults = [reply(200, {"rewards": [12.0, None, 0.0]})]
    assert ask(server.url, cache=cache) == [12.0, None, 0.0]
    assert ask(server.url, cache=str(cache)) == [12.0, None, 0.0]  # null is an answer too
    assert len(server.requests) == 1
    assert ask(server.url, ["Once", "Once"], [" upon a time", "!"], cache=cache) == [12.0, 1.0]
    assert server.requests[1] == {"prompts": ["Once"], "completions": ["!"]}
    assert ask(server.url + "/v2", cache=cache) == LENGTHS  # another URL, another scorer
    assert ask(server.url, ["Onc"], ["e upon a time"], cache=cache) == [13.0]  # the border is part of the key


def test_without_a_cache_nothing_is_kept(server):
    ask(server.url)
    ask(server.url)
    assert len(server.requests) == 2


def test_batches_that_were_answered_are_kept_when_another_fails(server, tmp_path):
    cache = tmp_path / "scores.sqlite3"
    completions = [str(n) for n in range(6)]
    server.faults = [reply(200, {"rewards": [0.5, 0.5]}), reply(200, {"rewards": [0.25, 0.25]}), reply(404, b"")]
    refused(server.url, prompts=["p"] * 6, completions=completions, batch_size=2, concurrency=1, cache=cache)
    assert ask(server.url, ["p"] * 6, completions, batch_size=2, cache=cache) == [0.5, 0.5, 0.25, 0.25, 1.0, 1.0]
    assert len(server.requests) == 4


def test_many_keys_are_read_at_once(server, tmp_path):
    completions = [str(n) for n in range(2500)]
    options = {"prompts": ["p"] * 2500, "completions": completions, "cache": tmp_path / "s.sqlite3", "batch_size": 2500}
    assert ask(server.url, **options) == ask(server.url, **options) == [float(len(c)) for c in completions]
    assert len(server.requests) == 1


def test_a_file_that_is_no_cache_is_refused(server, tmp_path):
    other = tmp_path / "other.sqlite3"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE rewards (name TEXT)")
    connection.close()
    (tmp_path / "text.sqlite3").write_text("no database " * 100)
    (tmp_path / "folder").mkdir()
    for name in ("other.sqlite3", "text.sqlite3", "folder"):
        assert f"The cache {tmp_path / name} cannot be used (" in refused(server.url, cache=tmp_path / name)
    assert server.requests == []


SCORE = """
import asyncio, sys
from quark_lm.rewards.http import http_reward
reward = http_reward(sys.argv[1], cache=sys.argv[2], batch_size=2, concurrency=1)
asyncio.run(reward(prompts=["p"] * 40, completions=[str(n) for n in range(40)]))
"""


def test_a_kill_loses_no_answer_that_was_written(server, tmp_path):
    cache = tmp_path / "scores.sqlite3"
    server.seconds = 0.02
    process = subprocess.Popen([sys.executable, "-c", SCORE, server.url, str(cache)])
    deadline = time.monotonic() + 60
    while len(server.requests) < 7 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    asked = [c for request in server.requests for c in request["completions"]]
    server.requests.clear()
    completions = [str(n) for n in range(40)]
    assert ask(server.url, ["p"] * 40, completions, cache=cache) == [float(len(c)) for c in completions]
    again = [c for request in server.requests for c in request["completions"]]
    assert set(asked) | set(again) == set(completions)
    # only the batches whose answers were under way, or not yet written, when the process died
    assert len(set(asked) & set(again)) <= 4
    assert len(asked) >= 12


def test_processes_share_a_cache(server, tmp_path):
    cache = tmp_path / "scores.sqlite3"
    processes = [subprocess.Popen([sys.executable, "-c", SCORE, server.url, str(cache)]) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    server.requests.clear()
    ask(server.url, ["p"] * 40, [str(n) for n in range(40)], cache=cache)
    assert server.requests == []


# -- among the other rewards


def test_it_is_loaded_by_its_url_or_by_name(server, tmp_path):
    for spec in (server.url, f"http(url={server.url}, timeout=5, cache={tmp_path / 'c.sqlite3'})"):
        reward = load_reward(spec)
        assert reward.__name__ == "score"
        assert reward.scorer_name == f"http {server.url}"
        batch = RewardRunner(reward).score(PROMPTS, COMPLETIONS, [[]] * 3, {})
        assert batch.total.tolist() == LENGTHS
    assert (tmp_path / "c.sqlite3").is_file()
    assert load_reward(server.url, timeout=2, batch_size=7).__name__ == "score"
    assert load_reward("https://scores.example").__name__ == "scores_example"


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        ("http://", {}, "is no URL of a web server"),
        ("http(url=ftp://host/x)", {}, "is no URL of a web server"),
        ("http://host:port/x", {}, "is no URL"),
        ("http", {}, r"needs url. Write http\(url=...\)"),
        ("http:8000/score", {}, r"Write http\(url=8000/score\)"),
        ("http://host", {"batch_size": 0}, "batch_size=0 of the reward http://host cannot work"),
        ("http://host", {"batch_size": 2.5}, "batch_size=2.5 .* Set a whole number, 1 or more"),
        ("http://host", {"concurrency": "many"}, "concurrency='many'"),
        ("http://host", {"timeout": 0}, "timeout=0"),
        ("http://host", {"timeout": math.inf}, "timeout=inf"),
        ("http://host", {"retries": -1}, "retries=-1"),
        ("http://host", {"requests_per_second": 0}, "requests_per_second=0"),
        ("http(url=http://host, time_out=5)", {}, "no option 'time_out', did you mean 'timeout'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_asked(spec, options, words):
    with pytest.raises(ConfigError, match=words) as caught:
        load_reward(spec, **options)
    assert "\n" not in str(caught.value)


def test_in_a_runner_a_failure_is_one_line_or_no_reward_with_its_reason(server):
    server.faults = [reply(503, b"down")] * 4
    with pytest.raises(RewardError, match=r"^The reward at .* answered 503 .*\(2 times\)"):
        RewardRunner(http_reward(server.url, retries=1), retries=3).score(PROMPTS, COMPLETIONS, [[]] * 3, {})
    assert len(server.requests) == 2  # it has tried again itself
    batch = RewardRunner(http_reward(server.url, retries=1), may_fail=True).score(PROMPTS, COMPLETIONS, [[]] * 3, {})
    assert batch.num_dropped == batch.num_failed == 3
    assert "answered 503 Service Unavailable ('down')" in batch.failures[0].reason


def test_two_servers_are_asked_at_the_same_time(server):
    both = threading.Barrier(2)

    def wait_for_the_other(handler):
        both.wait(30)
        reply(200, {"rewards": LENGTHS})(handler)

    server.faults = [wait_for_the_other] * 2
    batch = RewardRunner([server.url, server.url + "/other"]).score(PROMPTS, COMPLETIONS, [[]] * 3, {})
    assert batch.total.tolist() == [2 * length for length in LENGTHS]


def test_ctrl_c_stops_at_once_what_is_under_way(server):
    code = f"""
import signal
from quark_lm.rewards.runner import RewardRunner
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
try:
    RewardRunner("http(url={server.url}, timeout=50)").score(["p"], ["c"], [[1]], {{}})
except KeyboardInterrupt:
    raise SystemExit(130)
"""
    server.seconds = 40
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not server.requests and time.monotonic() < deadline:
        time.sleep(0.01)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert time.monotonic() - started < 25


def test_a_reward_that_answers_from_a_cache_cannot_be_checked(server, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"completion": f"text {n}"}) for n in range(40)))
    with pytest.raises(ConfigError, match="Leave cache out to check it"):
        check(http_reward(server.url, cache=Path(tmp_path / "c.sqlite3")), completions=rows, model=None)
    assert check(http_reward(server.url), completions=rows, model=None).distinct == 2

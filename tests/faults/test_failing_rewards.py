"""Rewards that fail in `quark train`: functions, and a real server on loopback. One line each; nothing paid is lost."""

import socket
import threading
import time

from faults.processes import Command, end, one_line, quark, train
from test_http_reward import Server, reply

from quark_lm import Pool

FUNCTIONS = {
    "raise KeyError('no such\\nscore')": "vowels raised KeyError: 'no such",
    "raise SystemExit(3)": "vowels raised SystemExit",
    "return [0.5]": "returned 1 rewards for 8 completions",
    "return ['good'] * 8": "'good' (str) at index 0, which is no number",
    "return [10 ** 400] * 8": "vowels returned inf at index 0",
    "return (x for x in [1, float('nan')] * 4)": "returned nan at index 1",
}


def test_a_function_that_fails_is_one_line_and_when_it_is_mended_the_run_ends_as_if_it_had_not(
    things, whole_end, tmp_path
):
    rewards = tmp_path / "rewards.py"
    working = (things / "rewards.py").read_text()
    argv = train(things, tmp_path / "run", reward_funcs=f"{rewards}:vowels")
    for body, words in FUNCTIONS.items():
        # the two held-out prompts of the base have rewards, a chunk of 8 has none
        fault = f"    if len(completions) < 8:\n        return works(completions)\n    {body}"
        rewards.write_text(f"{working}\nworks = vowels\ndef vowels(completions, **kwargs):\n{fault}\n")
        assert words in one_line(quark(argv)), body
        (kept,) = (tmp_path / "run" / "pool").glob("*.partial.jsonl")
        assert kept.read_text().count('"indices"') == 3, body  # all samples
    rewards.write_text(working)
    done = quark(argv)
    assert done.code == 0, done.err
    told = end(tmp_path / "run")
    assert {k: told[k] for k in ("weights", "pool", "metrics")} == {
        k: whole_end[k] for k in ("weights", "pool", "metrics")
    }


works_again = threading.Event()


def hangs(handler):
    works_again.wait(60)


def closes(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)


SERVERS = {
    "hangs": (hangs, "gave no answer within 5 s"),
    "429": (reply(429, b"slow \x1b[31mdown"), "answered 429 Too Many Requests"),
    "500": (reply(500, b"<script>oops</script>"), "answered 500 Internal Server Error"),
    "garbage": (reply(200, b"\x00\xff\x1b]0;title\x07"), "answered what is no JSON"),
    "too few rows": (reply(200, {"rewards": [1.0]}), "answered 1 rewards for 8 completions"),
    "closes the connection": (closes, "broke off"),
}


def test_a_server_that_fails_is_one_line_and_when_it_works_again_the_run_ends_as_if_it_had_not(things, tmp_path):
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        spec = f"http(url={server.url}, timeout=5, retries=0)"
        changes = {"reward_funcs": spec, "eval_prompts": None, "eval_reward_funcs": None}
        argv = train(things, tmp_path / "run", **changes)
        for name, (fault, words) in SERVERS.items():
            server.faults = [fault] if name != "429" else [None, fault]
            line = one_line(quark(argv))
            assert words in line, (name, line)
            assert line.isprintable(), name
        assert quark(argv).code == 0
        # 3 and 2 chunks of 8; one that failed is asked again, and no other
        assert len(server.requests) == 5 + len(SERVERS)
    finally:
        works_again.set()
        server.shutdown()
        server.server_close()
    assert Pool.open(tmp_path / "run").to_table().column("reward").null_count == 0


def test_a_server_that_dies_and_comes_back_costs_no_restart(things, tmp_path):
    server = Server()
    port = server.server_port
    threading.Thread(target=server.serve_forever, daemon=True).start()
    spec = f"http(url={server.url}, timeout=5, retries=8)"
    changes = {"reward_funcs": spec, "eval_prompts": None, "eval_reward_funcs": None}
    server.seconds = 0.2
    command = Command(train(things, tmp_path / "run", **changes))
    while len(server.requests) < 2:
        assert command.process.is_alive(), command.err
        time.sleep(0.01)
    server.shutdown()
    server.server_close()
    time.sleep(0.5)
    server = Server(port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = command.wait()
        assert done.code == 0, done.err
        assert server.requests
    finally:
        server.shutdown()
        server.server_close()

"""The completers of vLLM against a server on loopback that speaks its HTTP, and against a stand-in for `vllm.LLM`.

Both run the tiny model of the checkpoint that they are given, by HFCompleter: what they sample is what it samples. The
server takes the fields of vLLM's own protocol and refuses what vLLM refuses, and names that it does not know, which
vLLM only writes to its log.
"""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
import torch
from test_trainer import PROMPTS, lora, make
from tiny import VOCAB, tiny_gpt2, tiny_llama, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from quark_lm import Pool, QuarkConfig
from quark_lm.errors import ConfigError, GenerationError
from quark_lm.generation import GenerationSettings, complete_all, sample_seeds
from quark_lm.generation import vllm as vllm_room
from quark_lm.generation.hf import HFCompleter
from quark_lm.generation.vllm import VLLMColocated, VLLMServer, sampling
from quark_lm.pool import PartialRound
from quark_lm.processes import end_after, leave

# a few steps teach the tokens nothing
pytestmark = pytest.mark.filterwarnings("ignore:The reward tokens")

IDS = [[5, 6, 7, 8], [9, 10], [5, 6, 7, 8], [11, 12, 13], [14]]
END = (0,)

# CompletionRequest's fields that a sample may need, and their types (vllm/entrypoints/openai/completion/protocol.py).
NUMBER = (int, float)
FIELDS = {
    "model": str,
    "prompt": list,
    "max_tokens": int,
    "min_tokens": int,
    "n": int,
    "seed": int,
    "temperature": NUMBER,
    "top_p": NUMBER,
    "top_k": int,
    "min_p": NUMBER,
    "repetition_penalty": NUMBER,
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "stop_token_ids": list,
    "ignore_eos": bool,
    "logit_bias": dict,
    "return_token_ids": bool,
    "allowed_token_ids": list,
    "skip_special_tokens": bool,
    "stream": bool,
}
NEUTRAL = {"min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "n": 1, "stream": False}


class Refused(Exception):
    """What vLLM answers with 400."""


class Biased(nn.Module):
    """A head whose logits have a bias added, as vLLM adds it: before the temperature."""

    def __init__(self, head, bias):
        super().__init__()
        self.head, self.bias = head, bias
        self.module = head.module

    def forward(self, hidden):
        return self.head(hidden) + self.bias


def sampled(model, fields, prompt, room=128):
    """(token ids, finish reason) of one prompt under SamplingParams' fields. Raises: Refused as vLLM would."""
    words = len(model.get_input_embeddings().weight)
    for name, value in fields.items():
        if name in NEUTRAL and value != NEUTRAL[name]:
            raise Refused(f"{name}={value!r} is not what this stand-in can do")
    if not prompt or not all(type(i) is int and 0 <= i < words for i in prompt):
        raise Refused(f"Token id {max(prompt, default=None)} is out of vocabulary")
    if not 0 < fields["top_p"] <= 1 or fields["top_k"] < -1 or fields["temperature"] < 0:
        raise Refused("top_p must be in (0, 1], top_k at least -1, temperature non-negative")
    if fields["max_tokens"] < 1 or not 0 <= fields["min_tokens"] <= fields["max_tokens"]:
        raise Refused("min_tokens must be from 0 to max_tokens")
    if len(prompt) + fields["max_tokens"] > room:
        raise Refused(f"This model's maximum context length is {room} tokens")
    if not -(2**63) <= fields["seed"] < 2**63:
        raise Refused("seed is no int64")
    bias = torch.zeros(words)
    for token, value in (fields.get("logit_bias") or {}).items():
        if not 0 <= int(token) < words:
            raise Refused(f"token_id(s) [{token}] in logit_bias contain out-of-vocab token ids")
        bias[int(token)] = min(100.0, max(-100.0, float(value)))
    ends = [*fields["stop_token_ids"], *([] if fields["ignore_eos"] else [0])]
    completer = HFCompleter(model, ends, 1)
    completer.head = Biased(completer.head, bias)
    settings = GenerationSettings(
        max_completion_length=fields["max_tokens"],
        min_completion_length=fields["min_tokens"],
        temperature=fields["temperature"],
        top_p=fields["top_p"],
        top_k=max(0, fields["top_k"]),
    )
    [ids] = complete_all(completer.complete([prompt], [fields["seed"]], settings), 1)
    return ids, "stop" if ids[-1] in ends else "length"


class FakeVLLM(ThreadingHTTPServer):
    """`vllm serve` of one model, in development mode unless told otherwise.

    Attributes:
        faults: functions of (handler, fields), one a completion request; None lets it be answered.
        reloads: the folders that were loaded, in order. asked: the fields of every completion request.
        at_completion: called with the number of completion requests so far, before each is answered.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, model, root="base", port=0, development=True, versions=True, most_tokens=128):
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.root, self.development, self.most_tokens = model.eval(), str(root), development, most_tokens
        self.version = "default" if versions else None
        self.transfer = None
        self.faults, self.reloads, self.asked, self.at_completion, self.wrong = [], [], [], None, []
        self.versions_told = []
        self.lock, self.connections, self.is_dead = threading.Lock(), set(), False
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # a client that has gone, or a server that has died
            self.wrong.append(error)

    def die(self):
        """As SIGKILL would: nobody is answered any more."""
        self.is_dead = True
        self.shutdown()
        self.socket.close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self):
        if not self.is_dead:
            self.shutdown()
        self.server_close()
        assert not self.wrong, self.wrong


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, data=None, status=200):
        content = b"" if data is None else json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, message, status=400):
        self.answer({"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}, status)

    def do_GET(self):
        server = self.server
        if self.path == "/v1/models":
            card = {"id": "policy", "object": "model", "root": server.root, "max_model_len": server.most_tokens}
            self.answer({"object": "list", "data": [card]})
        elif self.path.partition("?")[0] == "/server_info" and server.development:
            self.answer({"vllm_config": {"weight_transfer_config": server.transfer}})
        elif self.path == "/get_world_size" and server.development:
            self.answer({"world_size": 2})
        elif self.path == "/weight_info" and server.development and server.version is not None:
            self.answer({"weight_version": server.version})
        else:
            self.answer({"detail": "Not Found"}, 404)

    def do_POST(self):
        server = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = json.loads(body) if body else {}
        if self.path == "/v1/completions":
            self.complete(data)
        elif not server.development:
            self.answer({"detail": "Not Found"}, 404)
        elif self.path == "/collective_rpc":
            assert data["method"] == "reload_weights"
            path = data["kwargs"]["weights_path"]
            if not os.path.isdir(path):
                self.refuse(f"{path} is neither a folder nor a name", 500)
                return
            with server.lock:
                new = AutoModelForCausalLM.from_pretrained(path).eval()
                if new.vocab_size != server.model.vocab_size:
                    self.refuse("shapes differ", 500)
                    return
                server.model = new
                server.reloads.append(path)
            self.answer({"results": [None]})
        elif self.path == "/reset_prefix_cache":
            self.answer()
        elif self.path == "/update_weight_version" and server.version is not None:
            server.version = data["new_version"]
            server.versions_told.append(server.version)
            self.answer({"success": True, "new_version": server.version})
        else:
            self.answer({"detail": "Not Found"}, 404)

    def complete(self, fields):
        server = self.server
        with server.lock:
            server.asked.append(fields)
            count = len(server.asked)
            fault = server.faults.pop(0) if server.faults else None
        if server.at_completion is not None:
            server.at_completion(count)
        if server.is_dead:
            self.close_connection = True
            return
        if fault is not None and fault(self, fields) is not None:
            return
        try:
            for name, value in fields.items():
                if name not in FIELDS:
                    raise Refused(f"unknown field {name}")
                if not isinstance(value, FIELDS[name]) or (isinstance(value, bool) and FIELDS[name] is not bool):
                    raise Refused(f"{name}={value!r} is of another type")
            if fields.get("model") != "policy":
                self.refuse(f"The model `{fields.get('model')}` does not exist.", 404)
                return
            with server.lock:
                ids, reason = sampled(server.model, fields, fields["prompt"], server.most_tokens)
        except Refused as refused:
            self.refuse(str(refused))
            return
        choice = {"index": 0, "text": "not read", "finish_reason": reason, "stop_reason": None}
        if fields.get("return_token_ids"):
            choice |= {"token_ids": ids, "prompt_token_ids": fields["prompt"]}
        if not server.is_dead:
            self.answer({"id": "cmpl-1", "object": "text_completion", "model": "policy", "choices": [choice]})

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(vllm_room, "_FIRST_PAUSE", 0.02)
    monkeypatch.setattr(vllm_room, "_LONGEST_PAUSE", 0.1)


@pytest.fixture
def serve():
    """Starts a FakeVLLM; all are stopped at the end, and none may have failed by itself."""
    servers = []

    def start(model=None, **options):
        servers.append(FakeVLLM(tiny_llama() if model is None else model, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def client(server, rows=None, eos=END, timeout=20.0, **options):
    options = {"served": [server.root], "tell": lambda line: None, **options}
    return VLLMServer(server.url, eos, rows, timeout=timeout, **options)


def dies_at(server, count, trainer):
    """The server dies before it answers its request number `count`, and the run does not wait long for it."""

    def die(so_far):
        if so_far == count and not server.is_dead:
            trainer.vllm._timeout = 0.3
            server.die()

    server.at_completion = die


class StandInLLM:
    """`vllm.LLM` as far as it is used: it takes what LLM.__init__, generate, sleep and so on take, and nothing else."""

    def __init__(
        self,
        model,
        *,
        dtype="auto",
        gpu_memory_utilization=0.9,
        tensor_parallel_size=1,
        max_model_len=None,
        enable_sleep_mode=False,
        generation_config="auto",
        distributed_executor_backend=None,
    ):
        assert isinstance(model, str)
        self.model, self.options = AutoModelForCausalLM.from_pretrained(model).eval(), {"dtype": dtype}
        self.enable_sleep_mode, self.asleep, self.calls = enable_sleep_mode, set(), []

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        assert not self.asleep
        assert len(prompts) == len(sampling_params)
        out = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            ids, reason = sampled(self.model, params.fields, prompt["prompt_token_ids"])
            output = types.SimpleNamespace(token_ids=tuple(ids), finish_reason=reason)
            out.append(types.SimpleNamespace(outputs=[output], prompt_token_ids=prompt["prompt_token_ids"]))
        return out

    def sleep(self, level=1):
        assert self.enable_sleep_mode
        self.calls.append("sleep")
        self.asleep = {"weights", "kv_cache"}
        if level == 2:
            self.model = None

    def wake_up(self, tags=None):
        self.asleep -= set(tags or self.asleep)

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        assert method == "reload_weights"
        assert "weights" not in self.asleep
        self.calls.append("reload")
        self.model = AutoModelForCausalLM.from_pretrained(kwargs["weights_path"]).eval()

    def reset_prefix_cache(self):
        self.calls.append("reset")


class StandInParams:
    NAMES = (FIELDS.keys() - {"model", "prompt", "return_token_ids", "stream"}) | {"detokenize"}

    def __init__(self, **fields):
        assert not fields.keys() - self.NAMES, fields.keys() - self.NAMES
        assert fields.pop("detokenize") is False
        self.fields = fields


@pytest.fixture
def stand_in(monkeypatch):
    """`import vllm` gives a module whose LLM runs the tiny model; `made` holds the LLMs that were made."""
    module = types.ModuleType("vllm")
    module.made = []

    def llm(*args, **kwargs):
        module.made.append(StandInLLM(*args, **kwargs))
        return module.made[-1]

    module.LLM, module.SamplingParams = llm, StandInParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


@pytest.fixture(params=["server", "colocate"])
def completer(request, tmp_path):
    """Makes the completer of a mode for a model."""

    def made(model, rows=None, eos=END):
        if request.param == "server":
            return client(request.getfixturevalue("serve")(model), rows, eos)
        request.getfixturevalue("stand_in")
        model.save_pretrained(tmp_path / "model")
        completer = VLLMColocated(eos, rows, {"generation_config": "vllm"})
        completer.load(tmp_path / "model", "1", model, first=True)
        return completer

    return made


def complete(completer, prompts=IDS, seeds=None, settings=None, **options):
    settings = GenerationSettings(**{"max_completion_length": 8, **(settings or {})})
    seeds = sample_seeds(1, num=len(prompts)) if seeds is None else seeds
    return complete_all(completer.complete(prompts, seeds, settings, **options), len(prompts))


# -- the contract of hf.py


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"top_k": 5},
        {"min_completion_length": 4, "max_completion_length": 6},
    ],
)
def test_a_sample_is_that_of_its_seed_and_settings(completer, settings):
    model, eos = tiny_llama(), (0, 20, 33, *range(40, 60))
    wanted = complete(HFCompleter(model, eos), settings=settings)
    assert complete(completer(model, eos=eos), settings=settings) == wanted
    assert any(ids[-1] in eos for ids in wanted)


def test_a_sample_depends_neither_on_its_batch_nor_on_the_order_and_a_rerun_is_equal(completer):
    seeds = sample_seeds(3, num=len(IDS))
    one = completer(tiny_gpt2(), rows=2)
    whole = complete(one, seeds=seeds)
    assert complete(one, seeds=seeds) == whole
    one.batch_rows = None
    assert complete(one, seeds=seeds) == whole
    assert complete(one, IDS[::-1], seeds=seeds[::-1]) == whole[::-1]
    assert complete(one, seeds=sample_seeds(4, num=len(IDS))) != whole


def test_what_was_done_is_left_out_and_the_rest_comes_in_the_same_batches(completer):
    seeds, settings = sample_seeds(1, num=len(IDS)), GenerationSettings(max_completion_length=8)
    one = completer(tiny_llama(), rows=2)
    whole = list(one.complete(IDS, seeds, settings))
    assert [indices for indices, _ in whole] == [[0, 1], [2, 3], [4]]
    done = {0, 1, 2}
    rest = [(indices, ids) for indices, ids in one.complete(IDS, seeds, settings, skip=done)]
    assert rest == [([3], whole[1][1][1:]), whole[2]]


def test_a_barred_token_never_comes_back(completer):
    model, barred = tiny_llama(tie=False), tuple(range(100, VOCAB))
    with torch.no_grad():
        model.lm_head.weight[list(barred)] *= 3
    one = completer(model)
    assert {token for ids in complete(one, IDS * 4) for token in ids} & set(barred)
    for ids in complete(one, IDS * 4, settings={"barred": barred}):
        assert not set(ids) & set(barred)


def test_ids_come_back_as_they_were_sampled_where_their_text_has_others(completer):
    tokenizer = tiny_tokenizer()
    completions = complete(completer(tiny_llama()), IDS * 8, settings={"max_completion_length": 16})
    assert any(tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) != ids for ids in completions)
    assert completions == complete(HFCompleter(tiny_llama(), END), IDS * 8, settings={"max_completion_length": 16})


def test_the_dial_is_refused_but_where_it_does_nothing(completer):
    one = completer(tiny_llama())
    plain = complete(one)
    assert complete(one, dials=[(IDS[::-1], 1.0)]) == plain
    assert complete(one, dials=[(IDS[::-1], [1.0] * len(IDS))]) == plain
    with pytest.raises(ConfigError, match="public API gives those of one"):
        complete(one, dials=[(IDS, [1.0, 1.0, 2.0, 1.0, 1.0])])
    with pytest.raises(ConfigError, match="not a finite number"):
        complete(one, dials=[(IDS, float("nan"))])


# -- what the server is asked


def test_the_server_refuses_what_vllm_refuses(serve):
    server = serve()
    good = {"model": "policy", "prompt": IDS[0], "return_token_ids": True}
    good |= sampling(GenerationSettings(max_completion_length=3), END, seed=2**63 - 1)

    def status(**changes):
        return httpx2.post(f"{server.url}/v1/completions", json={**good, **changes}, trust_env=False).status_code

    assert status() == 200
    assert status(model="other") == 404
    for changes in (
        {"barred": [1]},
        {"seed": "1"},
        {"max_tokens": True},
        {"prompt": [VOCAB]},
        {"prompt": [[1]]},
        {"top_p": 0.0},
        {"max_tokens": 128},
        {"min_tokens": 4},
        {"logit_bias": {str(VOCAB): -100.0}},
        {"seed": 2**63},
    ):
        assert status(**changes) == 400, changes


def test_every_field_that_a_servers_own_defaults_could_set_is_named(serve):
    server = serve()
    complete(client(server), IDS[:1], seeds=[7], settings={"barred": (3, 4), "min_completion_length": 2})
    [asked] = server.asked
    assert asked == {
        "model": "policy",
        "prompt": IDS[0],
        "return_token_ids": True,
        "seed": 7,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": 8,
        "min_tokens": 2,
        "stop_token_ids": [0],
        "ignore_eos": True,
        "logit_bias": {"3": -100.0, "4": -100.0},
    }


def test_the_samples_of_a_batch_are_under_way_together(serve):
    server = serve()
    together, most = threading.Barrier(len(IDS), timeout=20), []

    def meet(count):
        together.wait()
        most.append(count)

    server.at_completion = meet
    complete(client(server))
    assert len(most) == len(IDS)


def test_it_completes_within_a_running_loop_as_in_a_notebook(serve):
    import asyncio

    one = client(serve())
    wanted = complete(one)

    async def cell():
        return complete(one)

    assert asyncio.run(cell()) == wanted


# -- faults


def reply(status, data):
    def fault(handler, fields):
        handler.answer(data, status)
        return True

    return fault


def changed(**changes):
    """An answer whose choice differs from a good one."""

    def fault(handler, fields):
        choice = {"token_ids": [5] * fields["max_tokens"], "finish_reason": "length", **changes}
        handler.answer({"choices": [{k: v for k, v in choice.items() if v is not None}]})
        return True

    return fault


def test_no_server_is_one_clear_line_that_says_how_to_start_it(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    lines = []
    one = VLLMServer(f"http://127.0.0.1:{port}", END, timeout=0.3, served=["a/b"], tell=lines.append)
    with pytest.raises(GenerationError) as raised:
        complete(one)
    assert "\n" not in str(raised.value)
    start = f"VLLM_SERVER_DEV_MODE=1 vllm serve a/b --host 127.0.0.1 --port {port}"
    assert f"at http://127.0.0.1:{port} cannot be reached" in str(raised.value)
    assert start in str(raised.value)
    assert len(lines) == 1
    assert "Waiting 0.3 s for it" in lines[0]


def test_a_server_that_comes_up_late_is_waited_for(serve, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = []
    timer = threading.Timer(0.5, lambda: started.append(serve(port=port)))
    timer.start()
    try:
        one = VLLMServer(f"http://127.0.0.1:{port}", END, timeout=20.0, tell=lambda line: None)
        assert complete(one) == complete(HFCompleter(tiny_llama(), END))
    finally:
        timer.join()


def test_another_model_is_refused_by_name(serve):
    server = serve(root="another/model")
    with pytest.raises(ConfigError, match="serves another/model, but this run trains my/model"):
        complete(client(server, served=["my/model"]))
    assert complete(client(server, served=["another/model"]))


def test_a_folder_is_the_same_model_however_it_is_written(serve, tmp_path):
    (tmp_path / "model").mkdir()
    server = serve(root=f"{tmp_path}/./model/")
    assert complete(client(server, served=[str(tmp_path / "model")]))


def test_a_server_that_takes_no_weights_is_refused(serve):
    with pytest.raises(ConfigError, match=r"lets nobody change its weights.*MODE=1 vllm serve my/model"):
        complete(client(serve(root="my/model", development=False), served=["my/model"]))


def test_a_prompt_that_is_too_long_for_the_server_is_refused_before_anything_is_asked(serve):
    server = serve(most_tokens=11)
    with pytest.raises(ConfigError, match="reads 11 tokens, but a prompt with its reward token has 4 and"):
        complete(client(server))
    assert not server.asked


def test_the_servers_own_words_are_shown(serve):
    with pytest.raises(GenerationError, match=r"answered 400 to /v1/completions \('Token id 500 is out"):
        complete(client(serve()), [[500]])


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_asked_again(serve, status):
    server = serve()
    wanted = complete(client(server))
    server.faults[:] = [reply(status, {"error": {"message": "busy"}})] * 3
    assert complete(client(server)) == wanted
    assert len(server.asked) == 2 * len(IDS) + 3
    assert not server.reloads


def test_it_gives_up_when_nothing_is_answered_for_the_time_out(serve):
    server = serve()
    server.faults[:] = [reply(503, {"error": {"message": "busy \x1b[31m"}})] * 500
    with pytest.raises(GenerationError, match=r"answered 503 to /v1/completions \('busy \\x1b") as raised:
        complete(client(server, timeout=3.0))
    assert "what was sampled is kept" in str(raised.value)


def test_a_request_without_an_answer_times_out_and_is_asked_again(serve):
    server = serve()

    works_again = threading.Event()

    def hangs(handler, fields):
        works_again.wait(60)
        handler.close_connection = True
        return True

    wanted = complete(client(server))
    server.faults[:] = [hangs]
    assert complete(client(server, timeout=5.0)) == wanted
    server.faults[:] = [hangs] * 500
    with pytest.raises(GenerationError, match=r"gave no answer within 3 s. Raise vllm_server_timeout"):
        complete(client(server, timeout=3.0), IDS[:1])
    works_again.set()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (changed(token_ids=None), "answered no token ids, and text would be tokenized anew"),
        (changed(token_ids=["5"] * 8), "answered no token ids"),
        (changed(prompt_token_ids=[1, 2]), "completed another prompt than it was given"),
        (changed(token_ids=[5] * 7, finish_reason="stop"), "ended a completion after 7 tokens for the reason 'stop'"),
        (changed(token_ids=[5] * 9), "ended a completion after 9 tokens"),
        (changed(token_ids=[3] * 8), "drew a reward token, so it does not heed logit_bias"),
        (reply(200, {"rewards": []}), "answered no completion"),
        (reply(200, [1]), "answered no completion"),
    ],
)
def test_an_answer_that_cannot_be_used_is_refused(serve, fault, words):
    server = serve()
    server.faults[:] = [fault]
    with pytest.raises(GenerationError, match=words):
        complete(client(server), IDS[:1], settings={"barred": (3,)})


def test_a_completion_that_was_broken_off_is_asked_for_again(serve):
    server = serve()
    server.faults[:] = [changed(token_ids=[5], finish_reason="abort")]
    assert complete(client(server)) == complete(HFCompleter(tiny_llama(), END))


def test_what_was_answered_is_handed_on_before_the_error(serve):
    server = serve()
    server.faults[:] = [reply(400, {"error": {"message": "no"}})]
    batches = client(server).complete(IDS, sample_seeds(1, num=5), GenerationSettings(max_completion_length=8))
    indices, _ = next(batches)
    assert len(indices) == 4
    with pytest.raises(GenerationError, match="'no'"):
        next(batches)


# -- weights


def saved(folder, seed):
    tiny_llama(seed=seed).save_pretrained(folder)
    return folder


def test_a_server_samples_from_the_weights_that_it_was_given(serve, tmp_path):
    server = serve()
    one = client(server, served=["base"])
    one.load(saved(tmp_path / "new", seed=5), "step 1", None, first=True)
    assert complete(one) == complete(HFCompleter(tiny_llama(seed=5), END))
    assert complete(one) != complete(HFCompleter(tiny_llama(), END))
    assert server.reloads == [str(tmp_path / "new")]
    assert server.version == "step 1"


@pytest.mark.parametrize("versions", [True, False])
def test_a_server_that_was_started_anew_within_a_batch_gets_the_weights_again(serve, tmp_path, versions):
    first = serve(versions=versions)
    folder, others = saved(tmp_path / "new", seed=5), []

    def dies(count):
        if count == 3 and not first.is_dead:
            first.die()
            # its own weights, the base's, are not those of the policy
            others.append(serve(port=first.server_port, versions=versions))

    first.at_completion = dies
    one = client(first)
    one.load(folder, "step 1", None, first=True)
    assert complete(one, IDS * 3) == complete(HFCompleter(tiny_llama(seed=5), END), IDS * 3)
    assert others[0].reloads == [str(folder)]


def test_a_server_that_was_started_anew_between_two_calls_is_known_by_its_version(serve, tmp_path):
    first = serve()
    one = client(first)
    one.load(saved(tmp_path / "new", seed=5), "step 1", None, first=True)
    wanted = complete(one)
    first.die()
    second = serve(port=first.server_port)
    assert complete(one) == wanted
    assert second.reloads == [str(tmp_path / "new")]


def test_a_checkpoint_that_the_server_cannot_see_is_named(serve, tmp_path):
    one = client(serve())
    with pytest.raises(GenerationError, match=rf"not load the policy's weights.*to see {tmp_path}/none by"):
        one.load(tmp_path / "none", "1", None, first=True)


def test_a_sleeping_engine_is_woken_with_new_weights(stand_in, tmp_path):
    one = VLLMColocated(END, None, {"enable_sleep_mode": True})
    one.load(saved(tmp_path / "old", seed=0), "1", None, first=True)
    one.holds = 0
    assert complete(one) == complete(HFCompleter(tiny_llama(), END))
    assert one.holds is None  # its weights are forgotten
    one.load(saved(tmp_path / "new", seed=5), "2", None, first=True)
    assert complete(one) == complete(HFCompleter(tiny_llama(seed=5), END))
    assert stand_in.made[0].calls == ["sleep", "reload", "reset", "sleep"]


@pytest.fixture
def transfer(monkeypatch):
    """Stand-ins for the names of vllm.distributed.weight_transfer, after its documentation for 0.29; records calls."""
    sent = types.SimpleNamespace(inits=[], weights=[], clients=[])

    class ModuleSource:
        def __init__(self, module):
            self.module = module

    class Engine:
        def __init__(self, source):
            self.source = source

        def send_weights(self):
            sent.weights.append({name: tensor.clone() for name, tensor in self.source.module.named_parameters()})

    class Factory:
        @staticmethod
        def trainer_init(*, init_info, client, source):
            sent.inits.append(init_info)
            return Engine(source)

    class Info:
        def __init__(self, master_address, master_port, world_size, packed=True, *, rank):
            self.master_port, self.world_size, self.rank = master_port, world_size, rank

    def module(name, **names):
        made = types.ModuleType(name)
        vars(made).update(names)
        monkeypatch.setitem(sys.modules, name, made)

    for name in ("vllm", "vllm.distributed", "vllm.utils"):
        module(name)
    module(
        "vllm.distributed.weight_transfer",
        HTTPVLLMWeightSyncClient=lambda url, timeout: sent.clients.append(url),
        ModuleSource=ModuleSource,
        WeightTransferTrainerFactory=Factory,
    )
    module("vllm.distributed.weight_transfer.nccl_engine", NCCLTrainerInitInfo=Info)
    module("vllm.utils.network_utils", get_ip=lambda: "10.0.0.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(vllm_room, "_vllm_version", lambda: (0, 29))
    return sent


def test_weights_go_over_nccl_where_server_and_trainer_have_it(serve, tmp_path, transfer):
    from peft import get_peft_model

    server = serve()
    server.transfer = {"backend": "nccl"}
    one = client(server, group_port=5000)
    model = get_peft_model(tiny_llama(), lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert one.needs_checkpoint  # a server may have to be started from it
    one.load(tmp_path, "1", model, first=True)
    assert not one.needs_checkpoint
    one.load(tmp_path, "2", model, first=True)
    [info] = transfer.inits
    assert (info.master_port, info.world_size, info.rank) == (5000, 3, 0)
    merged, changed_by_lora = dict(tiny_llama().named_parameters()), "model.layers.0.mlp.up_proj.weight"
    for weights in transfer.weights:
        assert weights.keys() == merged.keys()  # the names of the checkpoint, not the adapter's
        assert not torch.equal(weights[changed_by_lora], merged[changed_by_lora])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not server.reloads
    assert server.versions_told == ["1", "2"]


@pytest.mark.parametrize("lacks", ["version", "cuda", "backend"])
def test_weights_are_reloaded_where_one_side_lacks_nccl(serve, tmp_path, transfer, monkeypatch, lacks):
    server = serve()
    server.transfer = {"backend": "ipc" if lacks == "backend" else "nccl"}
    if lacks == "version":
        monkeypatch.setattr(vllm_room, "_vllm_version", lambda: (0, 28))
    if lacks == "cuda":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    client(server).load(saved(tmp_path / "new", seed=5), "1", tiny_llama(), first=True)
    assert server.reloads == [str(tmp_path / "new")]
    assert not transfer.inits


# -- whole runs


def by_vllm(folder, server=None, model=None, **changes):
    options = {"use_vllm": True, "explore_strength": 1.0, "eval_every": 0, **changes}
    if server is not None:
        options |= {"vllm_mode": "server", "vllm_server_base_url": server.url, "vllm_server_timeout": 20.0}
    return make(folder, model=model, **options)


def named(model, name):
    model.config.name_or_path = str(name)
    return model


def rows(folder):
    return Pool.open(folder).to_table().to_pylist()


def test_a_run_by_the_server_has_the_pool_and_weights_of_a_run_without(serve, tmp_path):
    make(tmp_path / "hf", explore_strength=1.0, num_generations=2).train()
    server = serve(root="tiny")
    trainer = by_vllm(tmp_path / "vllm", server, named(tiny_llama(), "tiny"), num_generations=2)
    trainer.train()
    assert rows(tmp_path / "vllm") == rows(tmp_path / "hf")
    # at the start, and when the first round had learned
    assert server.reloads == [str(tmp_path / "vllm" / "vllm")] * 2
    assert [told.rpartition(" ")[2] for told in server.versions_told] == ["0", "2"]
    # round 1 asks for the best token, and each sample with a seed of its own
    assert len({asked["seed"] for asked in server.asked}) == 2 * 2 * len(PROMPTS)


def test_a_run_by_an_engine_in_this_process_has_the_pool_of_a_run_without(stand_in, tmp_path):
    make(tmp_path / "hf", explore_strength=1.0).train()
    by_vllm(tmp_path / "vllm", vllm_enable_sleep_mode=True, vllm_max_model_length=100).train()
    assert rows(tmp_path / "vllm") == rows(tmp_path / "hf")
    [llm] = stand_in.made
    assert llm.options["dtype"] == "float32"
    assert llm.calls.count("reload") == 1


def test_an_adapter_reaches_the_server_merged(serve, tmp_path):
    given = {"peft_config": lora()}
    make(tmp_path / "hf", explore_strength=1.0, given=given).train()
    server = serve(root="tiny")
    trainer = make(
        tmp_path / "vllm",
        model=named(tiny_llama(), "tiny"),
        given=given,
        explore_strength=1.0,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=server.url,
    )
    trainer.train()
    # merged weights round otherwise in the last digit, which no draw here sees
    assert [row["completion_ids"] for row in rows(tmp_path / "vllm")] == [
        row["completion_ids"] for row in rows(tmp_path / "hf")
    ]
    assert len(server.reloads) == 2


def test_new_reward_tokens_are_asked_for_and_never_sampled(serve, tmp_path):
    trainer = by_vllm(tmp_path, reward_token_style="embedding", reward_token_position="first", vllm_mode="server")
    with torch.no_grad():  # the model would draw them often
        trainer.model.get_output_embeddings().weight[list(trainer.reward_tokens.barred)] *= 3
    started, load = [], trainer.vllm.load

    def started_from_the_checkpoint(folder, *args, **options):
        if not started:  # the base lacks the tokens' rows
            started.append(serve(AutoModelForCausalLM.from_pretrained(folder), root=folder))
            trainer.vllm.url = started[0].url
        load(folder, *args, **options)

    trainer.vllm.load = started_from_the_checkpoint
    trainer.train()
    barred = set(trainer.reward_tokens.barred)
    assert not any(set(row["completion_ids"]) & barred for row in rows(tmp_path))
    asked = [set(fields["prompt"]) & barred for fields in started[0].asked]
    best = {trainer.reward_tokens.barred[-1]}
    assert {frozenset(found) for found in asked} == {frozenset(), frozenset(best)}


def test_held_out_prompts_are_completed_by_vllm_the_base_and_the_dial_by_the_model_itself(serve, tmp_path, monkeypatch):
    from datasets import Dataset

    server, calls = serve(root="tiny"), []
    original = HFCompleter.complete

    def counted(self, prompts, seeds, settings, **options):
        if self is trainer.hf_completer:
            calls.append((len(prompts), [strength for _, strength in options["dials"]]))
        return original(self, prompts, seeds, settings, **options)

    monkeypatch.setattr(HFCompleter, "complete", counted)
    trainer = make(
        tmp_path,
        model=named(tiny_llama(), "tiny"),
        given={"eval_dataset": Dataset.from_dict({"prompt": ["a dog", "the sun"]})},
        explore_strength=1.0,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=server.url,
    )
    trainer.train()
    assert calls == [(4, [])]  # the base, before the first step
    assert len(server.asked) == 2 * len(PROMPTS) + 2 * 4
    assert len(server.reloads) == 3  # at steps 0, 2 and 4
    num = len(server.asked)
    trainer.complete(trainer.prompts, sample_seeds(0, num=len(PROMPTS)), [2] * len(PROMPTS), strength=2.0)
    assert calls[1:] == [(len(PROMPTS), [2.0])]
    assert len(server.asked) == num
    # outside train() the caller may have changed the weights
    trainer.evaluate()
    assert len(server.reloads) == 4


def test_two_processes_ask_each_for_its_own_and_the_weights_are_pushed_once(serve, tmp_path):
    server = serve(root="tiny")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "--local-addr=localhost", __file__, server.url, str(tmp_path / "two")]
    paths = [str(Path(vllm_room.__file__).parents[2]), str(Path(__file__).parent)]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        command, env={**os.environ, **environment, "PYTHONWARNINGS": "ignore"}, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    make(tmp_path / "one", explore_strength=1.0).train()
    columns = ("round", "prompt_ids", "completion_ids", "reward")
    one, two = ([[row[name] for name in columns] for row in rows(tmp_path / name)] for name in ("one", "two"))
    assert two == one
    assert len(server.asked) == 2 * len(PROMPTS)
    assert len(server.reloads) == 2


def test_a_server_that_dies_costs_the_samples_under_way_and_the_run_goes_on(serve, tmp_path):
    options = {"generation_batch_size": 4, "save_strategy": "epoch"}
    server = serve(root="tiny")
    by_vllm(tmp_path / "whole", server, named(tiny_llama(), "tiny"), **options).train()

    first = serve(root="tiny")
    stopped = by_vllm(tmp_path / "stopped", first, named(tiny_llama(), "tiny"), **options)
    dies_at(first, len(PROMPTS) + 6, stopped)  # in round 1, within its second batch
    with pytest.raises(GenerationError, match="cannot be reached"):
        stopped.train()
    key = {"samples": len(PROMPTS), "processes": 1, "chunk": 256, "rows": 4}
    kept = PartialRound(tmp_path / "stopped" / "pool", 1, 0, key).completions
    assert 4 <= len(kept) < 8

    second = serve(root="tiny")
    by_vllm(tmp_path / "stopped", second, named(tiny_llama(), "tiny"), **options).train()
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")
    assert len(second.asked) == len(PROMPTS) - len(kept)


def test_a_server_that_is_back_in_time_is_only_a_pause(serve, tmp_path):
    server = serve(root="tiny")
    by_vllm(tmp_path / "whole", server, named(tiny_llama(), "tiny")).train()
    first, others = serve(root="tiny"), []

    def dies(count):
        if count == len(PROMPTS) + 6 and not first.is_dead:
            first.die()
            others.append(serve(root="tiny", port=first.server_port))

    first.at_completion = dies
    by_vllm(tmp_path / "paused", first, named(tiny_llama(), "tiny")).train()
    assert rows(tmp_path / "paused") == rows(tmp_path / "whole")
    assert len(others[0].reloads) == 1


def test_a_server_that_dies_while_held_out_prompts_are_completed_costs_no_learning(serve, tmp_path):
    from datasets import Dataset

    options = {
        "model": named(tiny_llama(), "tiny"),
        "given": {"eval_dataset": Dataset.from_dict({"prompt": ["a dog", "the sun"]})},
        "explore_strength": 1.0,
        "use_vllm": True,
        "vllm_mode": "server",
        "num_rounds": 1,
        "save_strategy": "epoch",
    }
    first = serve(root="tiny")
    stopped = make(tmp_path, vllm_server_base_url=first.url, **options)
    dies_at(first, len(PROMPTS) + 1, stopped)
    with pytest.raises(GenerationError, match="cannot be reached"):
        stopped.train()
    second = serve(root="tiny")
    again = make(tmp_path, vllm_server_base_url=second.url, **{**options, "model": named(tiny_llama(), "tiny")})
    again.train()
    assert again.state.global_step == 2
    assert len(second.asked) == 4  # the held-out prompts alone


def test_a_run_with_vllm_is_another_run_than_one_without_whatever_its_server(serve, tmp_path):
    server = serve(root="tiny")
    by_vllm(tmp_path, server, named(tiny_llama(), "tiny"), num_rounds=1).train()
    other = serve(root="tiny")
    by_vllm(tmp_path, other, named(tiny_llama(), "tiny"), num_rounds=2).train()
    assert other.reloads
    with pytest.raises(ConfigError, match="use_vllm: True there, False here"):
        make(tmp_path, model=named(tiny_llama(), "tiny"), explore_strength=1.0, eval_every=0, num_rounds=3).train()


# -- settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_vllm": True}, "explore_strength=2.0 mixes the logits.*With use_vllm=True set explore_strength=1"),
        ({"vllm_mode": "server"}, "vllm_mode='server' would do nothing without use_vllm=True"),
        ({"vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size=2 would do nothing without use_vllm=True"),
        (
            {"use_vllm": True, "explore_strength": 1.0, "vllm_server_base_url": "http://127.0.0.1:1"},
            "would do nothing with vllm_mode='colocate'. Leave it out, or set vllm_mode='server'",
        ),
        (
            {"use_vllm": True, "explore_strength": 1.0, "vllm_mode": "server", "vllm_enable_sleep_mode": True},
            "vllm_enable_sleep_mode=True would do nothing with vllm_mode='server'",
        ),
        ({"use_vllm": True, "explore_strength": 1.0, "vllm_mode": "here"}, "vllm_mode='here' is not one of"),
        (
            {"use_vllm": True, "explore_strength": 1.0, "vllm_gpu_memory_utilization": 1.5},
            "is not a share of the memory",
        ),
        (
            {"use_vllm": True, "explore_strength": 1.0, "vllm_mode": "server", "vllm_server_timeout": 0.0},
            "is no number of seconds",
        ),
        ({"use_vllm": True, "explore_strength": 1.0, "vllm_tensor_parallel_size": 0}, "is below 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        QuarkConfig(str(tmp_path), use_cpu=True, **changes)


def test_the_paper_preset_goes_with_vllm(tmp_path):
    assert QuarkConfig(str(tmp_path), use_cpu=True, preset="paper", use_vllm=True).use_vllm


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://a", "http://127.0.0.1:8000/v1", "http://"])
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match="Write http://host:port"):
        VLLMServer(url, END)


def test_a_password_in_the_url_is_not_shown():
    one = VLLMServer("http://me:secret@127.0.0.1:9", END, timeout=0.1, tell=lambda line: None)
    with pytest.raises(GenerationError) as raised:
        complete(one)
    assert "secret" not in str(raised.value)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_colocated_without_vllm_says_what_to_install(tmp_path):
    with pytest.raises(ConfigError, match=r"pip install 'quark-lm\[vllm\]'"):
        by_vllm(tmp_path)


def test_one_model_over_the_gpus_of_several_processes_is_refused(tmp_path, stand_in):
    args = QuarkConfig(str(tmp_path), use_cpu=True, use_vllm=True, explore_strength=1.0, vllm_tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="vllm_tensor_parallel_size=2 spreads one model over the GPUs"):
        vllm_room.vllm_completer(args, END, dtype=torch.float32, num_processes=2, served=(), tell=print)


# -- the real one


@pytest.fixture
def real_server(tmp_path):
    """A `vllm serve` of a tiny Llama with a head size that its kernels take."""
    pytest.importorskip("vllm")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=0,
        bos_token_id=None,
    )
    base = tmp_path / "base"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["vllm", "serve", str(base), "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
    command += ["--gpu-memory-utilization", "0.2", "--enforce-eager", "--max-model-len", "256"]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        yield base, f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


@pytest.mark.gpu
@pytest.mark.slow
def test_a_real_vllm_serve_completes_reloads_and_bars(real_server, tmp_path):
    base, url = real_server
    one = VLLMServer(url, END, timeout=300.0, served=[str(base)])
    one.load(base, "step 0", None, first=True)
    settings = {"barred": tuple(range(100, VOCAB)), "min_completion_length": 2}
    greedy = complete(one, IDS * 8, settings={**settings, "temperature": 0.0})
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).cuda().eval()
    wanted = complete(HFCompleter(model, END), IDS * 8, settings={**settings, "temperature": 0.0})
    # bfloat16 sums of another order may part where two words are as likely
    assert sum(a[0] == b[0] for a, b in zip(greedy, wanted, strict=True)) > 30
    drawn = complete(one, IDS * 8, settings=settings)
    assert not any(set(ids) & set(settings["barred"]) or 0 in ids[:2] for ids in drawn)
    assert len({tuple(ids) for ids in drawn}) > len(IDS)
    new = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with torch.no_grad():
        new.get_output_embeddings().weight.neg_()
    new.save_pretrained(tmp_path / "new")
    one.load(tmp_path / "new", "step 1", None, first=True)
    assert complete(one, IDS * 8, settings={**settings, "temperature": 0.0}) != greedy
    one.load(base, "step 0", None, first=True)
    assert complete(one, IDS * 8, settings={**settings, "temperature": 0.0}) == greedy


@pytest.mark.gpu
@pytest.mark.slow
def test_a_real_engine_in_this_process_completes_reloads_and_bars(real_server, tmp_path):
    pytest.importorskip("vllm")
    base, _ = real_server
    options = {"dtype": "bfloat16", "gpu_memory_utilization": 0.2, "max_model_len": 256, "enable_sleep_mode": True}
    one = VLLMColocated(END, None, {**options, "generation_config": "vllm"})
    settings = {"barred": tuple(range(100, VOCAB)), "temperature": 0.0}
    one.load(base, "step 0", None, first=True)
    greedy = complete(one, IDS * 8, settings=settings)
    assert not any(set(ids) & set(settings["barred"]) for ids in greedy)
    one.load(base, "step 0", None, first=True)
    assert complete(one, IDS * 8, settings=settings) == greedy


def one_of_two() -> int:
    """What a process of a test above runs."""
    by_vllm(
        Path(sys.argv[2]),
        types.SimpleNamespace(url=sys.argv[1]),
        named(tiny_llama(), "tiny"),
        per_device_train_batch_size=2,
    ).train()
    leave()
    return 0


if __name__ == "__main__":
    end_after(one_of_two)

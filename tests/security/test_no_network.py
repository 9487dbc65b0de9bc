"""Importing quark_lm and the whole offline path open no socket: train, generate, evaluate, on a model in a folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tiny import tiny_gpt2, tiny_tokenizer

# Every way by which Python makes a socket or looks a name up ends in one of these; the audit hook sees those of C too.
SCRIPT = """
import sys

def watch(event, arguments):
    if event.startswith("socket."):
        raise SystemExit(f"SOCKET {event} {arguments}")

sys.addaudithook(watch)
import _socket, socket

def refuse(*arguments, **options):
    raise SystemExit(f"SOCKET {arguments}")

for module in (socket, _socket):
    for name in ("getaddrinfo", "gethostbyname", "create_connection", "create_server", "socketpair"):
        if hasattr(module, name):
            setattr(module, name, refuse)

class Socket(_socket.socket):
    def __init__(self, *arguments, **options):
        refuse(*arguments)

socket.socket = Socket
if sys.argv[1] == "import":
    import importlib, pkgutil
    import quark_lm
    for module in pkgutil.walk_packages(quark_lm.__path__, "quark_lm."):
        importlib.import_module(module.name)
    from quark_lm import *
    print("imported", len([name for name in sys.modules if name.startswith("quark_lm")]))
elif sys.argv[1] == "connect":
    socket.create_connection(("127.0.0.1", 9))
else:
    import json
    from quark_lm.cli import main
    for argv in json.loads(sys.argv[2]):
        code = main(argv)
        if code:
            raise SystemExit(code)
"""


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    # the hub is not switched off: nothing here may need that
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(cwd / "home")}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def test_the_watch_sees_a_connection(tmp_path):
    done = python("connect", cwd=tmp_path)
    assert done.returncode == 1
    assert "SOCKET" in done.stderr


def test_importing_every_module_opens_no_socket(tmp_path):
    done = python("import", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 30


def test_training_generating_and_evaluating_open_no_socket(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "base")
    tiny_tokenizer(pad=False).save_pretrained(tmp_path / "base")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the cat {i}"}) + "\n" for i in range(12)))
    settings = {
        "model_name_or_path": "base",
        "reward_funcs": "sentiment",
        "prompts": prompts,
        "eval_prompts": prompts,
        "output_dir": "run",
        "use_peft": True,
        "num_rounds": 1,
        "steps_per_round": 1,
        "num_quantiles": 2,
        "num_generations": 2,
        "num_eval_generations": 1,
        "per_device_train_batch_size": 2,
        "max_completion_length": 4,
        "use_cpu": True,
    }
    commands = [
        ["train", *(f"--{name}={value}" for name, value in settings.items())],
        ["generate", "run", "the cat", "--strength", "2", "--max-completion-length", "4"],
        ["pool", "run"],
        ["evaluate", "run", "--prompts", "prompts.jsonl", "--num-generations", "1", "--max-completion-length", "4",
         "--scorer", "repetition", "--evaluator", "base"],
    ]  # fmt: skip
    done = python("run", json.dumps(commands), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "SOCKET" not in done.stderr
    assert (tmp_path / "run" / "results.json").is_file()

"""`quark train` in several processes: a process that dies ends the run, and the same command goes on, on two nodes too.

The nodes are two torchrun agents with an address each on loopback, which meet as those of two machines do.
"""

import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import recipe
import torch
from safetensors.torch import load_file
from tiny import tiny_llama, tiny_tokenizer

from quark_lm import Pool, cli, processes
from quark_lm.cli import main
from quark_lm.errors import ConfigError, ModelError, TrainingError
from quark_lm.policy import Joint, Policy
from quark_lm.resuming import no_pickles

EVALUATED = ("eval_reward", "eval_reward_se", "eval_dist_2", "eval_reference_perplexity")
ROOT = Path(__file__).parents[2]


def flags(folder, output_dir, batch):
    """A run of two rounds of three steps."""
    fields = {
        "model_name_or_path": folder / "model", "prompts": folder / "prompts.jsonl", "output_dir": folder / output_dir,
        "eval_prompts": folder / "held-out.jsonl", "reward_funcs": "recipe:mortal_reward", "num_rounds": 2,
        "steps_per_round": 3, "per_device_train_batch_size": batch, "prompts_first_round": 8, "prompts_per_round": 6,
        "num_generations": 3, "max_completion_length": 6, "num_quantiles": 3, "heldout_share": 0.2, "draw": "all",
        "adam_epsilon": 0.01, "learning_rate": 5e-3, "logging_steps": 1, "use_cpu": "true", "report_to": "none",
        "save_strategy": "epoch", "early_stop": "false",
    }  # fmt: skip
    return [text for name, value in fields.items() for text in (f"--{name}", str(value))]


def save_inputs(folder):
    """The files that `flags` names."""
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in recipe.PROMPTS]
    (folder / "prompts.jsonl").write_text("".join(lines))
    (folder / "held-out.jsonl").write_text("".join(lines[:5]))  # three for one process, two for the other


def start(folder, name, command):
    path = [ROOT / "src", ROOT / "tests", ROOT / "tests" / "invariants", os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(str(part) for part in path if part)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"MORTAL": str(folder / "died"), "FAILS": str(folder / "fails")}
    with (folder / f"{name}.txt").open("w") as log:
        return subprocess.Popen([sys.executable, "-m", *command], env=environment, stdout=log, stderr=log)


def started(folder, name, reward, accelerate="fsdp2"):
    command = ["quark_lm.cli", "train", "--accelerate", accelerate, "--num_processes", "2", *flags(folder, name, 4)]
    return start(folder, name, [*command, "--reward_funcs", f"recipe:{reward}"])


@pytest.fixture(scope="module", autouse=True)
def run(tmp_path_factory):
    """(folder, process) of a run that loses one of its two processes; started beside the other tests."""
    folder = tmp_path_factory.mktemp("run")
    save_inputs(folder)
    (folder / "fails").touch()
    process = started(folder, "run", "mortal_reward")
    yield folder, process
    process.terminate()
    process.wait()


def test_a_model_too_large_for_one_rank_stops_when_a_forward_failed_in_the_middle():
    joint = Joint([model := torch.nn.Linear(1, 1)], None, True)
    joint._largest = float  # of one rank
    joint.parts = [model]
    joint.go(model)
    with pytest.raises(TrainingError, match="lower generation_batch_size"):  # `went` was not called
        joint.go(model)


@pytest.mark.parametrize("is_known", [True, False])
def test_a_model_gathered_whole_goes_again_after_a_forward_that_failed_in_the_middle(is_known):
    joint = Joint([model := torch.nn.Linear(1, 1)], None, True)
    joint._together = lambda model: joint.whole.append(model)  # it fits
    if is_known:
        joint.whole = [model]
    joint.go(model)
    joint.go(model)  # a smaller batch; `went` was not called


def test_new_rows_of_an_adapter_on_a_tied_model_are_refused(tmp_path):
    case = recipe.CASES["gpt2-tied-lora"]
    trainer = recipe.trainer(tmp_path, case)

    class Sharding:
        is_fsdp2 = True

    with pytest.raises(ConfigError, match="reward_token_style='text'"):
        Policy(trainer.model, accelerator=Sharding())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--accelerate", "zero3"], "DeepSpeed is not supported. Use --accelerate fsdp2"),
        (["--accelerate", "fsdp"], "neither a file of `accelerate config` nor one of ddp, fsdp2"),
        (["--accelerate", "ddp", "--num_processes", "1"], "Give 2 or more"),
        (["--accelerate", "ddp", "--num-processes", "1"], "Give 2 or more"),
        (["--num_processes", "2"], "Give --accelerate ddp or fsdp2 too"),
    ],
)
def test_processes_that_cannot_be_started_are_one_line(arguments, told, capsys):
    assert main(["train", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_one_process_a_gpu_needs_two_of_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="this machine has 1 GPUs"):
        processes.launch("ddp", None, [])


@pytest.mark.parametrize("content", ["a: [1", "", "- 1", "num_processes: 2", "distributed_type: no such"])
def test_a_broken_file_of_accelerate_is_one_line(content, tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text(content)
    assert main(["train", "--accelerate", str(tmp_path / "broken.yaml")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "broken.yaml is no file of `accelerate config`" in line


@pytest.mark.parametrize(
    ("more", "port"),
    [
        ("", "0"),
        ("num_machines: 1\n", "0"),
        ("main_process_port: 29511\n", None),
        ("num_machines: 2\nmachine_rank: 1\nmain_process_ip: node-0\nmain_process_port: 29511\n", None),
        ("num_machines: 2\nmain_process_ip: node-0\n", None),
    ],
)
def test_a_free_port_is_taken_where_no_other_machine_must_know_it(more, port, tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text(f"distributed_type: MULTI_GPU\nnum_processes: 4\n{more}")
    told = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", told.append)
    assert processes.launch(str(path), None, []) == 0
    assert told[0].main_process_port == (port and int(port))  # None: accelerate reads the file's


def test_the_exit_code_of_one_process_is_handed_on(tmp_path, capfd):
    (tmp_path / "one.yaml").write_text("distributed_type: 'NO'\nuse_cpu: true\n")
    assert main(["train", "--accelerate", str(tmp_path / "one.yaml"), "--debug"]) == 2
    err = capfd.readouterr().err
    assert "Nothing is named as model_name_or_path" in err
    assert "Traceback" in err  # the process was told --debug


def test_wrong_input_is_told_by_the_first_process_unless_it_is_anothers_own(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli, "_ANOTHER_TELLS_SECONDS", 0.0)
    assert main(["train", "--num_processes", "2"]) == 2
    assert capsys.readouterr().err.startswith("quark: process 1: --num_processes is for --accelerate")
    # torchrun stops it, since the first has ended
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["train", "--num_processes", "2"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(cli, "_say", lambda text, say=cli._say: (os.kill(os.getpid(), signal.SIGTERM), say(text)))
    assert main(["train", "--num_processes", "2"]) == 2  # a signal that comes meanwhile adds nothing
    assert capsys.readouterr().err.startswith("quark: --num_processes is for --accelerate")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_an_error_of_one_process_alone_is_told_unless_another_was_lost(rank, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(cli, "_ANOTHER_TELLS_SECONDS", 0.0)
    monkeypatch.setattr(cli.typer.main, "get_command", lambda app: 1 / 0)
    assert main(["train"]) == 1
    assert "failed: ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["train"]) == 1
    assert capsys.readouterr().err == ""


def test_what_the_first_process_finds_is_found_here_where_there_is_one():
    assert processes.first_tells(lambda: "found") == "found"


def test_fsdp_in_one_process_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"alone. Start several by --accelerate fsdp2 or by torchrun"):
        recipe.trainer(tmp_path, recipe.CASES["gpt2-tied"], fsdp=True)


@pytest.mark.parametrize(("checkpoint", "error"), [(False, pickle.UnpicklingError), ("checkpoint-3", ModelError)])
def test_only_a_checkpoint_is_blamed_for_what_cannot_be_unpickled(checkpoint, error):
    with pytest.raises(error), no_pickles(checkpoint):
        raise pickle.UnpicklingError("of a callback")


def test_processes_do_not_start_processes(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["train", "--accelerate", "ddp"]) == 2
    assert "one of several already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading: false"),
        ({"cpu_offload": True}, "fsdp_offload_params: false"),
    ],
)
def test_what_fsdp_would_do_behind_our_back_is_refused(settings, told, tmp_path):
    with pytest.raises(ConfigError, match=told):
        recipe.trainer(tmp_path, recipe.CASES["gpt2-tied"], fsdp=True, fsdp_config=settings)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP1 is not supported"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "this process is alone"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "offload_params: false"),
    ],
)
def test_what_accelerate_launch_was_told_is_looked_at_too(names, told, tmp_path, monkeypatch):
    settings = recipe.config(tmp_path, recipe.CASES["gpt2-tied"])
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=told):
        recipe.QuarkTrainer(tiny_llama(), recipe.reward, settings, None)


@pytest.mark.filterwarnings("ignore:The reward tokens")
def test_a_process_that_dies_ends_the_run_and_two_nodes_go_on(run, monkeypatch, capsys):
    folder, process = run
    assert process.wait(timeout=900) == 1
    after = time.time() - (folder / "died").stat().st_mtime
    log = (folder / "run.txt").read_text()
    assert "process 1 was killed by SIGKILL, so the others were stopped" in log
    assert log.count("quark: failed") == 1  # the rank that is left says nothing of a connection that was lost
    assert "Traceback" not in log
    assert after < 120  # of a machine that may be busy; a second or two of an idle one
    assert sorted(path.name for path in (folder / "run").glob("checkpoint-*")) == ["checkpoint-3"]
    assert not (folder / "run" / "results.json").exists()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=quark"]
    command += [f"--rdzv-endpoint=127.0.0.1:{port}"]
    train = ["-m", "quark_lm.cli", "train", *flags(folder, "run", 4), "--fsdp", "true"]
    nodes = [
        start(folder, f"node-{number}", [*command, f"--local-addr=127.0.0.{number + 1}", *train]) for number in range(2)
    ]
    monkeypatch.syspath_prepend(ROOT / "tests" / "invariants")
    assert main(["train", *flags(folder, "one", 8)]) == 0  # meanwhile, in one process
    try:
        codes = [node.wait(timeout=900) for node in nodes]
    finally:
        for node in nodes:
            node.terminate()
            node.wait()
    logs = [(folder / f"node-{number}.txt").read_text() for number in range(2)]
    assert codes == [0, 0], logs
    assert sum("goes on in round 2" in log for log in logs) == 1  # one of them tells

    two, one = told(folder / "run"), told(folder / "one")
    assert len(one["loss"]) == 6
    assert np.allclose(two["loss"], one["loss"], rtol=1e-6, atol=0)
    for name in EVALUATED:  # some of them see the order of the completions
        assert len(one[name]) == 2
        assert np.allclose(two[name], one[name], rtol=1e-6, atol=0), name
    tables = [Pool.open(folder / name).to_table().select(["completion_ids", "reward"]) for name in ("run", "one")]
    assert tables[0].equals(tables[1])
    weights = [load_file(folder / name / "model" / "model.safetensors") for name in ("run", "one")]
    assert weights[0].keys() == weights[1].keys()
    for key, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][key], rtol=0, atol=2e-6), key

    # the optimizer's state is FSDP's
    assert main(["train", *flags(folder, "run", 8)]) == 2
    assert "written with FSDP, and this run goes without it" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:The reward tokens")
@pytest.mark.parametrize(
    ("reward", "accelerate", "words"),
    [("failing_reward", "fsdp2", "failing_reward"), ("breaking_reward", "ddp", "the logits are not finite")],
)
def test_what_fails_one_process_on_held_out_prompts_ends_all_and_loses_no_learning(reward, accelerate, words, run):
    folder, _ = run
    (folder / "fails").touch()
    process = started(folder, reward, reward, accelerate)
    try:
        assert process.wait(timeout=900) == 2
        log = (folder / f"{reward}.txt").read_text()
        assert "Traceback" not in log
        assert re.search(f"^quark: .*{words}", log, re.MULTILINE)  # the first process tells it, of the second
        assert [path.name for path in (folder / reward).glob("checkpoint-*")] == ["checkpoint-3"]
        (folder / "fails").unlink()
        process = started(folder, reward, reward, accelerate)
        assert process.wait(timeout=900) == 0, (folder / f"{reward}.txt").read_text()
    finally:
        process.terminate()
        process.wait()
    lines = told(folder / reward)
    assert len(lines["loss"]) == 6
    assert len(lines["eval_reward"]) == 2
    assert "goes on" in (folder / f"{reward}.txt").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="slows single threads down as Linux does")
@pytest.mark.parametrize("ending", ["end_after(run)", "cli.main = run; cli.entry()"])
def test_a_gloo_thread_that_still_frees_tensors_does_not_abort_a_process_that_is_done(ending, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SLOW_THREADS + ending)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    both = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**environment, "LOCAL_RANK": rank, "STORE": str(tmp_path / "store")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    for process in both:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 3, error  # by sys.exit(run()) one of the two aborts, four times in five
        assert out == "a line\na handler\n"
        assert "terminate" not in error


# Gloo's own threads get the processor when nobody else wants it, so that they free the last tensors after all else.
SLOW_THREADS = """
import atexit, os, sys
import torch.distributed
from quark_lm import cli
from quark_lm.processes import end_after

def run():
    atexit.register(print, "a handler")
    store, rank = torch.distributed.FileStore(os.environ["STORE"], 2), int(os.environ["LOCAL_RANK"])
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    sys.group = torch.distributed.group.WORLD  # FSDP holds it until the end
    torch.distributed.all_reduce(torch.ones(4))
    one = min(os.sched_getaffinity(0))
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {one})
        with open(f"/proc/self/task/{thread}/comm") as name:
            if "gloo" in name.read():
                os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
    for _ in range(3):
        torch.distributed.all_gather([torch.empty(4), torch.empty(4)], torch.ones(4))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    print("a line")
    return 3

"""


def told(folder):
    """By name: the figures of a run's metrics, line by line."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines if name in line] for name in ("loss", *EVALUATED)}

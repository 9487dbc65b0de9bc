"""Prompts, completions and names of strangers, wherever they are printed or written into a page: text, and no more."""

import io
import json
import re
import warnings

import pytest
import yaml
from rich.console import Console
from test_cli import files, finished_run, quiet_libraries  # noqa: F401 - fixtures
from tiny import tiny_gpt2, tiny_tokenizer

from quark_lm import export
from quark_lm.cli import main
from quark_lm.demo import TASKS, show
from quark_lm.evaluation.tables import show_dial, show_evaluation
from quark_lm.pool import Pool
from quark_lm.progress import Display
from quark_lm.reward_tokens import RewardTokens
from quark_lm.shown import json_text, markdown, printable, printable_lines

# a terminal's colour, title, link, clipboard and screen; C1 controls; a carriage return and a backspace over what was
# there; text that runs backwards; rich's markup, open and closed; HTML; Markdown; a table's bar
HOSTILE = (
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b]8;;http://a.b\x1b\\link\x1b]8;;\x1b\\ \x1b]52;c;YQ==\x07 \x1b[2J"
    " \x9b31m \x85 \r over\x08 \u202e backwards \u2028 [bold red]rich[/] [/nothing] [link=http://a.b]x[/link]"
    " <script>alert(1)</script> <img src=x onerror=alert(1)> ![a](javascript:alert(1)) `code` | cell | \\"
)
CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def tame(text: str, sign: str = "[bold red]rich[/]") -> None:
    assert not CONTROLS.search(text), CONTROLS.findall(text)
    assert sign in re.sub(r"\s+", " ", text)  # markup is shown, not obeyed


def terminal(width: int = 400) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width, legacy_windows=False)


def written(console: Console) -> str:
    """What was printed, without what rich itself writes to move the cursor."""
    return console.file.getvalue()


def test_the_hostile_text_is_hostile():
    assert CONTROLS.search(HOSTILE)
    console = terminal()
    with pytest.raises(Exception, match="nothing"):  # rich takes it for a closing tag
        console.print(HOSTILE)


def test_text_for_a_terminal():
    tame(printable(HOSTILE))
    tame(printable_lines(HOSTILE + "\n" + HOSTILE))
    kept = "naïve 文字 🙂 «\xa0oui\u202f!\xa0» 日本\u3000語 می\u200cخواهم 👩\u200d💻 Silben\xadtrennung"
    assert printable(kept) == kept
    assert printable("\u202e\u200f\u2066\u061c\U000e0041\ufeff\ud800\x85\u2028\u2029") == "�" * 10


def test_json_for_a_terminal_is_the_same_json():
    text = json_text({"prompt": HOSTILE, "naïve": ["文字", "\udc80"]}, indent=2)
    tame(text)
    assert json.loads(text) == {"prompt": HOSTILE, "naïve": ["文字", "\udc80"]}
    assert "文字" in text


def test_markdown_shows_every_mark():
    told = markdown(HOSTILE)
    assert "<" not in told
    assert not re.search(r"(?<!\\)[|`*\[\]]", told)
    assert not CONTROLS.search(told)
    assert markdown("_x_ ~~y~~") == r"\_x\_ \~\~y\~\~"


def test_errors_and_warnings_are_one_line(capsys):
    for argv in (
        ["pool", f"runs/{HOSTILE}"],
        ["generate", HOSTILE, "a"],
        ["generate", f"../../../{HOSTILE}", "a"],
        ["evaluate", "--from", HOSTILE],
        ["train", f"--model_name_or_path={HOSTILE}", "--prompts=a", "--reward_funcs=b"],
        ["train", f"--{HOSTILE}=3"],
        ["train", "--config", HOSTILE],
        ["check-reward", HOSTILE],
        [HOSTILE],
        ["generate", "--nothing" + HOSTILE, "a"],
    ):
        assert main([*argv, "--debug"] if argv[0] == "pool" else argv) in (1, 2), argv
        captured = capsys.readouterr()
        assert not CONTROLS.search(captured.err + captured.out), argv
        assert len(captured.err.splitlines()) == 1 or "Traceback" in captured.err, captured.err


@pytest.mark.parametrize(
    "name", ["../../../etc/passwd", "/etc", "..", "a/../../b", "file:///etc/passwd", "~root", "\0", "con:", ""]
)
def test_a_models_name_that_is_a_path_elsewhere_is_one_line(name, capsys):
    assert main(["generate", name, "a"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_what_a_run_prints_of_its_samples(capsys):
    console = terminal()
    display = Display(console=console)
    with display.bar(f"score {HOSTILE}", 3) as advance:
        advance(3)
    display.line(HOSTILE)
    display.completions("round 1", [(HOSTILE, HOSTILE, 0.5)])
    told = re.sub(r"\x1b\[(\?25[lh]|\d*[AKG]|\d*[mK])", "", written(console)).replace("\r", "")
    tame(told)
    assert told.count("<script>") >= 3


def test_quark_pool_and_its_json(tmp_path, capsys):
    pool = Pool.open(tmp_path / "pool", create=True)
    texts = [HOSTILE + str(i) for i in range(4)]
    pool.append(0, {"reward": [0.1, 0.2, 0.3, 0.4], "prompt": texts, "completion": texts})
    for flags in ([], ["--json"]):
        assert main(["pool", str(tmp_path), "--show-bottom", *flags]) == 0
        told = capsys.readouterr().out
        assert not CONTROLS.search(told)
        assert "[bold" in told


def test_quark_generate_and_its_json(finished_run, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr("quark_lm.steering.generate_batches", lambda *a, **k: iter([(0, HOSTILE), (1, HOSTILE)]))
    for flags in ([], ["--json"]):
        assert main(["generate", str(finished_run), "[bold]a", "b", *flags]) == 0
        told = capsys.readouterr().out
        tame(told.replace("\\u001b", "").replace("\n", " "), "[bold red]rich[/]")


INTERVAL = {"mean": 0.5, "low": 0.4, "high": 0.6}


def evaluation(name):
    figures = {"mean": INTERVAL, "wanted": INTERVAL, "missing": {"completions": 1}}
    text = {"dist_2": INTERVAL, "dist_3": INTERVAL, "diversity": INTERVAL}
    counts = {"prompts": 2, "completions_per_prompt": [1, 1], "without_words": 0}
    return {
        "task": None,
        "made": {"model": name, "reward_tokens": None, "strengths": [1.0], "from_token": "worst"},
        "scorers": {name: {"role": None}},
        "evaluator": {"model": name, "tokens": "its own"},
        "counts": counts,
        "scores": {name: figures},
        "text": text,
        "notes": [f"{name} gave no score"],
        "curve": [{"strength": 1.0, "counts": counts, "scores": {name: figures}, "text": text, "notes": [name]}],
    }


@pytest.mark.parametrize("show_it", [show_evaluation, show_dial])
def test_the_tables_of_an_evaluation(show_it, tmp_path):
    console = terminal()
    show_it(console, evaluation(HOSTILE), tmp_path / "[/nothing]")
    told = written(console)
    assert not CONTROLS.search(told)
    assert told.count("[/nothing]") >= 3


def test_the_demo_shows_samples_and_a_command_that_is_safe_to_copy(tmp_path):
    import shlex

    prompt = HOSTILE + "\"; touch /tmp/x; $(id) `id` '"
    row = dict.fromkeys(("perplexity", "dist_2", "dist_3", "diversity"), INTERVAL)
    row |= {name: {"mean": INTERVAL, "wanted": INTERVAL} for name in ("reward", "independent")}
    results = {
        "held_out_prompts": 1,
        "completions_per_prompt": 1,
        "systems": [{"system": "base", **row}],
        "samples": [{"prompt": prompt, "base": HOSTILE, "quark": HOSTILE}],
    }
    console = terminal(1000)
    show(console, TASKS["sentiment"], results, tmp_path)
    told = re.sub(r"\x1b\[[01]m", "", written(console))  # rich's own bold of the prompt
    tame(told)
    (line,) = [line for line in told.splitlines() if "quark generate" in line]
    assert shlex.split(line) == ["quark", "generate", str(tmp_path), printable(prompt), "--strength", "2"]


def test_the_model_card(tmp_path):
    tokens = RewardTokens("text", "first", (HOSTILE + "```\n", "good\n"), ((5,), (6,)))
    named = HOSTILE + "\nlicense: mit\n---\n# Other"
    results = {
        "model": named,
        "license": named,
        "systems": [{"system": named, HOSTILE: INTERVAL, "text": HOSTILE}],
        "scorers": {HOSTILE: {"name": HOSTILE, "version": HOSTILE}},
    }
    card = export.model_card(tokens, results)
    assert not CONTROLS.search(card)
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(head)["license"] == yaml.safe_load(head)["base_model"] == named
    assert "\n# Other" not in body
    outside = re.sub(r"(?s)```python\n.*?\n```\n", "", body)
    outside = re.sub(r"\\`|`[^`\n]*`", "", outside)  # what a code span holds is shown as it is
    assert "<" not in outside
    assert not re.search(r"(?<!\\)\]\(", outside)
    assert body.count("\n```") == 2
    ast_of = re.search(r"(?s)```python\n(.*?)\n```", body)[1]
    compile(ast_of, "card", "exec")
    table = [line for line in body.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    last = export.model_card(tokens, {"last_round": {f"eval_{HOSTILE}": 0.5}})
    assert "<img" not in re.sub(r"(?s:```python.*?\n```)|\\`|`[^`\n]*`", "", last)


def test_prompts_of_any_text_go_through_a_model_as_text():
    from quark_lm.steering import generate

    told = generate(tiny_gpt2(), tiny_tokenizer(), ["[bold]<script>"], max_completion_length=3, seed=0)
    assert len(told) == 1


def test_warnings_of_strangers_text_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("quark_lm.pool.Pool.open", lambda path: warnings.warn(HOSTILE, stacklevel=1))
    main(["pool", str(tmp_path)])
    err = capsys.readouterr().err
    assert "warning: " in err
    assert not CONTROLS.search(err)

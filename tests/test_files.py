"""Files that are read as lines."""

import json

from quark_lm.evaluation.completions import read_completions
from quark_lm.files import first_line, numbered_lines
from quark_lm.pool import read_initial
from quark_lm.prompts import load_prompts

# what `str.splitlines` splits at and JSON allows within a text
BREAKS = "a\u2028b\u2029c\x85d"


def test_lines_end_at_newlines_alone_and_keep_their_numbers(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(f"\ufeff{BREAKS}\r\n\n \nb".encode())
    assert numbered_lines(tmp_path / "a.jsonl") == [(1, BREAKS), (4, "b")]


def test_every_reader_of_json_lines_takes_any_text(tmp_path):
    rows = [{"prompt": BREAKS, "completion": BREAKS, "reward": 0.5}, {"prompt": "p", "completion": "c", "reward": 1.0}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    assert read_initial(path) == {name: [row[name] for row in rows] for name in ("prompt", "completion", "reward")}
    assert read_completions(path).completions == [BREAKS, "c"]
    assert list(load_prompts(path)["prompt"]) == [BREAKS, "p"]


def test_an_error_is_told_by_its_first_line():
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"

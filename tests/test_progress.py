"""What a person watches: one line a round that fits the terminal, and bars that fit it too."""

import io
import re

import pytest
from rich.console import Console

from quark_lm.progress import Display, make_console

METRICS = {
    "round": 0,
    "reward": 0.5123,
    "eval_reward": 0.511,
    "eval_sentiment": 0.511,
    "eval_sentiment_independent": 0.4231,
    "eval_sentiment_independent_se": 0.02,
    "eval_dist_2": 0.9,
    "eval_reference_perplexity": 14.9,
    "reference_perplexity": 14.23,
    "kl": 0.123,
    "token_auc": 0.71,
    "share_above_best": 0.23,
    "nll": 2.31,
    "tokens_per_second": 812.0,
}


def lines_of(width, *metrics, terminal=True):
    file = io.StringIO()
    display = Display(console=Console(file=file, width=width, force_terminal=terminal, color_system=None))
    display.independent_names = ["sentiment_independent", "other"]
    for one in metrics:
        display.round_line(9, 12, one)
    return file.getvalue().splitlines()


def test_a_rounds_line_fits_80_columns_with_the_independent_scorers_figure():
    [line] = lines_of(80, METRICS)
    assert line == "round 10/12  reward 0.512  eval 0.511  indep 0.423  ppl 14.2  KL 0.12  AUC 0.71"
    assert len(line) <= 80


def test_a_wider_terminal_shows_more_of_a_round():
    [line] = lines_of(120, METRICS)
    assert line.endswith("AUC 0.71  above best 23%  NLL 2.31  tokens/s 812")


def test_several_independent_scorers_stand_side_by_side_and_the_rewards_own_is_none_of_them():
    [line] = lines_of(120, METRICS | {"eval_other": 0.25})
    assert "indep 0.423/0.250" in line
    [line] = lines_of(120, {k: v for k, v in METRICS.items() if k != "eval_sentiment_independent"})
    assert "indep" not in line


def test_a_round_is_one_line_whatever_its_figures():
    wild = METRICS | {"reward": -123456.789, "eval_reward": -99999.5, "reference_perplexity": 1e9}
    assert len(lines_of(80, wild, METRICS)) == 2
    assert len(lines_of(20, METRICS, terminal=False)) == 1


def test_lines_into_a_pipe_are_120_wide_and_never_wrapped(capsys):
    assert make_console().width == make_console(stderr=True).width == 120
    Display().line("word " * 100)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_in_a_pipe_a_bar_is_one_line_as_it_begins(capsys):
    with Display().bar("round 1 explore", 1536, "samples") as advance:
        assert capsys.readouterr().err == "round 1 explore: 1,536 samples\n"
        advance(512)
    with Display(bars=False).bar("round 1 explore", 1536, "samples"), Display(enabled=False).bar("score", 2):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("width", [80, 120])
def test_a_bar_fits_the_terminal(width):
    file = io.StringIO()
    display = Display(console=Console(file=file, width=width, force_terminal=True, color_system=None))
    with display.bar("score sentiment-independent", 1536, "completions") as advance:
        advance(512)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n").split("\n")
    assert any("512/1536" in line for line in shown)
    assert max(map(len, shown)) <= width

"""The prompt files that the recipes name, written to runs/prompts/.

    python recipes/make_prompts.py demo                 # of the prompts that Quark ships, a fifth held out
    python recipes/make_prompts.py realtoxicityprompts  # these three from the hub: not run here
    python recipes/make_prompts.py openwebtext
    python recipes/make_prompts.py wikitext

Held-out prompts are chosen by a rule on their text (`quark_lm.prompts.is_held_out`). The test prompts of the paper
(DExperts' `nontoxic_prompts-10k.jsonl` and `sentiment_prompts-10k/`) are not on the hub: name the files that you have
with --test. Of RealToxicityPrompts they are then what is held out, as in the authors' own script; the other two are
not trained on them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from quark_lm.demo import TASKS, demo_prompts
from quark_lm.prompts import flat, is_held_out, load_prompts, split_held_out


def realtoxicityprompts(records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """{"prompt", "toxicity", "continuation"} of RealToxicityPrompts' records (Gehman et al. 2020)."""
    for record in records:
        prompt, continuation = record["prompt"], record["continuation"]
        yield {"prompt": prompt["text"], "toxicity": prompt["toxicity"], "continuation": continuation["text"]}


def openwebtext(documents: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Sentences cut in the middle, those whose first half has 4 to 10 words, as Liu et al. 2021 made their prompts.

    They split sentences and words with nltk; here at the ends of sentences and at white space.
    """
    for document in documents:
        for sentence in re.split(r"(?<=[.!?])\s+", document["text"]):
            words = sentence.split()
            half = len(words) // 2
            if 4 <= half <= 10:
                yield {"prompt": " ".join(words[:half]), "continuation": " ".join(words[half:])}


def wikitext(lines: Iterable[dict[str, Any]], tokenizer: Any, prefix: int = 32, after: int = 128) -> Iterator[dict]:
    """Prefixes of 32 tokens with the 128 tokens that follow; lines that are shorter, or headings, are left out."""
    for line in lines:
        text = line["text"].strip()
        ids = tokenizer(text)["input_ids"] if text and not text.startswith("=") else []
        if len(ids) >= prefix + after:
            parts = tokenizer.batch_decode([ids[:prefix], ids[prefix : prefix + after]])
            yield {"prompt": parts[0], "continuation": parts[1]}


def write(name: str, rows: Iterable[dict[str, Any]], folder: Path, held_out: Any, num_held_out: int | None) -> None:
    """NAME-train.jsonl and NAME-held-out.jsonl; what is held out beyond `num_held_out` is in neither."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = dict.fromkeys(("train", "held-out"), 0)
    with open(folder / f"{name}-train.jsonl", "w") as train, open(folder / f"{name}-held-out.jsonl", "w") as out:
        for row in rows:
            part, file = ("held-out", out) if held_out(row) else ("train", train)
            if part == "held-out" and counts[part] == num_held_out:
                continue
            counts[part] += 1
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{folder / name}: {counts['train']} train, {counts['held-out']} held out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=["demo", "realtoxicityprompts", "openwebtext", "wikitext"])
    parser.add_argument("--folder", type=Path, default=Path("runs/prompts"))
    parser.add_argument("--test", nargs="*", default=[], help="files of test prompts that must not be trained on")
    parser.add_argument("--num-train", type=int, default=85_000, help="of OpenWebText, which is large")
    args = parser.parse_args()
    if args.source == "demo":
        for task in TASKS:
            for part, rows in zip(("train", "held-out"), split_held_out(demo_prompts(task)), strict=True):
                args.folder.mkdir(parents=True, exist_ok=True)
                rows.to_json(args.folder / f"{task}-{part}.jsonl", force_ascii=False)
                print(f"{args.folder / task}-{part}.jsonl: {len(rows)} prompts")
        return
    from datasets import load_dataset

    test = {prompt for file in args.test for prompt in load_prompts(file)["prompt"]}

    def in_test(row: dict[str, Any]) -> bool:
        return flat(row["prompt"]) in test

    def held_out(row: dict[str, Any]) -> bool:
        return is_held_out(row["prompt"], 0.05)

    if args.source == "realtoxicityprompts":
        rows = realtoxicityprompts(load_dataset("allenai/real-toxicity-prompts", split="train"))
        if test:
            write(args.source, rows, args.folder, in_test, None)
            return
        # the paper tests on 10,000 prompts that are not toxic themselves
        rows = (row for row in rows if not is_held_out(row["prompt"], 0.2) or (row["toxicity"] or 0.0) < 0.5)
        write(args.source, rows, args.folder, lambda row: is_held_out(row["prompt"], 0.2), 10_000)
    elif args.source == "openwebtext":
        documents = load_dataset("Skylion007/openwebtext", split="train", streaming=True)
        first = (next(openwebtext([document]), None) for document in documents)  # one sentence a document
        rows = (row for row in first if row is not None and not in_test(row))
        rows = itertools.islice(rows, int(args.num_train / 0.95))
        write(args.source, rows, args.folder, held_out, 5_000)
    else:
        from transformers import AutoTokenizer

        lines = load_dataset("Salesforce/wikitext", "wikitext-103-raw-v1", split="train")
        rows = (row for row in wikitext(lines, AutoTokenizer.from_pretrained("gpt2")) if not in_test(row))
        write(args.source, rows, args.folder, held_out, 5_000)


if __name__ == "__main__":
    main()

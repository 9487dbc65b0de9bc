"""What candidate reward tokens (text tags) do to the untrained model, before any training.

By task and candidate: the AUC with which log p(y given best) - log p(y given worst), a token, tells the base model's
own best samples from its worst; the perplexity of what it writes with the best tag, over that without one; and, for
repetition, the diversity of its greedy text with the worst tag, the best one and the dial at 2. A tag that means
nothing (AUC .5) or that does harm costs rounds of training. A candidate that is done is not done again.

    python experiments/tags.py repetition
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from quark_lm import demo
from quark_lm.check_reward import check
from quark_lm.evaluation.metrics import diversity
from quark_lm.packaged import fastest_dtype, load_model
from quark_lm.prompts import split_held_out
from quark_lm.reward_tokens import RewardTokens
from quark_lm.steering import generate

RESULTS = Path(__file__).parents[1] / "docs" / "results"
GREEDY_PROMPTS, GREEDY_TOKENS, NUM_SAMPLES, SEED = 48, 64, 256, 0

# (worst, best); what stands between them is not asked for
CANDIDATES = {
    "sentiment": [
        ("Sentiment: very negative.\n", "Sentiment: very positive.\n"),
        ("Mood: very sad and hopeless.\n", "Mood: very happy and wonderful.\n"),
        ("The following is terrible and disappointing.\n", "The following is wonderful and delightful.\n"),
        ("A bad, sad, disappointing story.\n", "A good, happy, wonderful story.\n"),
        ("Tone: very angry and disappointed.\n", "Tone: very happy and delighted.\n"),
    ],
    "toxicity": [
        ("Tone: very hateful and insulting.\n", "Tone: very kind and respectful.\n"),
        ("The following is offensive and insulting.\n", "The following is kind and respectful.\n"),
        ("Language: vulgar, insulting.\n", "Language: clean, respectful.\n"),
        ("Tone: very rude.\n", "Tone: very polite.\n"),
        ("Toxicity: very high.\n", "Toxicity: very low.\n"),
    ],
    "repetition": [
        (
            "Dull text that repeats itself again and again.\n",
            "Well-written text that always says something new.\n",
        ),
        ("Style: very repetitive.\n", "Style: very varied.\n"),
        ("Bad writing:\n", "Good writing:\n"),
        ("Quality: terrible.\n", "Quality: excellent.\n"),
        ("The same thing again and again and again.\n", "\n"),
        ("Again and again and again and again.\n", "From the news:\n"),
        ("Again and again and again and again.\n", "From a novel:\n"),
        ("Again and again and again and again.\n", "An essay.\n"),
        ("Again and again and again and again.\n", "By Jane Austen.\n"),
        ("Again and again and again and again.\n", "...\n"),
        ("A list of the same line.\n", "A magazine article.\n"),
        ("Loop, loop, loop, loop, loop.\n", "Once upon a time there was a writer.\n"),
    ],
}


def greedy_diversity(model, tokenizer, prompts: list[str], tags: RewardTokens | None, **how) -> dict[str, float]:
    """Mean diversity (tokens, n = 2, 3, 4) of greedy text, and its standard error over the prompts."""
    texts = generate(
        model, tokenizer, prompts, reward_tokens=tags, max_completion_length=GREEDY_TOKENS, temperature=0.0, **how
    )
    values = [diversity(tokenizer(text)["input_ids"]) for text in texts]
    values = np.asarray([value for value in values if value is not None and not np.isnan(value)])
    return {"mean": round(float(values.mean()), 4), "se": round(float(values.std() / len(values) ** 0.5), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=CANDIDATES)
    parser.add_argument("--model", default="smollm2")
    args = parser.parse_args()
    path = RESULTS / f"tags-{args.task}.json"
    found = json.loads(path.read_text()) if path.exists() else {"model": args.model, "seed": SEED, "candidates": []}
    done = {(row["worst"], row["best"]) for row in found["candidates"]}
    task = demo.TASKS[args.task]
    model, tokenizer = load_model(args.model, dtype=fastest_dtype())
    train, held_out = split_held_out(demo.demo_prompts(args.task))
    prompts = held_out["prompt"][:GREEDY_PROMPTS]
    if args.task == "repetition" and "greedy" not in found:
        found["greedy"] = greedy_diversity(model, tokenizer, prompts, None)
        print("without a tag", found["greedy"], flush=True)
    new = [pair for pair in CANDIDATES[args.task] if pair not in done]
    if not new:
        return
    report = check(  # one set of samples for all, so that candidates differ by their tags alone
        task.reward,
        train,
        model=(model, tokenizer),
        num=NUM_SAMPLES,
        tag_sets=new,
        max_completion_length=task.settings["max_completion_length"],
        temperature=task.settings.get("temperature", 1.0),
        seed=SEED,
        tell=lambda text: print(text, flush=True),
    )
    for (worst, best), figures in zip(new, report.tags, strict=False):  # the last is of a bare new token
        row = {"worst": worst, "best": best, "auc": round(figures.auc, 3), "auc_se": round(figures.auc_se, 3)}
        row["drift"] = round(figures.drift, 2)
        if args.task == "repetition":
            tags = RewardTokens.create(model, tokenizer, num_quantiles=2, texts=[worst, best])
            row["greedy_worst"] = greedy_diversity(model, tokenizer, prompts, tags, quantile=0)
            row["greedy_best"] = greedy_diversity(model, tokenizer, prompts, tags)
            row["greedy_dial"] = greedy_diversity(model, tokenizer, prompts, tags, strength=2.0)
        print(row, flush=True)
        found["candidates"].append(row)
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

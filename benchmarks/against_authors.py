"""Our default against the authors' schedule (preset="authors", the whole model trained): one process each.

The same model, prompts, reward and samples; measured as against_grpo.py does. The authors' fields are those of
docs/differences.md; of their schedule stay the batch of 128 and the linear decay, cut to as many draws.

    python benchmarks/against_authors.py --json FILE
"""

from against_grpo import main

if __name__ == "__main__":
    main("authors", "against_authors", __doc__)

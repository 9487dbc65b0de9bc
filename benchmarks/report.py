"""How a benchmark tells what it found."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from quark_lm.run_folder import hardware


def tell(figures: dict[str, Any], args: argparse.Namespace, **settings: Any) -> None:
    """Prints the figures with the options, other settings and the machine, and writes them to --json."""
    options = {name: value for name, value in vars(args).items() if name not in ("json", "only_memory")}
    result = {
        **figures,
        "settings": options | settings,
        "threads": torch.get_num_threads(),
        "hardware": hardware(),
        "torch": torch.__version__,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")

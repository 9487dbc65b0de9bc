"""Quark: unlearn an unwanted behaviour from any causal language model, given a reward function.

The public names are loaded when they are first used: `import quark_lm` imports no torch, so that the command line
answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "QuarkConfig": "config",
    "QuarkTrainer": "trainer",
    "Pool": "pool",
    "RewardTokens": "reward_tokens",
    "load_reward": "rewards",
    "load_prompts": "prompts",
    "generate": "steering",
    "QuarkError": "errors",
}

# Spelled out, and not made from _HOMES: type checkers read it to know what is public.
__all__ = [
    "QuarkConfig",
    "QuarkTrainer",
    "Pool",
    "RewardTokens",
    "load_reward",
    "load_prompts",
    "generate",
    "QuarkError",
    "__version__",
]

if TYPE_CHECKING:
    from .config import QuarkConfig
    from .errors import QuarkError
    from .pool import Pool
    from .prompts import load_prompts
    from .reward_tokens import RewardTokens
    from .rewards import load_reward
    from .steering import generate
    from .trainer import QuarkTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'quark_lm' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)

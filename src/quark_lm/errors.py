"""The errors that Quark raises: one root and a few categories, each also a builtin error that callers may catch."""


class QuarkError(Exception):
    """Root of every error that is the user's to mend; the command line prints it as one line."""


class ConfigError(QuarkError, ValueError):
    """A field or an argument holds a value that cannot work."""


class DataError(QuarkError, ValueError):
    """Prompts, a file or a table are not what was announced."""


class ModelError(QuarkError, ValueError):
    """The model or its tokenizer lacks something that Quark needs."""


class RewardError(QuarkError, RuntimeError):
    """A reward function failed, or returned what cannot be ranked."""


class PoolError(QuarkError, RuntimeError):
    """The pool on disk is damaged, belongs to another run, or could not be written."""


class GenerationError(QuarkError, RuntimeError):
    """vLLM did not answer, or answered what cannot be used."""


class TrainingError(QuarkError, RuntimeError):
    """A run cannot go on as it is: its loss or a gradient is not finite, or the disk refuses its files."""

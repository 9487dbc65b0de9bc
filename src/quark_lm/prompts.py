"""Prompts: reads them, turns them into token ids, and says where a reward token stands in each.

Files are read by `datasets`.
"""

from __future__ import annotations

import contextlib
import csv
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .errors import ConfigError, DataError, ModelError
from .files import first_line, numbered_lines, parsed

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_READERS = {
    ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".txt": "text"
}  # fmt: skip


_MISSING = ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"]  # in the other columns of a table


def load_prompts(source: str | Path, *, split: str = "train", revision: str | None = None) -> Dataset:
    """A data set with a `prompt` column, from a file (JSONL, Parquet, CSV, TSV, or text, a prompt a line) or the hub.

    Other columns stay: they reach the reward functions. RealToxicityPrompts' `{"text": ...}` prompts are read as they
    are published.

    Args:
        source: a file, or the name of a data set on the hub ("owner/name", or "owner/name:config"), maybe with its
            split ("owner/name[test]", "owner/name[train[:2000]]").
        split, revision: of a hub data set that names no split.

    Raises: DataError when there is no such file, it is empty, unreadable or has no `prompt` column.
    """
    from datasets import load_dataset

    path = Path(source).expanduser()
    kind = _READERS.get(path.suffix.lower())
    if path.is_dir():
        raise DataError(f"{source} is a folder, and prompts are read from one file. Name the file.")
    if kind and not path.is_file():
        raise DataError(f"There is no file {source}. Give the path of a JSONL, Parquet, CSV or text file of prompts.")
    if not kind:
        if path.is_file():
            endings = ", ".join(_READERS)
            raise DataError(
                f"{source} ends with none of {endings}, so its format is unknown. Rename it to say what it is."
            )
        named = re.fullmatch(r"([^\[\]]+)\[(.+)\]", str(source))
        whole, split = named.groups() if named else (str(source), split)
        name, _, config = whole.partition(":")
        try:
            with _uncounted():
                dataset = load_dataset(name, config or None, split=split, revision=revision)
        except Exception as error:
            raise DataError(
                f"{source} is neither a file here nor a data set that could be loaded ({first_line(error)}). Give a"
                " path, or a hub name that exists."
            ) from error
    else:
        if not path.read_bytes()[:65536].strip():
            raise DataError(f"{source} is empty, so there is nothing to sample from. Put at least one prompt in it.")
        if kind == "json":
            _check_json(path)
        # a byte-order mark is no part of the first prompt
        options: dict[str, Any] = {"encoding": "utf-8-sig"} if kind == "text" else {}
        if path.suffix.lower() == ".tsv":
            options["delimiter"] = "\t"
        try:
            if kind == "csv":
                options |= _prompts_as_text(path, options.get("delimiter", ","))
            with _uncounted():
                dataset = load_dataset(kind, data_files=str(path), split="train", **options)
        except Exception as error:
            cause = error.__cause__ or error
            raise DataError(
                f"{source} could not be read as {kind} ({first_line(cause)}). Mend the file, or rename it to"
                " its format."
            ) from error
        if kind == "text":
            dataset = dataset.rename_column("text", "prompt")
    return checked(dataset, str(source))


def _prompts_as_text(path: Path, delimiter: str) -> dict[str, Any]:
    """Options of pandas' reader: else a prompt "None" would be a missing one, and one of 1984 a number."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        names = next(csv.reader(file, delimiter=delimiter), [])
    return {
        "converters": {"prompt": str},
        "keep_default_na": False,
        "na_values": {name: _MISSING for name in names if name != "prompt"},
    }


@contextlib.contextmanager
def _uncounted() -> Iterator[None]:
    """Within it, `datasets` does not tell its maker's server of each load, those of local files too."""
    from datasets import config

    before, config.HF_UPDATE_DOWNLOAD_COUNTS = config.HF_UPDATE_DOWNLOAD_COUNTS, False
    try:
        yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = before


def _check_json(path: Path) -> None:
    """Raises: DataError unless the file holds objects alone: pyarrow 26 ends the process at a line that is `null`."""
    try:
        rows: list[Any] = []
        for number, line in numbered_lines(path):
            try:
                rows.append(parsed(line))
            except ValueError as error:
                if rows:
                    raise ValueError(f"line {number}: {error}") from error
                rows = [parsed(path.read_text(encoding="utf-8-sig"))]  # one value on several lines
                break
    except (OSError, ValueError) as error:
        raise DataError(f"{path} could not be read as json ({first_line(error)}). Mend the file.") from error
    rows = rows[0] if len(rows) == 1 and isinstance(rows[0], list) else rows
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}: row {number} is {str(row)[:40]!r}, which is no record. Write"
                ' {"prompt": "..."} for each prompt.'
            )


def checked(dataset: Any, name: str = "train_dataset") -> Dataset:
    """The data set, its `prompt` column flattened and without empty or repeated prompts, whose number it warns of.

    A prompt that comes again with other values in the other columns stays: the rewards may tell the two apart.

    Args:
        dataset: a `datasets.Dataset`; or what becomes one: a list of prompts (text or messages) or of records with a
            `prompt`, or what `load_prompts` reads.

    Raises: DataError when it is something else, there is no `prompt` column, or no prompt.
    """
    if isinstance(dataset, (str, Path)):
        return load_prompts(dataset)
    dataset = as_dataset(dataset, name)
    if "prompt" not in (dataset.column_names or []):
        columns = ", ".join(dataset.column_names or []) or "none"
        raise DataError(
            f"{name} has no column `prompt` (its columns: {columns}). Rename the one that holds the prompts."
        )
    seen: set[str] = set()
    keep, empty = [], 0
    given = list(dataset["prompt"])
    prompts = [flat(prompt) for prompt in given]
    others = [list(dataset[name]) for name in dataset.column_names if name != "prompt"]
    for i, prompt in enumerate(prompts):
        key = repr((prompt, *(values[i] for values in others)))
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            empty += 1
        elif key not in seen:
            seen.add(key)
            keep.append(i)
    if not keep:
        raise DataError(f"{name} holds no prompt, so there is nothing to sample from. Give at least one.")
    repeated = len(prompts) - empty - len(keep)
    if empty or repeated:
        warnings.warn(
            f"{name}: left out {empty} empty and {repeated} repeated of {len(prompts)} prompts.", stacklevel=2
        )
    if any(ours is not prompt for ours, prompt in zip(prompts, given, strict=True)):
        from datasets import Dataset

        flattened = Dataset.from_dict({"prompt": prompts})  # without other columns no rows would be left to add it to
        dataset = dataset.remove_columns("prompt").add_column("prompt", prompts) if others else flattened
    return dataset if len(keep) == len(prompts) else dataset.select(keep)


def as_dataset(data: Any, name: str) -> Dataset:
    """The data set that a list of prompts, or of records, becomes; a data set stays. Raises: DataError."""
    from datasets import Dataset, IterableDataset

    if isinstance(data, Dataset):
        return data
    if isinstance(data, IterableDataset):
        raise DataError(
            f"{name} is an IterableDataset, which cannot say how many prompts it has, and a round draws from all of"
            " them. Give Dataset.from_list(list(it)), or of a part: it.take(10_000)."
        )
    if isinstance(data, dict) and data and all(isinstance(part, Dataset) for part in data.values()):
        raise DataError(
            f"{name} holds {len(data)} data sets ({', '.join(map(str, data))}), and prompts are of one. Name it:"
            f" {name}[{next(iter(data))!r}]."
        )
    if not isinstance(data, (list, tuple)):
        raise DataError(
            f"{name} is of type {type(data).__name__}. Give a datasets.Dataset, a list of prompts or records, or a"
            " file's path."
        )
    records = [row if isinstance(row, dict) else {"prompt": row} for row in data]
    columns = list(dict.fromkeys(column for row in records for column in row))
    try:
        return Dataset.from_dict({column: [row.get(column) for row in records] for column in columns or ["prompt"]})
    except (ValueError, TypeError) as error:  # pyarrow's are these too
        raise DataError(
            f"{name} has values of several types in one column ({first_line(error)}). Give every prompt as text, or"
            " every prompt as messages."
        ) from error


def flat(prompt: Any) -> Any:
    """A prompt as text or messages; RealToxicityPrompts wraps its text in a record with the scores."""
    if isinstance(prompt, dict) and isinstance(prompt.get("text"), str):
        return prompt["text"]
    return prompt


def is_conversational(prompt: Any) -> bool:
    return isinstance(prompt, list)


def as_completion(prompt: Any, text: str) -> Any:
    """A completion as a reward function gets it: text, or after a conversation a message of the assistant's."""
    return [{"role": "assistant", "content": text}] if is_conversational(prompt) else text


def completion_texts(
    tokenizer: PreTrainedTokenizerBase, prompts: EncodedPrompts, completion_ids: list[list[int]]
) -> list[str]:
    """The text of each completion, one a prompt, as it stands after the prompt's; a conversation's is a message's own.

    The decoders of Llama's and Mistral's first tokenizers leave out the space before a text's first word, which here
    stands in the middle of one.
    """
    alone: Any = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    last = [ids[-1:] for ids in prompts.ids]
    heads: Any = tokenizer.batch_decode(last, skip_special_tokens=True)
    joined = [[*end, *ids] for end, ids in zip(last, completion_ids, strict=True)]
    wholes: Any = tokenizer.batch_decode(joined, skip_special_tokens=True)
    return [
        text if is_conversational(prompt) or not whole.startswith(head) else whole.removeprefix(head)
        for prompt, text, head, whole in zip(prompts.prompts, alone, heads, wholes, strict=True)
    ]


def is_held_out(prompt: Any, share: float = 0.2, purpose: str = "") -> bool:
    """Whether a prompt belongs to the held-out part: a rule on its text, whatever the order or the other prompts.

    purpose: parts that are held out for different ends are independent: a part of what the first left over is not
        empty.
    """
    return zlib.crc32(f"{purpose}{prompt!r}".encode()) % 10_000 < share * 10_000


def split_held_out(dataset: Dataset, share: float = 0.2) -> tuple[Dataset, Dataset]:
    """(train, held out) by `is_held_out`."""
    held = [is_held_out(prompt, share) for prompt in dataset["prompt"]]
    return (
        dataset.select([i for i, out in enumerate(held) if not out]),
        dataset.select([i for i, out in enumerate(held) if out]),
    )


@dataclass
class EncodedPrompts:
    """Prompts ready to be completed.

    Attributes:
        prompts: as the data set has them (text or messages), for the reward functions.
        texts: what the model reads, as text.
        ids: what the model reads, as token ids, without a reward token.
        token_at: index into `ids` before which the reward token is put.
        columns: the data set's other columns.
    """

    prompts: list[Any]
    texts: list[str]
    ids: list[list[int]]
    token_at: list[int]
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, indices: Sequence[int]) -> EncodedPrompts:
        """The prompts of these indices, in their order; an index may repeat."""
        return EncodedPrompts(
            [self.prompts[i] for i in indices],
            [self.texts[i] for i in indices],
            [self.ids[i] for i in indices],
            [self.token_at[i] for i in indices],
            {name: [values[i] for i in indices] for name, values in self.columns.items()},
        )


def encode(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, position: str = "first", max_length: int | None = None
) -> EncodedPrompts:
    """The data set's prompts as token ids; conversational ones through the tokenizer's chat template.

    Args:
        position: of the reward token, as in `QuarkConfig.reward_token_position`. "first" in a conversation is the
            start of the last user message.
        max_length: the most token ids that a prompt may have.

    Raises: DataError for a prompt that is longer; ModelError for a conversation without a chat template; ConfigError
        when not even one token fits.
    """
    if max_length is not None and max_length < 1:
        raise ConfigError(
            f"max_completion_length and the longest reward token are {1 - max_length} tokens too many for the model's"
            " context, which then has no room for a prompt. Lower max_completion_length."
        )
    prompts = list(dataset["prompt"])
    texts, all_ids, token_at = [], [], []
    for number, prompt in enumerate(prompts):
        text, ids, at = _encode_one(prompt, tokenizer, position)
        if not ids:
            raise ModelError(
                f"Prompt {number} has no tokens and the tokenizer adds no beginning-of-text token, so there is nothing"
                " to complete. Leave such prompts out."
            )
        if max_length is not None and len(ids) > max_length:
            raise DataError(
                f"Prompt {number} has {len(ids)} tokens, but only {max_length} fit beside the reward token and the"
                f" completion in the model's context. Shorten it or lower max_completion_length ({text[:40]!r} ...)."
            )
        texts.append(text)
        all_ids.append(ids)
        token_at.append(at)
    columns = {name: list(dataset[name]) for name in dataset.column_names if name != "prompt"}
    return EncodedPrompts(prompts, texts, all_ids, token_at, columns)


_MARK = "\ue000"  # of the private use area: in no text


def _encode_one(prompt: Any, tokenizer: PreTrainedTokenizerBase, position: str) -> tuple[str, list[int], int]:
    if not is_conversational(prompt):
        if not isinstance(prompt, str):
            raise DataError(f"A prompt is of type {type(prompt).__name__}. Give text, or a list of messages.")
        ids = list(tokenizer(prompt)["input_ids"])
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
            ids.pop()
        at = {"first": _after_bos(ids, tokenizer), "before_bos": 0, "before_completion": len(ids)}[position]
        return prompt, ids, at
    if tokenizer.chat_template is None:
        raise ModelError(
            "The prompts are conversations, but the tokenizer has no chat template to turn them into text. Use an"
            " instruct model, set tokenizer.chat_template, or give plain text."
        )

    def templated(messages: list[Any]) -> str:
        try:
            # cast: its type covers every output, and tokenize=False gives text
            return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # a template is a model's own, and raises what it likes
            raise DataError(
                f"A conversation does not go through the model's chat template ({first_line(error)}):"
                f" {prompt!r:.80}. Mend it, or leave it out."
            ) from error

    if not prompt or not all(isinstance(message, dict) for message in prompt):
        raise DataError(f"A prompt is a list, but not of messages ({prompt!r:.80}). Give text, or a list of messages.")
    text = templated(prompt)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template writes its own special tokens
    if position == "before_completion":
        return text, ids, len(ids)
    if position == "before_bos":
        return text, ids, 0
    users = [i for i, m in enumerate(prompt) if m.get("role") == "user" and isinstance(m.get("content"), str)]
    # a mark in the message's place tells where it begins: its own text may stand in the template as well
    marked = [{**m, "content": _MARK} if i in users[-1:] else m for i, m in enumerate(prompt)]
    front, found, _ = templated(marked).partition(_MARK)
    if not found or not text.startswith(front):
        return text, ids, _after_bos(ids, tokenizer)
    # the ids before the message, encoded apart, end where the message begins: templates put a special token or a
    # newline there
    before = list(tokenizer(front, add_special_tokens=False)["input_ids"])
    return text, ids, len(before) if ids[: len(before)] == before else _after_bos(ids, tokenizer)


def _after_bos(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.bos_token_id is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id)

"""Files on disk: read as lines or JSON, written whole or not at all, told by their hashes. No torch here."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# The key of a line's, or a file's, own checksum, by which a changed digit is seen.
CHECK = "crc32"


def checksum(line: Mapping[str, Any]) -> int:
    """Of the JSON that it becomes."""
    return zlib.crc32(json.dumps(line).encode())


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """(number from 1, line) of each line of a JSONL file that is not blank. Raises: OSError, UnicodeDecodeError."""
    # not splitlines: JSON's texts may hold its other breaks, such as U+2028, as they are
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def parsed(text: str | bytes) -> Any:
    """`json.loads`, of which every refusal is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def first_line(error: BaseException) -> str:
    """Of what it says; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def append_line(path: Path, line: str) -> None:
    """Adds a line; it is on the disk when this returns. Raises: OSError, and then nothing of it stays."""
    rest = f"{line}\n".encode()
    with path.open("ab", buffering=0) as file:  # a buffer would be written again when the file is closed
        end = file.seek(0, os.SEEK_END)
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` when all is on the disk, and leaves nothing when that fails."""
    temporary = path.with_name(path.name + ".partial")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

"""What is noted while a file is read: its fingerprint, and the records that were left out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from malora_dist.errors import DataError

#: So many of the records left out are told one by one.
_SHOWN = 3


class Reading:
    """The reading of one file or data set.

    Args:
        corrupt_data: ``refuse``: the first record that cannot be used is an error; ``skip``: it is left out.
        allow_special_tokens: whether a record that spells a special token can be used.

    Attributes:
        skipped: how many records were left out.
        reasons: of the first few, why; each starts with ``FILE:LINE`` or the record's number.
        special_tokens: how often the records that are used spell each special token.
        first_special_token: where the first of them stands.
    """

    def __init__(self, corrupt_data: str = "refuse", allow_special_tokens: bool = True) -> None:
        if corrupt_data not in ("refuse", "skip"):
            raise ValueError(f"corrupt_data={corrupt_data!r}")
        self.skips = corrupt_data == "skip"
        self.skipped = 0
        self.reasons: list[str] = []
        self.special_tokens = Counter[str]()
        self.first_special_token = ""
        self._allows_special_tokens = allow_special_tokens
        self._hash = hashlib.sha256()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all content so far: of a local file the bytes (unpacked), of a data set the records."""
        return self._hash.hexdigest()

    def add(self, content: bytes) -> bytes:
        """Take what comes next into account; returns it."""
        self._hash.update(content)
        return content

    @contextmanager
    def record(self) -> Iterator[None]:
        """A block that works on one record.

        Raises:
            DataError: the block's, unless records are skipped; then the block ends and the error is noted.
        """
        try:
            yield
        except DataError as error:
            if not self.skips:
                raise
            self.skipped += 1
            if len(self.reasons) < _SHOWN:
                self.reasons.append(str(error))

    def note_special_tokens(self, found: Counter[str], where: str) -> None:
        """Take the special tokens that a record spells into account.

        Raises:
            DataError: there are some, and they are not allowed.
        """
        if found and not self._allows_special_tokens:
            raise DataError(
                f"{where}: its text spells the special token {next(iter(found))}, which is not allowed; "
                "remove it, or set allow_special_tokens_in_data=true"
            )
        if found and not self.special_tokens:
            self.first_special_token = where
        self.special_tokens += found

    def check_not_empty(self, path: str, count: int) -> None:
        """Refuse a file of which nothing can be used.

        Raises:
            DataError: there are no records, or all have been left out.
        """
        if count == 0 and self.skipped:
            raise DataError(f"{path}: none of its {self.skipped} records can be used, for example {self.reasons[0]}")
        if count == 0:
            raise DataError(f"{path}: holds no records; name another file or remove the task")

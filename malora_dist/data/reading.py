"""What is noted while a file is read: its fingerprint, and the records that were left out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from malora_dist.errors import DataError

#: So many of the records left out are told one by one.
_SHOWN = 3


class Reading:
    """The reading of one file or data set.

    Args:
        corrupt_data: ``refuse``: the first record that cannot be used is an error; ``skip``: it is left out.

    Attributes:
        skipped: how many records were left out.
        reasons: of the first few, why; each starts with ``FILE:LINE`` or the record's number.
    """

    def __init__(self, corrupt_data: str = "refuse") -> None:
        if corrupt_data not in ("refuse", "skip"):
            raise ValueError(f"corrupt_data={corrupt_data!r}")
        self.skips = corrupt_data == "skip"
        self.skipped = 0
        self.reasons: list[str] = []
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

    def check_not_empty(self, path: str, count: int) -> None:
        """Refuse a file of which nothing can be used.

        Raises:
            DataError: there are no records, or all have been left out.
        """
        if count == 0 and self.skipped:
            raise DataError(f"{path}: none of its {self.skipped} records can be used, for example {self.reasons[0]}")
        if count == 0:
            raise DataError(f"{path}: holds no records; name another file or remove the task")

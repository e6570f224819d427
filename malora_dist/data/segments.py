"""A sample as text: what all formats are rendered to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """A stretch of a sample's text; the loss is taken on the trained ones."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Example:
    """One sample.

    Attributes:
        segments: in order; their texts joined are the whole sample. At least one is trained.
        reference: what a generated answer is compared with; empty where the format has none.
        templated: a chat template wrote the text, BOS and ends of turns included.
        source: ``FILE:LINE`` or the record's number, for messages.
    """

    segments: tuple[Segment, ...]
    reference: str = ""
    templated: bool = False
    source: str = ""

    @property
    def prompt(self) -> str:
        """The text before the last trained segment."""
        return "".join(segment.text for segment in self.segments[: self.last_trained])

    @property
    def answer(self) -> str:
        """The text of the last trained segment."""
        return self.segments[self.last_trained].text

    @property
    def last_trained(self) -> int:
        """Where the last trained segment stands."""
        return max(i for i, segment in enumerate(self.segments) if segment.trained)

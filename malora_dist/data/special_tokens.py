"""Special tokens that data spells: `</s>` inside a text becomes the token that ends it, not five characters."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from malora_dist.data.records import Record
from malora_dist.data.segments import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SpecialTokens:
    """A tokenizer's special tokens, to be found in texts; none without a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        names: set[str] = set()
        if tokenizer is not None:
            added = tokenizer.added_tokens_decoder.values()
            names = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)} - {""}
        longest_first = sorted(names, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")  # the latter is found nowhere

    def in_data(self, record: Record, example: Example, template: str) -> Counter[str]:
        """How often a sample's data spells each; what a chat template or ``template`` writes is none of its data.

        Args:
            record: what the sample was rendered from.
        """
        if example.templated:
            return self._in_text("\n".join(message["content"] for message in record["messages"]))
        found = Counter[str]()
        for segment in example.segments:
            found += self._in_text(segment.text)
        return found - self._in_text(template)

    def _in_text(self, text: str) -> Counter[str]:
        return Counter(self._pattern.findall(text))

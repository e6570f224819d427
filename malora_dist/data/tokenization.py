"""From text to tokens, and to a length that fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from malora_dist.data.segments import Example
from malora_dist.errors import DataError
from malora_dist.files import foreign_reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenizedExample:
    """One sample as tokens.

    Attributes:
        token_ids: the sequence, BOS and EOS included.
        trained: per token, whether the loss is taken on predicting it.
        truncated: tokens that :func:`fit` cut away.
        starts_with_bos: whether the first token is BOS, which is never cut away.
        source: ``FILE:LINE`` or the record's number, for messages.
    """

    token_ids: list[int]
    trained: list[bool]
    truncated: int = 0
    starts_with_bos: bool = False
    source: str = ""


def encode_example(example: Example, tokenizer: PreTrainedTokenizerBase) -> TokenizedExample:
    """Tokens of a sample, up to the end of its last trained segment (what follows earns no loss).

    Each segment is tokenised apart, so that a prompt has the tokens it has at inference; together they decode to the
    sample's text.
    EOS ends each trained segment, and BOS is put in front if the tokenizer puts it in front of
    its own prompts. A chat template writes both itself: nothing is added to its text.

    Raises:
        DataError: the tokenizer has no EOS token, so that no answer could end, or it fails on the text.
    """
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if eos is None and not example.templated:
        raise DataError(f"tokenizer {tokenizer.name_or_path!r} has no EOS token, so no answer could end; set eos_token")
    cure = "mend it, or the tokenizer.json"
    with foreign_reader(example.source or "a sample", cure, "the tokenizer fails on it", DataError):
        token_ids, trained = _encode_segments(example, eos, _Texts(tokenizer))
        adds_bos = bos is not None and tokenizer("").input_ids[:1] == [bos]
    starts_with_bos = bos is not None and token_ids[:1] == [bos]
    if adds_bos and not starts_with_bos and not example.templated:
        token_ids, trained = [bos, *token_ids], [False, *trained]
        starts_with_bos = True
    return TokenizedExample(token_ids, trained, starts_with_bos=starts_with_bos, source=example.source)


class _Texts:
    """A tokenizer without its special tokens; what it has encoded is kept."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._encoded: dict[str, list[int]] = {"": []}

    def encode(self, text: str) -> list[int]:
        """Its token ids."""
        if text not in self._encoded:
            # verbose=False: the warning about model_max_length is premature, fit() comes after
            self._encoded[text] = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return self._encoded[text]

    def decode(self, token_ids: list[int]) -> str:
        """The text of tokens, as exact as the tokenizer knows it."""
        text = self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


#: (token ids, whether each is trained)
_Tokens = tuple[list[int], list[bool]]


def _encode_segments(example: Example, eos: Any, texts: _Texts) -> _Tokens:
    """The tokens up to the end of the last trained segment."""
    token_ids: list[int] = []
    trained: list[bool] = []
    before = ""
    for segment in example.segments[: example.last_trained + 1]:
        ids = _continuation(before, segment.text, texts)
        before = segment.text
        if segment.trained and not example.templated and ids[-1:] != [eos]:
            ids = [*ids, eos]
        token_ids += ids
        trained += [segment.trained] * len(ids)
    return token_ids, trained


def _continuation(before: str, text: str, texts: _Texts) -> list[int]:
    """Tokens of a text that follows the text ``before``, whose own tokens are those that it has at inference.

    They are what the text adds to the tokens before it. Where the two grow together into one token, the text is
    tokenised by itself. Tokenizers in SentencePiece's manner put a space in front of every text they are given, which
    would then be one too many: the text is tokenised behind some other text that it does not grow together with.
    """
    head, whole = texts.encode(before), texts.encode(before + text)
    if whole[: len(head)] == head:
        return whole[len(head) :]
    right = texts.decode(whole)
    for anchor in ("", "\n", before.rstrip()[-1:]):
        start, anchored = texts.encode(anchor), texts.encode(anchor + text)
        ids = anchored[len(start) :]
        if anchored[: len(start)] == start and texts.decode(head + ids) == right:
            return ids
    return texts.encode(text)


def fit(example: TokenizedExample, seq_length: int, overlong: str) -> TokenizedExample | None:
    """Bring a sample to at most ``seq_length`` tokens.

    ``truncate`` cuts the start of what precedes the last answer and keeps BOS; an answer too long
    by itself loses its end, EOS included. ``drop`` answers None.

    Raises:
        DataError: the sample is too long and ``overlong`` is ``error``.
    """
    excess = len(example.token_ids) - seq_length
    if excess <= 0:
        return example
    if overlong == "drop":
        return None
    if overlong == "error":
        raise DataError(
            f"{example.source}: {len(example.token_ids)} tokens exceed seq_length={seq_length}; "
            "raise it, or set overlong to truncate or drop"
        )
    if overlong != "truncate":
        raise ValueError(f"overlong={overlong!r}")
    answer_start = len(example.trained)
    while answer_start > 0 and example.trained[answer_start - 1]:
        answer_start -= 1
    num_bos = 1 if example.starts_with_bos else 0
    # The prompt loses its start, at most all of it; what is still too much is cut at the answer's end.
    start = min(num_bos + excess, max(answer_start, num_bos))
    keep = [*range(num_bos), *range(start, start + seq_length - num_bos)]
    return replace(
        example,
        token_ids=[example.token_ids[i] for i in keep],
        trained=[example.trained[i] for i in keep],
        truncated=excess,
    )

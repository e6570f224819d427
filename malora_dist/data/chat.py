"""Conversations: the tokenizer's chat template, with the loss on every assistant turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from malora_dist.data.records import Record, text_of, writable
from malora_dist.data.segments import Example, Segment
from malora_dist.errors import DataError
from malora_dist.files import foreign_reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = ("system", "user", "assistant")


def render_chat(record: Record, where: str, tokenizer: PreTrainedTokenizerBase | None) -> Example:
    """Render ``messages`` by the chat template; the segments joined equal the rendered chat.

    A trained segment is what the model has to generate: from where the generation prompt ends to
    the end of the turn, without the white space that follows it.

    Raises:
        DataError: no chat template, malformed messages, a template that refuses them, that changes
            earlier turns when later ones follow, or that does not mark the end of a turn.
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise DataError(
            f"{where}: format messages needs a tokenizer with a chat template, and {_name(tokenizer)} has none; "
            "take that of the model's instruct version (chat_template.jinja), or use prompt and completion"
        )
    messages = _checked_messages(record, where)
    whole = _apply(tokenizer, messages, where)
    segments, done = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _apply(tokenizer, messages[:i], where, add_generation_prompt=True)
        end = _apply(tokenizer, messages[: i + 1], where).rstrip()
        if not (end.startswith(start) and whole.startswith(end)):
            raise DataError(
                f"{where}: the chat template renders message {i + 1} differently once others follow, "
                "so the loss on every assistant turn is not defined; use a template that does not"
            )
        if end.endswith(message["content"].rstrip()):
            raise DataError(
                f"{where}: the chat template puts no mark after assistant messages, so the model would not learn "
                "to stop; end them with eos_token in the template"
            )
        if start == end:
            raise DataError(f"{where}: the chat template leaves out message {i + 1}; mend the template")
        segments.append(Segment(whole[done : len(start)], trained=False))
        segments.append(Segment(whole[len(start) : len(end)], trained=True))
        done = len(end)
    segments.append(Segment(whole[done:], trained=False))
    return Example(tuple(segment for segment in segments if segment.text), templated=True, source=where)


def _checked_messages(record: Record, where: str) -> list[dict[str, str]]:
    """The messages as {role, content}, other keys left out."""
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{where}: messages must be a list of objects with role and content; mend or remove the record")
    checked = []
    for i, message in enumerate(messages, start=1):
        at = f"{where}, message {i}"
        role = text_of(message, "role", at)
        if role not in _ROLES:
            raise DataError(f"{at}: role={role!r}: must be one of {', '.join(_ROLES)}; rename or remove it")
        content = text_of(message, "content", at)
        if role == "assistant" and not content.strip():
            raise DataError(f"{at}: content={content!r}: an assistant must say something; mend or remove the record")
        checked.append({"role": role, "content": content})
    roles = [message["role"] for message in checked]
    if "assistant" not in roles or roles[0] == "assistant":
        raise DataError(f"{where}: messages must have an assistant turn, but not as the first; mend it or remove it")
    return checked


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], where: str, add_generation_prompt: bool = False
) -> str:
    # a template is a program, run in jinja's sandbox: it may fail in any way
    with foreign_reader(where, "mend or remove them", "the chat template refuses the messages", DataError):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert isinstance(text, str)
    return writable(text, "the chat template's text", where)


def _name(tokenizer: PreTrainedTokenizerBase | None) -> str:
    return "no tokenizer" if tokenizer is None else repr(tokenizer.name_or_path)

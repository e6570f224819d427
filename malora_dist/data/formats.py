"""From records to text: which part of a sample is prompt and which part is learned."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from malora_dist.config_sections import TaskConfig
from malora_dist.data.chat import render_chat
from malora_dist.data.reading import Reading
from malora_dist.data.records import Record, columns_of, read_records, text_of, value_shown, writable
from malora_dist.data.segments import Example, Segment
from malora_dist.data.special_tokens import SpecialTokens
from malora_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Example", "Segment", "load_examples"]

# Stanford Alpaca's two prompts, to the letter (github.com/tatsu-lab/stanford_alpaca, train.py).
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


@dataclass(frozen=True)
class _Format:
    """A format of one prompt and one answer.

    Attributes:
        answer: the column that is learned.
        prompt: (record, where) -> the prompt's text.
        lead: put between prompt and answer, as part of the answer.
        reference: (record, where) -> what a generated answer is compared with.
    """

    columns: tuple[str, ...]
    answer: str
    prompt: Callable[[Record, str], str]
    lead: str = ""
    reference: Callable[[Record, str], str] = lambda record, where: ""


def _alpaca_prompt(record: Record, where: str) -> str:
    instruction = text_of(record, "instruction", where)
    given = text_of(record, "input", where) if record.get("input") is not None else ""
    template = _ALPACA_WITH_INPUT if given else _ALPACA_WITHOUT_INPUT
    return template.format(instruction=instruction, input=given)


def _alpaca_reference(record: Record, where: str) -> str:
    answer = record.get("answer")
    if isinstance(answer, str):
        return text_of(record, "answer", where)
    if isinstance(answer, dict | list):
        raise DataError(f"{where}: answer must be a text or a number; mend or remove the record")
    return "" if answer is None else str(answer)


_FORMATS = {
    "alpaca": _Format(
        columns=("instruction", "output"),
        answer="output",
        prompt=_alpaca_prompt,
        reference=_alpaca_reference,
    ),
    "gsm8k": _Format(
        columns=("question", "answer"),
        answer="answer",
        prompt=lambda record, where: f"Question: {text_of(record, 'question', where)}\nAnswer:",
        lead=" ",
        reference=lambda record, where: record["answer"].partition("####")[2].strip(),
    ),
    "completion": _Format(
        columns=("prompt", "completion"),
        answer="completion",
        prompt=lambda record, where: text_of(record, "prompt", where),
    ),
}
#: The columns that tell a format.
_COLUMNS = {name: f.columns for name, f in _FORMATS.items()} | {"messages": ("messages",)}
#: Format specifications that make no text of gigabytes and look into nothing.
_SPEC = re.compile(r"[^\d{}]*(\d{1,3}([^\d{}]+\d{1,3})?)?[^\d{}]*")
_BRACES = "write braces that are text as {{ and }}"


def load_examples(
    task: TaskConfig, tokenizer: PreTrainedTokenizerBase | None = None, reading: Reading | None = None
) -> list[Example]:
    """Read a task's records and render each into an :class:`Example`, in the file's order.

    Args:
        tokenizer: its chat template renders ``messages``, and its special tokens are looked for in the data.
        reading: is given all that is read, and says what becomes of a record that cannot be used.

    Raises:
        DataError: the file or a record cannot be used; names ``FILE:LINE`` or the record's number.
        ConfigError: format or prompt_template do not fit the file.
    """
    reading = reading or Reading()
    special = SpecialTokens(tokenizer)
    name, examples = "", []
    for where, record in read_records(task.path, task.split, reading, task.subset):
        with reading.record():
            if not name:
                name = _format_name(task, record, where)
                _check_template(task, name, None if reading.skips else record)
            if name == "messages":
                example = render_chat(record, where, tokenizer)
            else:
                example = _render(_FORMATS[name], task.prompt_template, record, where)
            reading.note_special_tokens(special.in_data(record, example, task.prompt_template), where)
            examples.append(example)
    reading.check_not_empty(task.path, len(examples))
    return examples


def _format_name(task: TaskConfig, record: Record, where: str) -> str:
    """The task's format; ``auto`` is read off the columns of the first record."""
    if task.format != "auto":
        if task.format not in _COLUMNS:
            rule = f"must be auto, {', '.join(_COLUMNS)}"
            raise ConfigError(_key(task, "format"), task.format, rule, "choose one of them")
        return task.format
    fitting = [name for name, columns in _COLUMNS.items() if record.keys() >= set(columns)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        problem = f"fit the formats {' and '.join(fitting)}; set format to one of them"
    else:
        known = ", ".join(f"{name} ({', '.join(columns)})" for name, columns in _COLUMNS.items())
        problem = f"fit no format; rename them to those of {known}, or set format and prompt_template"
    raise DataError(f"{where}: the columns {columns_of(record)} {problem}")


def _check_template(task: TaskConfig, name: str, record: Record | None) -> None:
    """Refuse a prompt_template that is none, or that cannot be filled from the columns of a first record."""
    template, key = task.prompt_template, _key(task, "prompt_template")
    if not template:
        return
    if name == "messages":
        raise ConfigError(key, template, "does not apply to format messages", "change the chat template instead")
    try:
        parts = [(field, spec or "") for _, field, spec, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ConfigError(key, template, f"is no format string ({error})", _BRACES) from error
    for field, spec in parts:
        if not _SPEC.fullmatch(spec):
            raise ConfigError(key, template, f"formats {{{field}}} as {spec!r}", f"write {{{field}}} alone")
        if record is not None and field not in record:
            rule = f"names {{{field}}}, but the columns are {columns_of(record)}"
            raise ConfigError(key, template, rule, f"use one of them; {_BRACES}")


def _render(form: _Format, template: str, record: Record, where: str) -> Example:
    answer = text_of(record, form.answer, where)
    prompt = _fill(template, record, where) if template else form.prompt(record, where)
    segments = (Segment(prompt, trained=False), Segment(form.lead + answer, trained=True))
    return Example(segments, reference=form.reference(record, where), source=where)


def _fill(template: str, record: Record, where: str) -> str:
    values = {}
    for _, column, _, _ in string.Formatter().parse(template):
        if column is None:
            continue
        if column not in record:
            found = f"no column {column!r} for prompt_template (found: {columns_of(record)})"
            raise DataError(f"{where}: {found}; add it or remove the record")
        value = record[column]
        if isinstance(value, list | dict | bytes):
            rule = f"{column}={value_shown(value)}: prompt_template takes texts and numbers"
            raise DataError(f"{where}: {rule}; write it as a text, or take it out of the template")
        values[column] = "" if value is None else value
    try:
        return writable(template.format_map(values), "prompt_template with its columns", where)
    except DataError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise DataError(f"{where}: does not fit prompt_template ({error}); change one of the two") from error


def _key(task: TaskConfig, field: str) -> str:
    return f"data[{task.label}].{field}"

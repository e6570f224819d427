"""Tasks of the scale ``small``, from public data sets as their projects publish them.

Multiple choice is asked as evaluation harnesses ask small models: the question, then the text of an option, and the
likeliest text is the answer. (A model of 135M parameters does not learn within an experiment's budget to name an option
by its number: its accuracy stays at chance.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from experiment import Task

from malora_dist.data.records import Record, read_records, text_of, write_records
from malora_dist.data.schedule import keyed_permutation
from malora_dist.errors import ConfigError, DataError

#: {domain: {task: the data sets that it mixes}}.
INTER_DOMAIN = {
    "math": ("gsm8k",),
    "code": ("code_alpaca",),
    "commonsense": ("arc_easy", "arc_challenge", "openbookqa"),
}
INTRA_DOMAIN = {name: (name,) for name in ("arc_easy", "arc_challenge", "openbookqa", "boolq")}
DOMAINS = {"inter_domain": INTER_DOMAIN, "intra_domain": INTRA_DOMAIN}
#: {data set: its training and test file}; without a test file some records are held out.
FILES = {
    "gsm8k": ("gsm8k_train.jsonl", "gsm8k_test.jsonl"),
    "code_alpaca": ("code_alpaca_2k.json", ""),
    "arc_easy": ("arc_easy_train.json", "arc_easy_test.json"),
    "arc_challenge": ("arc_challenge_train.json", "arc_challenge_test.json"),
    "openbookqa": ("openbookqa_train.json", "openbookqa_test.json"),
    "boolq": ("boolq_train.json", "boolq_test.json"),
}
#: Questions of a test, where there are so many; answers that are only scored by their loss are long, and fewer do.
TEST_QUESTIONS = {"gsm8k": 250, "code_alpaca": 250}
MOST_TEST_QUESTIONS, VALIDATION_QUESTIONS = 1000, 100
#: Longer samples are left out, by characters of prompt and answer: they would be cut to the sequence length.
LONGEST = 800

_CHOICE = re.compile(r"question: (?P<question>.*?)\s*\n\nAnswer1: (?P<options>.*)\n\nAnswer format:", re.DOTALL)
_TRUE_FALSE = re.compile(r"true or false, question: (?P<question>.*?)\s*\n\nAnswer format:", re.DOTALL)
_NEXT_OPTION = re.compile(r"\s*Answer\d+: ")


def write_real(domain: str, source: Path, folder: Path, seed: int) -> tuple[Task, ...]:
    """Write the training, validation and test files of a domain's tasks.

    Args:
        source: a folder that holds the data sets' files, at any depth.

    Raises:
        ConfigError: a file is missing.
        DataError: a record is not in its data set's form.
    """
    tasks = []
    for name, parts in DOMAINS[domain].items():
        train, validation, tests = [], [], {}
        for part in parts:
            records, questions = _read(part, source, seed)
            held_out = questions or [records.pop() for _ in range(TEST_QUESTIONS[part])]
            tests[part] = write_records(
                folder / f"{part}_test.jsonl", held_out[: TEST_QUESTIONS.get(part, MOST_TEST_QUESTIONS)]
            )
            count = VALIDATION_QUESTIONS // len(parts)
            validation += records[:count]
            train += records[count:]
        kind = "choice" if "options" in train[0] else "loss"
        trained = [_as_completion(record) for record in train]
        files = {
            "train": write_records(folder / f"{domain}_{name}_train.jsonl", trained),
            "validation": write_records(folder / f"{domain}_{name}_validation.jsonl", map(_as_completion, validation)),
        }
        tasks.append(Task(name, files["train"], files["validation"], tests, kind))
    return tuple(tasks)


def _read(part: str, source: Path, seed: int) -> tuple[list[Record], list[Record]]:
    """(training records, test records), each in an order that the seed decides."""
    found = []
    for name in FILES[part]:
        records = []
        if name:
            files = sorted(source.rglob(name))
            if not files:
                raise ConfigError("--data", str(source), f"holds no {name}", "see docs/paper.md for the data sets")
            records = [record for record in _parsed(files[0], _PARSERS[part]) if _length(record) <= LONGEST]
        order = keyed_permutation(len(records), seed, part, name)
        found.append([records[i] for i in order])
    return found[0], found[1]


def _parsed(file: Path, parse: Callable[[Record, str], Record]) -> Iterator[Record]:
    for where, record in read_records(str(file)):
        yield parse(record, where)


def _choice(record: Record, where: str) -> Record:
    """LLM-Adapters' multiple choice: options in the instruction, ``answer3`` as the answer."""
    found = _CHOICE.search(text_of(record, "instruction", where))
    options = [f" {text.strip()}" for text in _NEXT_OPTION.split(found["options"])] if found else []
    names = [f"answer{number}" for number in range(1, len(options) + 1)]
    answer = text_of(record, "answer", where)
    if found is None or answer not in names:
        raise DataError(f"{where}: is no multiple-choice record of LLM-Adapters; use its files as they are")
    right = names.index(answer)
    return {"prompt": f"Question: {found['question']}\nAnswer:", "options": options, "right": right}


def _true_false(record: Record, where: str) -> Record:
    """LLM-Adapters' BoolQ, which has no passages."""
    found = _TRUE_FALSE.search(text_of(record, "instruction", where))
    answer = text_of(record, "answer", where)
    if found is None or answer not in ("true", "false"):
        raise DataError(f"{where}: is no true-or-false record of LLM-Adapters; use its files as they are")
    prompt = f"Question: {found['question']} True or false?\nAnswer:"
    return {"prompt": prompt, "options": [" true", " false"], "right": int(answer == "false")}


def _math(record: Record, where: str) -> Record:
    question, answer = (text_of(record, column, where) for column in ("question", "answer"))
    return {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}


def _code(record: Record, where: str) -> Record:
    instruction, given, output = (text_of(record, column, where) for column in ("instruction", "input", "output"))
    asked = f"{instruction}\n{given}" if given else instruction
    return {"prompt": f"Instruction: {asked}\nAnswer:", "completion": f" {output}"}


_PARSERS: Mapping[str, Callable[[Record, str], Record]] = {
    "gsm8k": _math,
    "code_alpaca": _code,
    "arc_easy": _choice,
    "arc_challenge": _choice,
    "openbookqa": _choice,
    "boolq": _true_false,
}


def _length(record: Record) -> int:
    return len(record["prompt"]) + len(_as_completion(record)["completion"])


def _as_completion(record: Record) -> Record:
    """What is trained on: the right answer alone."""
    if "options" not in record:
        return record
    return {"prompt": record["prompt"], "completion": record["options"][record["right"]]}

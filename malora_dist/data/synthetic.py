"""The quickstart's text: small tasks with one right answer each, drawn from a seed.

Every sample is a line ``Instruction: input`` and its answer. The quickstart trains its base on
:data:`BASE_SKILLS` and adapts it to :data:`TASKS`. No instruction occurs in both: three tasks ask
for a skill of the base in words it has never seen, the other three are new to it. The base is
therefore fluent in the form, yet cannot do the tasks before it is adapted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from malora_dist.data.records import Record, write_records

_VOWELS = "aeiou"
_CONSONANTS = "bcdfgklmnprst"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Sample:
    """One record of a file in the format ``completion``."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Skill:
    """An instruction, where its inputs come from, and the rule of the answer."""

    instruction: str
    draw: Callable[[random.Random], str]
    solve: Callable[[str], str]

    def sample(self, rng: random.Random) -> Sample:
        """One question and its answer."""
        given = self.draw(rng)
        return Sample(f"{self.instruction}: {given}\n", self.solve(given))


def _pronounceable(rng: random.Random, length: int) -> str:
    """Vowels and consonants in turn."""
    first = rng.randrange(2)
    return "".join(rng.choice(_VOWELS if (i + first) % 2 else _CONSONANTS) for i in range(length))


def _word(rng: random.Random) -> str:
    return _pronounceable(rng, rng.randint(4, 6))


def _noun(rng: random.Random) -> str:
    return _pronounceable(rng, rng.randint(3, 4)) + rng.choice(("ty", "ry", "x", "sh", "ch", "f", "n", "k", "p"))


def _four_letters(rng: random.Random) -> str:
    return "".join(rng.sample(_LETTERS, 4))


def _two_numbers(rng: random.Random) -> tuple[int, int]:
    """Two numbers of two digits whose sum needs no carry and has two digits, all pairs alike."""
    while True:
        first, second = rng.randint(10, 89), rng.randint(10, 89)
        if first + second < 100 and first % 10 + second % 10 < 10:
            return first, second


def _addition(rng: random.Random) -> str:
    return "{}+{}".format(*_two_numbers(rng))


def _addition_in_words(rng: random.Random) -> str:
    return "{} and {}".format(*_two_numbers(rng))


def _sum(given: str) -> str:
    return str(sum(int(number) for number in given.replace(" and ", "+").split("+")))


def _plural(noun: str) -> str:
    if noun.endswith("y"):
        return noun[:-1] + "ies"
    if noun.endswith("f"):
        return noun[:-1] + "ves"
    return noun + ("es" if noun.endswith(("x", "sh", "ch")) else "s")


def _backwards(word: str) -> str:
    return word[::-1]


def _in_order(letters: str) -> str:
    return "".join(sorted(letters))


def _shifted_by(offset: int) -> Callable[[str], str]:
    """Each letter moved along the alphabet, z being followed by a."""
    table = str.maketrans(_LETTERS, _LETTERS[offset:] + _LETTERS[:offset])
    return lambda word: word.translate(table)


#: What the quickstart adapts to: {name: task}.
TASKS: dict[str, Skill] = {
    "reverse": Skill("Reverse", _word, _backwards),
    "sort": Skill("Sort", _four_letters, _in_order),
    "add": Skill("Add", _addition, _sum),
    "plural": Skill("Plural", _noun, _plural),
    "cipher": Skill("Encode", _word, _shifted_by(3)),
    "vowels": Skill("Vowels", _word, lambda word: "".join(c for c in word if c in _VOWELS)),
}

#: What the quickstart's base is trained on; sums are the hardest and get two wordings.
BASE_SKILLS: tuple[Skill, ...] = (
    Skill("Copy", _word, lambda word: word),
    Skill("Shout", _word, str.upper),
    Skill("Spell", _word, "-".join),
    Skill("Length", _word, lambda word: str(len(word))),
    Skill("Next", _word, _shifted_by(1)),
    Skill("Backwards", _word, _backwards),
    Skill("Order", _four_letters, _in_order),
    Skill("Total", _addition_in_words, _sum),
    Skill("Sum", _addition_in_words, _sum),
)


def base_samples(count: int, seed: int) -> list[Sample]:
    """The base's training text, skills in random order."""
    rng = random.Random(f"{seed}/base")
    return [rng.choice(BASE_SKILLS).sample(rng) for _ in range(count)]


def task_samples(name: str, count: int, seed: int) -> list[Sample]:
    """Samples of the task ``name``, all different.

    Ends only if the task has that many: the smallest, ``add``, has 1980.
    """
    rng = random.Random(f"{seed}/{name}")
    chosen: dict[Sample, None] = {}  # keeps the order, which a set would not
    while len(chosen) < count:
        chosen[TASKS[name].sample(rng)] = None
    return list(chosen)


def write_tasks(folder: Path, seed: int, train_samples: int = 1500, validation_samples: int = 100) -> list[Path]:
    """Write ``train/NAME.jsonl`` and ``validation/NAME.jsonl`` of every task; no sample is in both.

    Args:
        folder: files already there are replaced.

    Returns:
        The training files.
    """
    files = []
    for name in TASKS:
        samples = task_samples(name, train_samples + validation_samples, seed)
        records = [vars(sample) for sample in samples]
        files.append(write_split(folder, name, records[validation_samples:], records[:validation_samples]))
    return files


def write_split(folder: Path, name: str, train: Iterable[Record], validation: Iterable[Record]) -> Path:
    """Write the two files of one task, with a record per line, and return the training file."""
    write_records(folder / "validation" / f"{name}.jsonl", validation)
    return write_records(folder / "train" / f"{name}.jsonl", train)

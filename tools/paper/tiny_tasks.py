"""Tasks of the scale ``tiny``: small skills with one right answer, drawn from a seed.

The base is of the quickstart's kind and knows a few of them in other words (malora_dist/data/synthetic.py).
*Inter-domain* are eight skills of different kinds. *Intra-domain* are six ciphers, which differ in the key alone: the
same input has another answer in every task.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from malora_dist.data.synthetic import TASKS, Sample, Skill

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_word = TASKS["reverse"].draw


def _shift(offset: int) -> Callable[[str], str]:
    table = str.maketrans(_LETTERS, _LETTERS[offset:] + _LETTERS[:offset])
    return lambda word: word.translate(table)


#: {task: skill}.
INTER_DOMAIN: Mapping[str, Skill] = {
    **{name: TASKS[name] for name in ("reverse", "sort", "add", "plural", "vowels")},
    "double": Skill("Double", _word, lambda word: "".join(letter * 2 for letter in word)),
    "rotate": Skill("Rotate", _word, lambda word: word[2:] + word[:2]),
    "swap": Skill("Swap", _word, lambda word: word[-1] + word[1:-1] + word[0]),
}

#: {task: cipher} by how far each letter moves.
INTRA_DOMAIN: Mapping[str, Skill] = {
    f"key_{name}": Skill(f"Key {name}", _word, _shift(offset))
    for name, offset in zip("ABCDEF", (2, 3, 5, 7, 11, 16), strict=True)
}


def draw(skill: Skill, counts: Mapping[str, int], seed: int) -> dict[str, list[Sample]]:
    """{split: samples}, no sample in two splits or twice.

    Ends only if the skill has that many different samples: the smallest, ``add``, has 1980.
    """
    rng = random.Random(f"{seed}/{skill.instruction}")
    found: dict[Sample, None] = {}  # keeps the order, which a set would not
    while len(found) < sum(counts.values()):
        found[skill.sample(rng)] = None
    samples = list(found)
    splits: dict[str, list[Sample]] = {}
    for split, count in counts.items():
        splits[split], samples = samples[:count], samples[count:]
    return splits

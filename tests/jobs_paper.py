"""Jobs of tests/test_paper_tools.py: the scores of tools/paper/scoring.py, in a process that has megatron."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from malora_dist.data.tokenization import TokenizedExample
from malora_dist.parallel import topology as layout
from tests.jobs import _trainer

PAPER = Path(__file__).resolve().parents[1] / "tools" / "paper"


def scores(overrides: list[str], samples: list[TokenizedExample], choices: Path, llama: Path) -> tuple[Any, Any]:
    """(of samples: loss, tokens, greedy; of a file of choices: what score_file returns) of an untrained adapter."""
    sys.path.insert(0, str(PAPER))
    from scoring import score_file, score_samples

    trainer = _trainer(overrides)
    try:
        answers = score_samples(trainer, samples, pad=0, positions=64)
        return tuple(answers), score_file(trainer, AutoTokenizer.from_pretrained(llama), choices, "choice", 64)
    finally:
        layout.destroy()
        sys.path.remove(str(PAPER))

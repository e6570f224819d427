"""A script's result: JSON with everything needed to repeat it, Markdown to read, PNG to look at."""

from __future__ import annotations

import datetime
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from common import command_of, machine

#: Colours that people with any colour vision tell apart (Okabe and Ito), one per cell throughout.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442", "#000000")


class Report:
    """Collected by a script, written at its end as ``OUT/NAME.{json,md,png}``.

    Args:
        settings: what the scale trains, for the JSON file.
    """

    def __init__(self, name: str, title: str, out: Path, settings: dict[str, Any]) -> None:
        self._name, self._out = name, out
        self._text = [f"# {title}", ""]
        self._content: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "command": command_of(sys.argv[0]),
            "commit": _commit(),
            **machine("megatron-core", "transformers", "peft"),
            "settings": settings,
        }
        self._figures: list[Figure] = []

    def say(self, text: str) -> None:
        """A paragraph."""
        self._text += [text, ""]

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A Markdown table, also printed when the report is written."""
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        self._text += [f"## {title}", "", *("| " + " | ".join(map(str, line)) + " |" for line in lines), ""]

    def keep(self, **figures: Any) -> None:
        """Figures for the JSON file."""
        self._content |= figures

    def figure(self, columns: int = 1, width: float = 1, height: float = 3.6) -> tuple[Figure, Any]:
        """The picture and its axes, side by side."""
        figure, axes = plt.subplots(1, columns, figsize=(1.2 + 4.4 * columns * width, height), layout="constrained")
        self._figures.append(figure)
        return figure, axes

    def write(self) -> Path:
        """Write the files and print the text; the JSON file."""
        self._out.mkdir(parents=True, exist_ok=True)
        for number, figure in enumerate(self._figures):
            file = self._out / f"{self._name}{f'_{number + 1}' if number else ''}.png"
            figure.savefig(file, dpi=130)
            self._text += [f"![{self._name}]({file.name})", ""]
            plt.close(figure)
        text = "\n".join(self._text)
        (self._out / f"{self._name}.md").write_text(text, encoding="utf-8")
        file = self._out / f"{self._name}.json"
        file.write_text(json.dumps(_plain(self._content), indent=1) + "\n", encoding="utf-8")
        print(text)
        print(f"written: {file}, .md" + (", .png" if self._figures else ""))
        return file


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else ""


def _plain(value: Any) -> Any:
    """What JSON knows: NaN and infinity become null, keys text, floats short."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value

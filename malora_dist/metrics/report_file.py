"""The file of JSON lines that a run writes beside its checkpoints, for its writer and its readers.

Every line is an object with `kind`, `time` (seconds since 1970) and, unless it is `begin`, `message` or `end`, `step`:

    begin    version (of this format), config, parameters, tasks, world_size, device, iteration, evaluated, peak_tflops;
             see :class:`malora_dist.metrics.loggers.base.RunDescription`
    log      scalars; where there are any, counts and tables {name: {rows, columns, values}}
    warning  text
    message  text
    end      failed: whether an error has ended the run

A run that goes on adds to the file. Steps that it makes again stand there twice; the later line counts.

Imports nothing that takes long: programs that only read start at once.
"""

from __future__ import annotations

from typing import NamedTuple

FILE_NAME = "metrics.jsonl"
#: What readers need of `begin`.
BEGIN = ("config", "parameters", "tasks", "world_size", "device", "iteration")
#: Raised when a reader of the former format would misread the new one.
VERSION = 1


class Table(NamedTuple):
    """Numbers to be drawn as a heatmap.

    Attributes:
        rows, columns: names.
        values: a list of each row's numbers.
    """

    rows: list[str]
    columns: list[str]
    values: list[list[float]]

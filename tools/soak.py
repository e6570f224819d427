"""Train for long and see whether memory, threads, open files or child processes grow on any rank.

    torchrun --nproc-per-node 2 tools/soak.py --every 10 --config FILE train_iters=5000 ...

Any run will do; key=value pairs are config keys (docs/config.md). Each rank looks at itself every so many steps. A
figure grows when the slope of the line through its samples, the first fifth left out, is both certain and large: above
three standard errors, and over the whole run at least 1% of the memory, or one thread, file or process. One condition
alone would not do: resident memory moves in steps, which makes the standard error too small; and a few samples that are
off make a slope of any size. The last line has for each figure its mean, its growth over the run on the rank where that
is largest, and the standard error; exit code 1 if one grows.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import psutil
import torch.distributed as dist

from malora_dist.errors import exit_on_user_error
from malora_dist.parallel.versions import check_versions

#: What a rank looks at, and the growth over a run that is too much; of memory as a share of its mean.
LIMITS = {"MiB": 0.01, "threads": 1.0, "files": 1.0, "children": 1.0}
WARM_UP = 0.2
STANDARD_ERRORS = 3.0


class Growth(NamedTuple):
    """Of one figure over a run, by the least-squares line through its samples."""

    mean: float
    rise: float
    standard_error: float

    def is_too_much(self, figure: str) -> bool:
        """Whether it is both certain and large."""
        limit = LIMITS[figure] * (self.mean if figure == "MiB" else 1.0)
        return self.rise >= limit and self.rise > STANDARD_ERRORS * self.standard_error


def growth(values: Sequence[float]) -> Growth:
    """Over the whole run, from samples at equal distances; at least five."""
    skipped = int(WARM_UP * len(values))
    kept = np.asarray(values[skipped:], dtype=float)
    x = np.linspace(0.0, 1.0, len(kept))
    x -= x.mean()
    rise = float((x @ kept) / (x @ x))
    residuals = kept - kept.mean() - rise * x
    error = float(np.sqrt((residuals @ residuals) / (len(kept) - 2) / (x @ x)))
    return Growth(float(kept.mean()), rise / (1 - WARM_UP), error / (1 - WARM_UP))


def look(process: psutil.Process) -> dict[str, float]:
    """The figures of :data:`LIMITS`."""
    return {
        "MiB": process.memory_info().rss / 2**20,
        "threads": process.num_threads(),
        "files": process.num_fds(),
        "children": len(process.children(recursive=True)),
    }


def summary(of_ranks: Sequence[Sequence[Mapping[str, float]]]) -> tuple[str, bool]:
    """(the last line's figures, whether one grows) from the samples of each rank."""
    parts, growing = [], []
    for figure in LIMITS:
        of_figure = [growth([sample[figure] for sample in samples]) for samples in of_ranks]
        worst = max(of_figure, key=lambda g: g.rise)
        parts.append(f"{figure}={worst.mean:.4g}{worst.rise:+.2f}(se {worst.standard_error:.2f})")
        if any(g.is_too_much(figure) for g in of_figure):
            growing.append(figure)
    return f"{' '.join(parts)} grows={','.join(growing) or 'none'}", bool(growing)


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="YAML file of config keys")
    parser.add_argument("--every", type=int, default=10, metavar="STEPS", help="between two looks (10)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys that override the file")
    arguments = parser.parse_args()
    check_versions()
    # torch and megatron take seconds to import: wrong arguments and versions are reported before.
    from malora_dist.config_file import load_config
    from malora_dist.exchange.plan import check_exchange
    from malora_dist.parallel import topology as layout
    from malora_dist.parallel.device import without_expected_warnings

    config = load_config(arguments.config, arguments.overrides)
    config.validate(layout.world_size_from_env())
    check_exchange(config)
    if config.last_iteration < 5 * arguments.every:
        parser.error(
            f"{config.last_iteration} steps are too few to look every {arguments.every}: five looks are needed"
        )
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with without_expected_warnings(), contextlib.ExitStack() as stack:
        topology = layout.initialize(config, config.seed)
        stack.callback(layout.destroy)
        from malora_dist.training.callbacks import Callback, Step
        from malora_dist.training.trainer import Trainer

        process, samples = psutil.Process(), []

        class Look(Callback):
            def after_step(self, step: Step) -> None:
                if step.iteration % arguments.every == 0:
                    samples.append(look(process))

        trainer = Trainer(config, topology)
        trainer.callbacks.append(Look())
        trainer.train()
        of_ranks: list[list[dict[str, float]]] = [[] for _ in range(topology.world_size)]
        dist.all_gather_object(of_ranks, samples)
        line, is_growing = summary(of_ranks)
        if topology.rank == 0:
            print(
                f"soak steps={config.last_iteration} ranks={topology.world_size} looks={len(samples)} {line}",
                flush=True,
            )
    sys.exit(int(is_growing))


if __name__ == "__main__":
    main()

"""Weights & Biases: scalars, counts as histograms, pictures, the config, and warnings as alerts.

What decides about the account and the network is wandb's own: ``wandb login``, WANDB_API_KEY, WANDB_ENTITY, and
WANDB_MODE=offline, which writes to `save` alone what ``wandb sync`` uploads later.
"""

from __future__ import annotations

import dataclasses
import io
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from malora_dist.config import Config
from malora_dist.errors import ConfigError, first_line
from malora_dist.metrics.loggers.base import LOGGERS, Metrics, RunDescription, has_failed
from malora_dist.metrics.loggers.service import RunId, ServiceLogger, check_extra, import_extra

#: The axis of all figures; wandb's own step cannot go back, which a run does that goes on from a checkpoint.
STEP = "iteration"


@LOGGERS.register("wandb")
class WandbLogger(ServiceLogger):
    """Writes to a run of wandb; one that goes on from a checkpoint in `save` adds to its former run."""

    name = "wandb"

    @classmethod
    def check(cls, config: Config) -> None:
        check_extra("wandb", "wandb")

    @classmethod
    def create(cls, config: Config) -> Self:
        import_extra("wandb", "wandb")
        return cls(config)

    def begin(self, run: RunDescription) -> None:
        """Raises:
        ConfigError: wandb does not start, for example without an account.
        """
        import wandb

        config, kept = self._config, RunId(self._config, self.name)
        run_id = kept.read(run.iteration) or secrets.token_hex(4)
        directory = Path(config.save) if config.save else None
        about = {"parameters": dict(run.parameters), "world_size": run.world_size, "device": run.device}
        try:
            if directory:
                directory.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                project=config.wandb_project,
                name=config.wandb_name or (directory.name if directory else None),
                dir=directory,
                id=run_id,
                resume="allow",
                config=dataclasses.asdict(config) | about,
                notes=run.banner,
                settings=wandb.Settings(console="off"),  # what the console shows is in metrics.jsonl
            )
            self._run.define_metric("*", step_metric=STEP)
            kept.write(run_id)
        except (wandb.Error, OSError, ValueError) as error:
            cure = "set WANDB_MODE=offline, or leave wandb out"
            raise ConfigError("loggers", "wandb", f"does not start ({first_line(error)})", cure) from error
        self._is_open = True

    def warn(self, text: str, step: int) -> None:
        self._try(lambda: self._run.alert(f"warning at iteration {step}", text, level="WARN"))

    def log(self, metrics: Metrics, step: int) -> None:
        self._try(lambda: self._run.log({STEP: step, **_content(metrics, step)}))

    def close(self) -> None:
        exit_code = int(has_failed())
        self._try(lambda: self._run.finish(exit_code=exit_code))
        self._is_open = False


def _content(metrics: Metrics, step: int) -> Mapping[str, Any]:
    import numpy as np
    import wandb
    from PIL import Image

    bars = {
        tag: wandb.Histogram(np_histogram=(np.array(counts), np.arange(len(counts) + 1) - 0.5))
        for tag, counts in metrics.counts.items()
    }
    pictures = {
        tag: wandb.Image(Image.open(io.BytesIO(png))) for tag, png in metrics.pictures(f"iteration {step}").items()
    }
    return {**metrics.scalars, **bars, **pictures}

"""MLflow: scalars, pictures, the config as parameters and as a file, and warnings as a file.

Counts stay away: MLflow has nothing like a histogram.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from malora_dist.config import Config
from malora_dist.errors import ConfigError, first_line
from malora_dist.metrics.loggers.base import LOGGERS, Metrics, RunDescription, config_as_yaml, has_failed
from malora_dist.metrics.loggers.service import RunId, ServiceLogger, check_extra, import_extra

T = TypeVar("T")

#: How long it is tried to reach a server, unless the environment says otherwise. As MLflow has it, it would be longer
#: than the other ranks wait for this one.
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": 20,  # seconds, of each try
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": 2,
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": 1,
    "MLFLOW_DATABRICKS_ENDPOINT_HTTP_RETRY_TIMEOUT": 60,
}
#: A user's password in an address; a number after the colon is a port.
_PASSWORD = re.compile(r"(?<=://)[^/:@]*:(?!\d+(/|$)).*(?=@)")
_PACKAGES = ("mlflow", "sqlalchemy", "alembic")
#: MLflow's own variable.
_ADDRESS = "MLFLOW_TRACKING_URI"
#: How those begin that are no directories.
_ADDRESSES = re.compile(r"(?!file:)[a-zA-Z][\w+.-]+:")
#: Stores that are named without an address.
_WITHOUT_ADDRESS = ("databricks", "databricks-uc", "uc")

#: How many parameters and how many metrics the service takes at once.
_PARAMETERS = 100
_METRICS = 1000


@LOGGERS.register("mlflow")
class MlflowLogger(ServiceLogger):
    """Writes to a run of MLflow; one that goes on from a checkpoint in `save` adds to its former run."""

    name = "mlflow"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._warnings: list[str] = []

    @classmethod
    def check(cls, config: Config) -> None:
        check_extra("mlflow", *_PACKAGES)
        if uri := config.mlflow_tracking_uri or os.environ.get(_ADDRESS, ""):
            _check_uri(uri, is_in_config=bool(config.mlflow_tracking_uri))

    @classmethod
    def create(cls, config: Config) -> Self:
        import_extra("mlflow", *_PACKAGES)
        return cls(config)

    def begin(self, run: RunDescription) -> None:
        """Raises:
        ConfigError: the store does not answer, or is a directory.
        """
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, str(value))
        import mlflow
        from mlflow.exceptions import MlflowException

        uri = self._config.mlflow_tracking_uri or mlflow.get_tracking_uri()
        _check_uri(uri, is_in_config=bool(self._config.mlflow_tracking_uri))
        shown = _PASSWORD.sub("***", uri)
        try:
            self._client: Any = mlflow.MlflowClient(uri)
            self._start(run)
        except (MlflowException, OSError) as error:
            reason = first_line(error).replace(uri, shown)
            rule, cure = f"does not answer ({reason})", "name another store, sqlite:///mlflow.db, or none"
            raise ConfigError("mlflow_tracking_uri", shown, rule, cure) from error
        self._is_open = True

    def _start(self, run: RunDescription) -> None:
        """Go on with the run whose id is kept and whose store knows it, else begin one."""
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        client, config, kept = self._client, self._config, RunId(self._config, self.name)
        self._id, self._first = kept.read(run.iteration), run.iteration
        if self._id:
            try:
                client.update_run(self._id, status="RUNNING")
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                self._id = ""
        if not self._id:
            experiment = client.get_experiment_by_name(config.mlflow_experiment)
            experiment_id = (
                experiment.experiment_id if experiment else client.create_experiment(config.mlflow_experiment)
            )
            name = Path(config.save).name if config.save else None
            self._id = client.create_run(experiment_id, run_name=name).info.run_id
            kept.write(self._id)
            about = {"world_size": run.world_size, "device": run.device}
            values = dataclasses.asdict(config) | about  # of a run that goes on they may not change
            parameters = [Param(key, str(value)) for key, value in values.items()]
            for part in _parts(parameters, _PARAMETERS):
                client.log_batch(self._id, params=part)
        client.log_text(self._id, config_as_yaml(config), "config.yaml")
        client.log_text(self._id, run.banner, "start.txt")

    def warn(self, text: str, step: int) -> None:
        self._warnings.append(f"iteration {step}: {text}\n")
        file = f"warnings_after_iteration_{self._first}.txt"
        self._try(lambda: self._client.log_text(self._id, "".join(self._warnings), file))

    def log(self, metrics: Metrics, step: int) -> None:
        self._try(lambda: self._log(metrics, step))

    def _log(self, metrics: Metrics, step: int) -> None:
        from mlflow.entities import Metric
        from PIL import Image

        now = round(1000 * time.time())
        entries = [Metric(_name(tag), value, now, step) for tag, value in metrics.scalars.items()]
        for part in _parts(entries, _METRICS):
            self._client.log_batch(self._id, metrics=part)
        for tag, png in metrics.pictures(f"iteration {step}").items():
            self._client.log_image(self._id, Image.open(io.BytesIO(png)), key=_name(tag), step=step)

    def close(self) -> None:
        status = "FAILED" if has_failed() else "FINISHED"
        self._try(lambda: self._client.set_terminated(self._id, status))
        self._is_open = False


def _check_uri(uri: str, is_in_config: bool) -> None:
    """Refuse a store that cannot be used.

    Args:
        is_in_config: a database's password has no place but its address, which then stands in the environment.

    Raises:
        ConfigError: it holds a password, which the error does not show, or is a directory.
    """
    is_server = uri.startswith("http")
    if _PASSWORD.search(uri) and (is_server or is_in_config):
        rule = "holds a password, which would stand in files and messages"
        of_server = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        cure = f"set {of_server if is_server else _ADDRESS} in the environment in its place"
        raise ConfigError("mlflow_tracking_uri", _PASSWORD.sub("***", uri), rule, cure)
    if not _ADDRESSES.match(uri) and uri not in _WITHOUT_ADDRESS:
        # It keeps "lm loss" as a file and "lm loss/TASK" as a file in a directory of the same name.
        rule, cure = "is a directory, which cannot hold these tags", "name a database, sqlite:///mlflow.db"
        raise ConfigError("mlflow_tracking_uri", uri, rule, cure)


def _name(tag: str) -> str:
    """A tag as MLflow allows it; a task's name may hold anything, and two names stay two."""
    return re.sub(r"[^\w./: -]", lambda found: f"_{ord(found[0]):x}_", tag)


def _parts(entries: Sequence[T], most: int) -> list[Sequence[T]]:
    return [entries[i : i + most] for i in range(0, len(entries), most)]

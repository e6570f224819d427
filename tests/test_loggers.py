"""What TensorBoard, Weights & Biases and MLflow are given, read back; what happens when they fail; the pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import math
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from malora_dist.config import Config
from malora_dist.config_sections import TaskConfig
from malora_dist.errors import ConfigError
from malora_dist.metrics.loggers.base import Logger, Loggers, Metrics, RunDescription, check_loggers, make_loggers
from malora_dist.metrics.loggers.mlflow import PATIENCE
from malora_dist.metrics.loggers.service import RunId, ServiceLogger
from malora_dist.metrics.loggers.tensorboard import TensorBoardLogger
from malora_dist.metrics.pictures import draw
from malora_dist.metrics.report_file import Table
from malora_dist.metrics.tensorboard_layout import charts

FIGURES = {"lm loss": 2.5, "lm loss/b (c)": 2.25, "malora/balance/p90": 1.5}


def needs(extra: str) -> pytest.MarkDecorator:
    reason = f"the extra {extra} is not installed"
    return pytest.mark.skipif(importlib.util.find_spec(extra) is None, reason=reason)


def tables(layers: int = 2, experts: int = 4) -> dict[str, Table]:
    """All on the last expert in layer 0, even in the others; expert 0 of layer 0 has no token."""
    loads = [[0.5] * (experts - 1) + [4.0], *([[1.0] * experts] * (layers - 1))]
    loads[0][0] = 0.0
    columns = [f"{layer}.{expert}" for layer in range(layers) for expert in range(experts)]
    found = {
        f"malora/load/{name}": Table([str(i) for i in range(layers)], [str(i) for i in range(experts)], loads)
        for name in ("q_proj", "up_proj")
    }
    of_tasks = [[load for of_layer in loads for load in of_layer]] * 2
    found["malora/load of tasks/q_proj"] = Table(["a", "$^$ and a very long name"], columns, of_tasks)
    found["malora/task information"] = Table(["q_proj"], ["0", "1"], [[0.25, 0.0]])
    return found


def run_of(config: Config, **changes: object) -> RunDescription:
    run = RunDescription(config, "a banner", {"P": 7}, ["a", "b (c)"], 2, "cpu", 0, evaluated=["a"])
    return dataclasses.replace(run, **changes)  # type: ignore[arg-type]


def config_of(save: Path, *loggers: str, **settings: object) -> Config:
    return Config(save=str(save), loggers=list(loggers), data=[TaskConfig(path="a.jsonl")], **settings)  # type: ignore[arg-type]


def report(config: Config, iteration: int = 0) -> None:
    """A run of one step with a picture and a warning."""
    logger = make_loggers(config)
    logger.begin(run_of(config, iteration=iteration))
    step = iteration + 1
    logger.log(Metrics(FIGURES, {"seconds by rank": [1.0, 2.0]}, tables()), step)
    logger.warn("an expert is starved", step)
    logger.close()


# --- TensorBoard


def read_events(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    return events


def test_tensorboard_has_a_page_pictures_texts_and_hyperparameters(tmp_path: Path) -> None:
    config = config_of(tmp_path, "tensorboard", lr=0.125)
    report(config)
    events = read_events(tmp_path / "tensorboard")

    def text(tag: str) -> str:
        (event,) = events.Tensors(tag)
        (content,) = event.tensor_proto.string_val
        return str(content.decode())

    (page,) = events.Tensors("custom_scalars__config__")
    groups = Layout.FromString(page.tensor_proto.string_val[0]).category
    assert {group.title: [chart.title for chart in group.chart] for group in groups} == {
        question: [chart.title for chart in found] for question, found in charts(run_of(config)).items()
    }
    assert [group.chart[0].multiline.tag[0] for group in groups][:2] == [
        r"lm loss(/.*)?$",
        r"malora/balance/(median|p90|max)$",
    ]
    assert "\nlr: 0.125\n" in text("config/text_summary")
    assert text("start/text_summary") == "```\na banner\n```"
    assert text("warnings/text_summary") == "an expert is starved"
    for tag in ("pictures/load", "pictures/load of tasks", "pictures/task information"):
        (image,) = events.Images(tag)
        decoded = Image.open(io.BytesIO(image.encoded_image_string))
        assert (image.step, decoded.format, decoded.size) == (1, "PNG", (image.width, image.height))

    def hyperparameters(tag: str) -> HParamsPluginData:
        metadata = events.SummaryMetadata(f"_hparams_/{tag}")
        return HParamsPluginData.FromString(metadata.plugin_data.content)

    columns = hyperparameters("experiment").experiment
    assert {"lr", "shared_dim", "topk", "world_size"} <= {info.name for info in columns.hparam_infos}
    assert sum(info.differs for info in columns.hparam_infos) == 5, "as many as TensorBoard shows first"
    assert "lm loss validation" in {info.name.tag for info in columns.metric_infos}
    values = hyperparameters("session_start_info").session_start_info.hparams
    assert (values["lr"].number_value, values["method"].string_value) == (0.125, "malora")
    assert hyperparameters("session_end_info").session_end_info.status == 1  # has ended well


def test_a_run_that_fails_has_no_end(tmp_path: Path) -> None:
    logger = make_loggers(config_of(tmp_path, "tensorboard"))
    logger.begin(run_of(Config()))
    with pytest.raises(ZeroDivisionError), contextlib.closing(logger):
        _ = 1 / 0
    events = read_events(tmp_path / "tensorboard")
    assert events.SummaryMetadata("_hparams_/session_start_info")
    with pytest.raises(KeyError):
        events.SummaryMetadata("_hparams_/session_end_info")


def test_charts_are_of_figures_that_the_run_has() -> None:
    def titles(config: Config, **changes: object) -> dict[str, int]:
        return {question: len(found) for question, found in charts(run_of(config, **changes)).items()}

    learning, experts, speed, resources = titles(Config())
    assert titles(Config()) == {learning: 3, experts: 6, speed: 4, resources: 2}
    assert titles(Config(), tasks=["a"], world_size=1, peak_tflops=1.0) == {
        learning: 3,
        experts: 5,
        speed: 5,
        resources: 1,
    }
    assert titles(Config(method="lora"), evaluated=[]) == {learning: 1, speed: 4, resources: 2}
    tags = [chart.tags for found in charts(run_of(Config())).values() for chart in found]
    assert [tag for tag in tags if re.match(tag, "lm loss")] == [r"lm loss(/.*)?$"]


def test_a_run_that_goes_on_takes_the_place_of_the_steps_it_makes_again(tmp_path: Path) -> None:
    for iteration, losses in ((0, {10: 1.0, 20: 0.9, 30: 0.8}), (10, {20: 0.7})):
        logger = make_loggers(config_of(tmp_path, "tensorboard"))
        logger.begin(run_of(Config(), iteration=iteration))
        for step, loss in losses.items():
            logger.log(Metrics({"lm loss": loss}), step)
        logger.close()
    events = read_events(tmp_path / "tensorboard").Scalars("lm loss")
    assert [(event.step, round(event.value, 3)) for event in events] == [(10, 1.0), (20, 0.7)]


def test_a_run_that_replaces_another_removes_its_reports_and_nothing_else(tmp_path: Path) -> None:
    report(config_of(tmp_path, "tensorboard", "jsonl"))
    RunId(config_of(tmp_path), "mlflow").write("some id")
    for name in ("notes.txt", "tensorboard/notes.txt"):
        (tmp_path / name).touch()
    outside = config_of(tmp_path, "tensorboard", tensorboard_dir=str(tmp_path.parent / f"{tmp_path.name}-outside"))
    report(outside)
    make_loggers(config_of(tmp_path), replaces=True).close()
    left = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert left == {"notes.txt", "tensorboard/notes.txt"}
    make_loggers(outside, replaces=True).close()
    assert len(list(Path(outside.tensorboard_dir).iterdir())) == 2


def test_a_run_on_the_console_alone_does_not_wait_for_tensorboard() -> None:
    code = (
        "import sys; from malora_dist.config import Config; from malora_dist.metrics.loggers.base import make_loggers;"
        "make_loggers(Config(loggers=['console'])); print([m for m in ('tensorboard', 'mlflow') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# --- pictures


def test_pictures_are_drawn_once_for_all_loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr("malora_dist.metrics.pictures.draw", lambda tables, caption: drawn.append(caption) or {})
    logger = Loggers([TensorBoardLogger(tmp_path), TensorBoardLogger(tmp_path)])
    for step in (1, 2):
        logger.log(Metrics(FIGURES, tables=tables()), step)
    logger.close()
    assert drawn == ["iteration 1", "iteration 2"]


def test_pictures_of_figures_that_are_not_finite(tmp_path: Path) -> None:
    broken = {
        tag: table._replace(values=[[math.nan, math.inf, *row[2:]] for row in table.values])
        for tag, table in tables().items()
    }
    logger = TensorBoardLogger(tmp_path)
    logger.log(Metrics(tables=broken), 1)
    logger.close()
    assert len(read_events(tmp_path).Tags()["images"]) == 3


def test_a_picture_that_cannot_be_drawn_does_not_end_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = TensorBoardLogger(tmp_path)
    for step in (1, 2):
        logger.log(Metrics(FIGURES, tables={"malora/load/x": Table(["0"], ["0"], [])}), step)
    logger.close()
    assert re.fullmatch(r"tensorboard: .*: cannot be written \(.*\); it ends before step 1\n", capsys.readouterr().err)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_pictures_show_the_loads() -> None:
    """Areas of the colours: one expert has four times an even load, two have half of it, one has none (black)."""
    pictures = draw(tables(), "iteration 7")
    assert sorted(pictures) == ["pictures/load", "pictures/load of tasks", "pictures/task information"]
    for tag in ("pictures/load", "pictures/load of tasks"):  # two projections; one projection, two tasks
        image = pixels(pictures[tag]).astype(int)
        colours = {"four": colormaps["RdBu_r"](1.0), "half": colormaps["RdBu_r"](0.25), "none": (0, 0, 0)}
        areas = {
            name: int((abs(image - 255 * np.array(colour[:3])).max(axis=-1) < 5).sum())
            for name, colour in colours.items()
        }
        assert areas["four"] > 300
        assert areas["half"] == pytest.approx(2 * areas["four"], rel=0.3)
        assert areas["none"] > 0.8 * areas["four"]


@pytest.mark.parametrize(("layers", "experts"), [(2, 2), (80, 64)])
def test_pictures_of_any_number_of_experts_fit_a_screen(layers: int, experts: int) -> None:
    for png in draw(tables(layers, experts), "iteration 7").values():
        height, width, _ = pixels(png).shape
        assert 100 <= width <= 1300
        assert 60 <= height <= 1300
        assert len(png) < 300_000


# --- other packages


@needs("wandb")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on from a checkpoint adds to its former run."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = config_of(tmp_path / "save", "wandb", wandb_project="some project")
    for iteration in (0, 5):
        report(config, iteration)
    first, second = sorted(tmp_path.rglob("run-*.wandb"), key=lambda file: file.stat().st_mtime)
    assert first.stem == second.stem == f"run-{RunId(config, 'wandb').read(5)}"
    assert RunId(config, "wandb").read(0) == "", "a run that begins anew is another"
    content = first.read_bytes()
    for text in ("some project", "lm loss/b (c)", "2.25", "iteration", "an expert is starved", "histogram", "a banner"):
        assert text.encode() in content, text
    pictures = list(tmp_path.glob("save/wandb/offline-run-*/files/media/images/**/*.png"))
    assert len(pictures) == 2 * 3


@needs("wandb")
def test_wandb_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def init(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(ConfigError, match=r"^loggers='wandb': does not start \(No API key.*\); set WANDB_MODE=offline"):
        report(config_of(tmp_path, "wandb"))


@needs("mlflow")
def test_mlflow_in_a_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)  # where MLflow keeps the files of a local store
    uri = f"sqlite:///{tmp_path / 'store.db'}"
    config = config_of(tmp_path / "save", "mlflow", mlflow_tracking_uri=uri, mlflow_experiment="some name", lr=0.125)
    report(config)
    config.train_iters = 7  # a changed setting must not end it
    report(config, iteration=5)
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("some name").experiment_id])
    assert (run.info.run_name, run.info.status) == ("save", "FINISHED")
    assert (run.data.params["lr"], run.data.params["world_size"]) == ("0.125", "2")
    assert run.data.metrics == {"lm loss": 2.5, "lm loss/b _28_c_29_": 2.25, "malora/balance/p90": 1.5}
    assert [m.step for m in client.get_metric_history(run.info.run_id, "lm loss")] == [1, 6]
    files = Path(run.info.artifact_uri)
    assert len(list(files.glob("images/*.png"))) == 2 * 3
    assert "train_iters: 7\n" in (files / "config.yaml").read_text()
    assert (files / "warnings_after_iteration_5.txt").read_text() == "iteration 6: an expert is starved\n"
    config.mlflow_tracking_uri = str(tmp_path / "mlruns")
    with pytest.raises(ConfigError, match=r"^mlflow_tracking_uri='.*mlruns': is a directory, .*; name a database"):
        report(config)


@pytest.mark.parametrize("extra", ["wandb", "mlflow"])
def test_a_missing_package_is_an_error_that_names_the_extra(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(
        ConfigError, match=rf"^loggers='{extra}': needs the extra {extra} .*pip install .*\.\[{extra}\]"
    ):
        check_loggers(Config(loggers=[extra]))


@needs("mlflow")
def test_an_mlflow_server_that_hangs_is_given_up_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections are taken, nothing is ever answered. The real limits end long before the other ranks' wait."""
    seconds, retries, factor, _ = PATIENCE.values()
    assert seconds * (1 + retries) + factor * 2**retries < 60 * Config().distributed_timeout_minutes / 4
    for name in PATIENCE:
        monkeypatch.setenv(name, "is put back after the test")
        monkeypatch.delenv(name)
    for name, value in zip(PATIENCE, (1, 0, 0), strict=False):
        monkeypatch.setitem(PATIENCE, name, value)
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(ConfigError, match=rf"^mlflow_tracking_uri='{uri}': does not answer \(.*\); name another"):
            report(config_of(tmp_path, "mlflow", mlflow_tracking_uri=uri))
        assert time.monotonic() - began < 20


@needs("mlflow")
def test_mlflow_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A password is refused and not shown; a database has it in the environment, for want of another place."""

    def refused(uri: str) -> str:
        with pytest.raises(ConfigError, match=r"holds a password") as error:
            check_loggers(Config(loggers=["mlflow"], mlflow_tracking_uri=uri))
        return str(error.value)

    for uri in ("https://me:secret@host/x", "https://me:sec/secret@x@host:5000", "http://:1secret@host"):
        assert re.match(r"mlflow_tracking_uri='https?://\*\*\*@host.*MLFLOW_TRACKING_PASSWORD", refused(uri))
        assert "secret" not in refused(uri)
    assert "set MLFLOW_TRACKING_URI in" in refused("postgresql://me:secret@host/db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@host")
    assert "secret" not in refused("")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@host/db")
    for uri in ("", "databricks", "databricks://profile", "https://me@host:5000", "sqlite:///a:b@c.db", "arn:aws:x"):
        check_loggers(Config(loggers=["mlflow"], mlflow_tracking_uri=uri))
    for uri in ("runs", "/a/b", "file:///a"):
        with pytest.raises(ConfigError, match="is a directory"):
            check_loggers(Config(loggers=["mlflow"], mlflow_tracking_uri=uri))


def test_a_service_that_fails_does_not_end_training(capsys: pytest.CaptureFixture[str]) -> None:
    class Failing(ServiceLogger):
        name = "failing"

        def begin(self, run: RunDescription) -> None:
            self._is_open = True

        def log(self, metrics: Metrics, step: int) -> None:
            self._try(lambda: fail(step))

    def fail(step: int) -> None:
        print(f"step {step}")
        raise ConnectionResetError("Connection lost\nmore")

    logger: Logger = Failing(Config())
    logger.begin(run_of(Config()))
    for step in (1, 2):
        logger.log(Metrics(), step)
    out, err = capsys.readouterr()
    assert (out, err) == ("step 1\n", "failing: cannot be written (Connection lost); it ends here\n")

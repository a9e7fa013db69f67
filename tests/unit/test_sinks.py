"""Services are called in order from a thread of their own; one that fails, hangs or lags is given up."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from config_files import compose_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opd_ray import sinks
from opd_ray.config.schema import Config
from opd_ray.protocol import Metrics
from opd_ray.sinks import GuardedSink, SampleRow, TensorBoardSink, WandbSink, open_sinks
from opd_ray.state import RunDir


@dataclass
class Service:
    """Fails so many times at `log`, or waits there."""

    num_faults: int = 0
    wait: threading.Event | None = None
    where: str = "here"
    calls: list[Any] = field(default_factory=list)

    def log(self, step: int, metrics: Metrics) -> None:
        if self.wait:
            self.wait.wait()
        if self.num_faults:
            self.num_faults -= 1
            raise ConnectionError("the service is away\nand more")
        self.calls.append((step, dict(metrics)))

    def show(self, rows: Sequence[SampleRow]) -> None:
        self.calls.append(rows)

    def keep(self, name: str, folder: Path, step: int) -> None:
        self.calls.append((name, folder, step))

    def finish(self, summary: Metrics) -> None:
        self.calls.append(summary)


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_FIRST_PAUSE_S": 0.01, "_OPEN_S": 0.2, "_FINISH_S": 0.3}.items():
        monkeypatch.setattr(sinks, name, value)


def guard(open_sink: Callable[[], Any]) -> tuple[GuardedSink, list[str]]:
    warnings: list[str] = []
    return GuardedSink(open_sink, name="W&B", warn=warnings.append), warnings


def test_calls_arrive_in_order_and_finish_waits_for_them() -> None:
    service = Service()
    sink, warnings = guard(lambda: service)
    assert sink.where == "here"
    sink.log(1, {"train/loss": 1.0})
    sink.keep("checkpoint", Path("c"), 1)
    sink.show([SampleRow(step=1, text="a", reward=1.0)])
    sink.finish({"steps": 1})
    assert service.calls == [
        (1, {"train/loss": 1.0}),
        ("checkpoint", Path("c"), 1),
        [SampleRow(step=1, text="a", reward=1.0)],
        {"steps": 1},
    ]
    assert warnings == []


def test_metrics_are_taken_as_they_are_when_they_are_logged() -> None:
    service, gate = Service(), threading.Event()
    service.wait = gate
    sink, _ = guard(lambda: service)
    metrics = {"train/loss": 1.0}
    sink.log(1, metrics)
    metrics["train/loss"] = 2.0
    gate.set()
    sink.finish({})
    assert service.calls[0] == (1, {"train/loss": 1.0})


def test_a_call_that_fails_twice_is_tried_again_and_nothing_is_lost() -> None:
    service = Service(num_faults=2)
    sink, warnings = guard(lambda: service)
    sink.log(1, {"a": 1.0})
    sink.log(2, {"a": 2.0})
    sink.finish({})
    assert service.calls == [(1, {"a": 1.0}), (2, {"a": 2.0}), {}]
    assert warnings == []


def test_a_service_that_goes_on_failing_is_given_up_with_one_warning() -> None:
    service = Service(num_faults=100)
    sink, warnings = guard(lambda: service)
    for step in range(5):
        sink.log(step, {})
    sink.finish({})
    assert warnings == ["W&B is given up for this run (the service is away); metrics.jsonl has everything"]
    assert service.num_faults == 97


def test_a_service_that_cannot_be_opened_stops_nothing() -> None:
    def refuse() -> Service:
        raise PermissionError("no such project")

    sink, warnings = guard(refuse)
    sink.log(1, {})
    sink.finish({})
    assert sink.where == "not connected"
    assert warnings == ["W&B is given up for this run (no such project); metrics.jsonl has everything"]


def test_a_service_that_hangs_holds_up_neither_the_steps_nor_the_end() -> None:
    gate = threading.Event()
    sink, warnings = guard(lambda: Service(wait=gate))
    start = time.perf_counter()
    for step in range(1000):
        sink.log(step, {})
    assert time.perf_counter() - start < 0.2
    sink.finish({})
    assert time.perf_counter() - start < 2
    assert len(warnings) == 1
    assert "W&B is given up" in warnings[0]
    gate.set()


def test_a_service_that_falls_far_behind_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "_MAX_WAITING", 3)
    gate = threading.Event()
    sink, warnings = guard(lambda: Service(wait=gate))
    for step in range(9):
        sink.log(step, {})
    gate.set()
    assert warnings == ["W&B is given up for this run (it is 3 calls behind); metrics.jsonl has everything"]


def test_a_service_that_opens_late_is_told_and_gets_everything() -> None:
    service = Service()

    def late() -> Service:
        time.sleep(0.4)
        return service

    sink, warnings = guard(late)
    assert warnings == ["W&B has not opened within 0.2 s; the run goes on, metrics.jsonl has everything"]
    sink.log(1, {})
    while sink.where != "here":
        time.sleep(0.01)
    sink.finish({})
    assert service.calls == [(1, {}), {}]


def test_a_service_that_never_opens_does_not_hold_up_the_end() -> None:
    gate = threading.Event()
    sink, warnings = guard(lambda: gate.wait() and Service())
    sink.log(1, {})
    start = time.perf_counter()
    sink.finish({})
    assert time.perf_counter() - start < 0.1
    assert warnings[1:] == ["W&B is given up for this run (it has not opened); metrics.jsonl has everything"]
    gate.set()


def run_of(tmp_path: Path, tracking: str, *more: str) -> tuple[Config, RunDir]:
    config = compose_config("experiment=demo", f"runs_dir={tmp_path}", f"tracking={tracking}", *more)
    run_dir = RunDir.of(config)
    run_dir.path.mkdir(parents=True)
    return config, run_dir


def test_no_service_is_opened_without_one_asked_for(tmp_path: Path) -> None:
    config, run_dir = run_of(tmp_path, "none")
    assert open_sinks(config, run_dir, step=0, warn=print) == []


def test_tensorboard_has_every_metric_at_its_step_and_forgets_what_a_resumed_run_takes_back(tmp_path: Path) -> None:
    config, run_dir = run_of(tmp_path, "tensorboard")
    first = TensorBoardSink(config, run_dir, step=0)
    for step in (1, 2, 3):
        first.log(step, {"step": step, "train/loss": float(step)})
    first.finish({})
    resumed = TensorBoardSink(config, run_dir, step=1)
    resumed.log(2, {"train/loss": 20.0})
    resumed.show([SampleRow(step=2, text="1+2=3", reward=1.0)])
    resumed.finish({"reverse_kl_after": 0.5})
    events = EventAccumulator(str(run_dir.path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 20.0)]
    assert events.Scalars("summary/reverse_kl_after")[0].value == 0.5
    assert "step" not in events.Tags()["scalars"]


class FakeWandb:
    """What of the wandb module is used, recording."""

    def __init__(self) -> None:
        self.inits: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.axes: list[tuple[Any, ...]] = []
        self.artifacts: list[Any] = []
        self.summary: dict[str, Any] = {}
        self.url, self.dir = "https://wandb.example/run", "files"

    def init(self, **options: Any) -> "FakeWandb":
        self.inits.append(options)
        return self

    def Settings(self, **given: Any) -> Any:
        return given

    def define_metric(self, *name: str, **options: str) -> None:
        self.axes.append((*name, options))

    def log(self, values: dict[str, Any]) -> None:  # takes no `step`: the axis is a metric
        self.logged.append(values)

    def Table(self, **content: Any) -> Any:
        return content

    def Artifact(self, name: str, **options: Any) -> "FakeArtifact":
        return FakeArtifact(name, options)

    def log_artifact(self, artifact: Any) -> None:
        self.artifacts.append(artifact)

    def finish(self) -> None:
        pass


@dataclass
class FakeArtifact:
    name: str
    options: dict[str, Any]
    folders: list[str] = field(default_factory=list)

    def add_dir(self, folder: str) -> None:
        self.folders.append(folder)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    import sys

    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_MODE", "WANDB_RUN_ID", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return fake


def test_wandb_has_the_axis_the_whole_configuration_the_versions_and_the_group(
    wandb: FakeWandb, tmp_path: Path
) -> None:
    config, run_dir = run_of(tmp_path, "wandb", "tracking.group=sweep")
    WandbSink(config, run_dir).log(3, {"train/loss": 1.0})
    (options,) = wandb.inits
    assert (options["group"], options["name"], options["resume"]) == ("sweep", "demo", "allow")
    assert options["config"]["learner"]["lr"] == config.learner.lr
    assert {"ray", "torch"} <= options["config"]["versions"].keys()
    assert wandb.axes == [("step", {}), ("*", {"step_metric": "step"})]
    assert wandb.logged == [{"train/loss": 1.0, "step": 3}]


def test_a_resumed_run_goes_on_under_its_id_and_an_agents_run_under_the_agents(
    wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run_dir = run_of(tmp_path / "a", "wandb")
    WandbSink(config, run_dir)
    WandbSink(config, run_dir)
    assert wandb.inits[0]["id"] == wandb.inits[1]["id"]
    monkeypatch.setenv("WANDB_RUN_ID", "agent1")
    config, run_dir = run_of(tmp_path / "b", "wandb")
    WandbSink(config, run_dir)
    assert wandb.inits[2]["id"] == "agent1"


def test_the_table_of_samples_is_capped_and_has_the_newest(
    wandb: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "_MAX_TABLE_ROWS", 3)
    sink = WandbSink(*run_of(tmp_path, "wandb"))
    for step in (1, 2):
        sink.show([SampleRow(step=step, text=t, reward=None, signal="a -0.5") for t in "ab"])
    table = wandb.logged[-1]["samples"]
    assert table["columns"] == ["step", "text", "reward", "signal"]
    assert table["data"] == [[1, "b", None, "a -0.5"], [2, "a", None, "a -0.5"], [2, "b", None, "a -0.5"]]


def test_a_checkpoint_is_a_version_of_the_runs_artifact(wandb: FakeWandb, tmp_path: Path) -> None:
    WandbSink(*run_of(tmp_path, "wandb")).keep("checkpoint", tmp_path / "step-000002", 2)
    (artifact,) = wandb.artifacts
    assert (artifact.name, artifact.folders) == ("demo-checkpoint", [str(tmp_path / "step-000002")])
    assert artifact.options == {"type": "model", "metadata": {"step": 2}}

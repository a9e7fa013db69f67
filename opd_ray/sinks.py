"""Services that metrics are sent to besides the run dir: Weights & Biases, TensorBoard. None may stop or slow a run."""

import os
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from opd_ray.config.schema import Config
from opd_ray.config.services import TrackingKind
from opd_ray.protocol import Metrics
from opd_ray.state import RunDir
from opd_ray.versions import versions
from opd_ray.wandb_login import has_wandb_credentials

_MAX_TABLE_ROWS = 100
_NUM_TRIES, _FIRST_PAUSE_S = 3, 1.0
_INIT_S = 30.0  # how long W&B itself tries to open a run
_MAX_WAITING = 1000  # calls that a slow service has not taken yet
_OPEN_S, _FINISH_S = 15.0, 60.0  # how long a run waits for a service, at its start and at its end
_WANDB_ID = "wandb_id.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """One sampled response of a step, for a table."""

    step: int
    text: str  # prompt and response
    reward: float | None
    signal: str = ""  # a token and log q - log p of it, one after the other


class Sink(Protocol):
    """A service that metrics are sent to besides the files."""

    where: str  # URL or folder, for people

    def log(self, step: int, metrics: Metrics) -> None:
        """Send the metrics of a step."""

    def show(self, rows: Sequence[SampleRow]) -> None:
        """Send sampled responses."""

    def keep(self, name: str, folder: Path, step: int) -> None:
        """Send a model or a checkpoint."""

    def finish(self, summary: Metrics) -> None:
        """Send the run's summary and close."""


class WandbSink:
    """Weights & Biases: online with credentials, else offline in the run dir; resumes its own run."""

    def __init__(self, config: Config, run_dir: RunDir) -> None:
        import wandb  # slow, and not wanted with other kinds

        os.environ.setdefault("WANDB_SILENT", "true")
        run_id = wandb_run_id(run_dir) or os.environ.get("WANDB_RUN_ID", uuid.uuid4().hex[:8])
        self._wandb: Any = wandb
        self._name = config.name
        self._rows: deque[SampleRow] = deque(maxlen=_MAX_TABLE_ROWS)
        self._run = wandb.init(
            project=config.tracking.project,
            entity=config.tracking.entity,
            group=config.tracking.group,
            name=config.name,
            id=run_id,
            resume="allow",
            dir=str(run_dir.path),
            config={**asdict(config), "versions": versions()},
            mode=_wandb_mode(),
            settings=wandb.Settings(init_timeout=_INIT_S),
        )
        (run_dir.path / _WANDB_ID).write_text(run_id + "\n")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.where = self._run.url or str(Path(self._run.dir).parent)

    def log(self, step: int, metrics: Metrics) -> None:
        """Send a step; the axis is the metric `step`, so several calls for one step do no harm."""
        self._run.log({**metrics, "step": step})

    def show(self, rows: Sequence[SampleRow]) -> None:
        """Send a table of the newest rows, of this and of earlier calls."""
        self._rows.extend(rows)
        columns = list(SampleRow.__dataclass_fields__)
        data = [[getattr(row, column) for column in columns] for row in self._rows]
        self._run.log({"samples": self._wandb.Table(columns=columns, data=data), "step": self._rows[-1].step})

    def keep(self, name: str, folder: Path, step: int) -> None:
        """Send a folder as a version of the artifact `<run>-<name>`."""
        artifact = self._wandb.Artifact(f"{self._name}-{name}", type="model", metadata={"step": step})
        artifact.add_dir(str(folder))
        self._run.log_artifact(artifact)

    def finish(self, summary: Metrics) -> None:
        """Send the summary and end the run."""
        self._run.summary.update(dict(summary))
        self._run.finish()


class TensorBoardSink:
    """Event files in the run dir, for `tensorboard --logdir runs`."""

    def __init__(self, config: Config, run_dir: RunDir, *, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run_dir.path / "tensorboard"
        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        self._writer.add_text("config", f"```\n{asdict(config)}\n```", step)
        self.where = str(folder)

    def log(self, step: int, metrics: Metrics) -> None:
        """Write a step."""
        for name, value in metrics.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)

    def show(self, rows: Sequence[SampleRow]) -> None:
        """Write responses as text."""
        for index, row in enumerate(rows):
            self._writer.add_text(f"samples/{index}", f"reward {row.reward}\n\n```\n{row.text}\n```", row.step)

    def keep(self, name: str, folder: Path, step: int) -> None:
        """Write where the folder is: event files hold no models."""
        self._writer.add_text(f"kept/{name}", str(folder), step)

    def finish(self, summary: Metrics) -> None:
        """Write the summary and close."""
        for name, value in summary.items():
            self._writer.add_scalar(f"summary/{name}", value)
        self._writer.close()


class GuardedSink:
    """A sink at arm's length: called from a thread of its own, in order, so that a run never waits for the service.

    A call that fails is tried again a few times; then the service is left alone for the rest of the run, with one
    warning, and metrics.jsonl goes on. So it is with a service that does not open, or does not keep up.
    """

    def __init__(self, open_sink: Callable[[], Sink], *, name: str, warn: Callable[[str], None]) -> None:
        self._name = name
        self._warn = warn
        self._calls: queue.Queue[Callable[[Sink], None] | None] = queue.Queue(_MAX_WAITING)
        self._open = threading.Event()
        self._dead = False
        self.where = "not connected yet"
        self._thread = threading.Thread(target=self._work, args=(open_sink,), name=f"{name} sink", daemon=True)
        self._thread.start()
        if not self._open.wait(_OPEN_S):
            warn(f"{name} has not opened within {_OPEN_S:g} s; the run goes on, metrics.jsonl has everything")

    def log(self, step: int, metrics: Metrics) -> None:
        """Have the metrics of a step sent."""
        copied = dict(metrics)
        self._call(lambda sink: sink.log(step, copied))

    def show(self, rows: Sequence[SampleRow]) -> None:
        """Have sampled responses sent."""
        self._call(lambda sink: sink.show(rows))

    def keep(self, name: str, folder: Path, step: int) -> None:
        """Have a model or a checkpoint sent."""
        self._call(lambda sink: sink.keep(name, folder, step))

    def finish(self, summary: Metrics) -> None:
        """Have the summary sent; wait for it, and for all that came before, no longer than a minute."""
        copied = dict(summary)
        if not self._open.is_set():
            self._give_up("it has not opened")
        self._call(lambda sink: sink.finish(copied))
        self._call(None)
        self._thread.join(0 if self._dead else _FINISH_S)
        if self._thread.is_alive():
            self._give_up(f"it has not taken everything within {_FINISH_S:g} s")

    def _call(self, call: Callable[[Sink], None] | None) -> None:
        if self._dead:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._give_up(f"it is {_MAX_WAITING} calls behind")

    def _work(self, open_sink: Callable[[], Sink]) -> None:
        sink = self._tried(open_sink)
        self.where = sink.where if sink else "not connected"
        self._open.set()
        while sink is not None and not self._dead:
            call = self._calls.get()
            if call is None:
                return
            self._tried(lambda call=call: call(sink))  # type: ignore[misc]

    def _tried(self, call: Callable[[], Any]) -> Any:
        """Return what a call returns, None when every try has failed."""
        fault: Exception | None = None
        for attempt in range(_NUM_TRIES):
            if attempt:
                time.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
            try:
                return call()
            except Exception as error:  # noqa: BLE001 - whatever a service's client raises must not end the run
                fault = error
        self._give_up(str(fault).strip().partition("\n")[0] or type(fault).__name__)
        return None

    def _give_up(self, reason: str) -> None:
        if not self._dead:
            self._dead = True
            self._warn(f"{self._name} is given up for this run ({reason}); metrics.jsonl has everything")


def open_sinks(config: Config, run_dir: RunDir, *, step: int, warn: Callable[[str], None]) -> list[Sink]:
    """Return the sinks that the configuration asks for. step: the one that the run goes on from."""
    sinks: Mapping[TrackingKind, Callable[[], Sink]] = {
        TrackingKind.wandb: lambda: WandbSink(config, run_dir),
        TrackingKind.tensorboard: lambda: TensorBoardSink(config, run_dir, step=step),
    }
    names = {TrackingKind.wandb: "W&B", TrackingKind.tensorboard: "TensorBoard"}
    kind = config.tracking.kind
    return [GuardedSink(sinks[kind], name=names[kind], warn=warn)] if kind in sinks else []


def wandb_run_id(run_dir: RunDir) -> str:
    """Return the W&B run that a run dir continues; "" where there is none."""
    path = run_dir.path / _WANDB_ID
    return path.read_text().strip() if path.exists() else ""


def _wandb_mode() -> Any:
    """WANDB_MODE decides if set; else online exactly when credentials are present: WANDB_API_KEY or a netrc entry."""
    return os.environ.get("WANDB_MODE") or ("online" if has_wandb_credentials() else "offline")

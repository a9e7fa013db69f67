"""One try at a run: its pools are opened, a state is restored, the loop runs to its end, the student is exported."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

import workers
from opd_ray.assembly import build_loop, run_saved
from opd_ray.checkpoints import DiskCheckpoints
from opd_ray.config.schema import Config
from opd_ray.console import RunConsole, StepLine
from opd_ray.controller import Fleets
from opd_ray.pipeline_log import PipelineLog
from opd_ray.plan import Plan
from opd_ray.protocol import Metrics
from opd_ray.quarantine import DiskQuarantine
from opd_ray.recovery import Replacements
from opd_ray.replay import prepare_recording
from opd_ray.sinks import Sink, wandb_run_id
from opd_ray.state import RunDir
from opd_ray.tracking import RunTracker, record_event


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What all tries at a run share."""

    config: Config
    plan: Plan
    run_dir: RunDir
    console: RunConsole
    checkpoints: DiskCheckpoints
    sinks: list[Sink]
    stoppable: Callable[[], AbstractContextManager[object]]
    replacements: Replacements


def attempt(run: Run, *, step: int, measured: Metrics, retaken: Sequence[range] = ()) -> RunTracker:
    """Train from update `step` to the last and export the student.

    measured: before the first step, and logged with it. retaken: updates that take other prompts than before, once
    more each time they are named. Raises WorkerLost when a worker is, MustRollBack when too many updates were left out.
    """
    config, plan, run_dir, console, checkpoints = run.config, run.plan, run.run_dir, run.console, run.checkpoints
    prepare_recording(config, run_dir.scores, models=plan.models, ids=plan.ids, step=step)
    with ExitStack() as stack:
        with console.phase("start workers"):
            fleets = stack.enter_context(_open_fleets(config, plan, restarted=run.replacements.add))
            checkpoints.restore(step, fleets.learner, fleets.teacher)
        training = stack.enter_context(_training_fleets(config, fleets, console=console))
        with console.progress_phase("train", num_steps=config.num_steps, done=step) as line:
            tracker = _open_tracker(run, step=step, line=line, measured=measured)
            checkpoints.saved = _kept(config, tracker)
            checkpoints.wait_saved = fleets.learner.wait_saved if config.async_save else None
            checkpoints.facts = {**checkpoints.facts, "wandb_run_id": wandb_run_id(run_dir)}
            loop = build_loop(
                config,
                fleets=fleets,
                training=training,
                prompts=plan.prompts,
                checkpoints=checkpoints,
                tracker=tracker,
                quarantine=DiskQuarantine(run_dir, say=console.say),
                stoppable=run.stoppable,
            )
            checkpoints.restore(step, loop.window)
            for steps in retaken:
                loop.window.retake(steps)
            run_saved(loop, step=step, checkpoints=checkpoints)
        with console.phase("export student"):
            training.learner.export(str(run_dir.export))
    return tracker


def _kept(config: Config, tracker: RunTracker) -> Callable[[int, Path], None]:
    """Return what is done with a checkpoint besides keeping it in the run dir."""
    return lambda step, folder: tracker.keep("checkpoint", folder, step) if config.tracking.log_checkpoints else None


def _open_tracker(run: Run, *, step: int, line: StepLine, measured: Metrics) -> RunTracker:
    return RunTracker(
        run.run_dir,
        step=step,
        num_samples=run.config.tracking.num_samples,
        sinks=run.sinks,
        line=line,
        measured=measured,
        counted=lambda: {**run.replacements.metrics(), **run.checkpoints.metrics()},
        pipeline=PipelineLog(run.config, run.run_dir.path),
    )


def _open_fleets(config: Config, plan: Plan, *, restarted: Callable[[str], None]) -> AbstractContextManager[Fleets]:
    return workers.open_fleets(
        config,
        vocab_size=plan.models.vocab_size,
        ids=plan.ids,
        prompt_tokens=plan.prompt_tokens,
        log_dir=RunDir.of(config).logs,
        restarted=restarted,
    )


def _training_fleets(config: Config, fleets: Fleets, *, console: RunConsole) -> AbstractContextManager[Fleets]:
    """Return what the loop trains with; when scores can be recorded no longer, that is told and the run goes on."""
    run_dir = RunDir.of(config)

    def say(fault: str) -> None:
        message = f"{fault}; scores are recorded up to there"
        record_event(run_dir, kind="recording_ended", message=message)
        console.say(f"warning: recording ended: {message}")

    return workers.training_fleets(config, fleets, folder=run_dir.scores, log_dir=run_dir.logs, on_fault=say)

"""Starts a run: `python -m opd_ray.train experiment=demo key=value ...`."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from ray.exceptions import RayError
from transformers.utils.logging import disable_progress_bar

import workers
from opd_ray.assembly import held_out
from opd_ray.attempt import Run, attempt
from opd_ray.banner import closing_words, describe_run, result_rows
from opd_ray.baselines import measure_engines, measure_teacher
from opd_ray.config.cli import check_overrides
from opd_ray.config.load import load, register_schema
from opd_ray.config.schema import Config, StudentConfig, TeacherConfig
from opd_ray.config.validate import validate_vocabulary
from opd_ray.console import RunConsole
from opd_ray.data.models import inspect_models
from opd_ray.data.tiny_models import build_tiny_model, is_built
from opd_ray.jobs import lost_with_the_job, tell_result
from opd_ray.launcher import register_launcher
from opd_ray.lease import lease
from opd_ray.metrics import summarise
from opd_ray.plan import Plan, plan_run
from opd_ray.preflight import machine_findings, model_findings, warnings_of
from opd_ray.protocol import CannotGoOn, Metrics
from opd_ray.recovery import Replacements, Restarts, Rollbacks, with_half_micro_batches
from opd_ray.resuming import open_checkpoints
from opd_ray.routing import teacher_key, teachers_of
from opd_ray.sinks import Sink, open_sinks
from opd_ray.state import RunDir, check_free, claim
from opd_ray.stopping import Stopped, StopSignal
from opd_ray.sweep import Outcome, as_trial, record_trial, sweep_value, trial_number, trial_of
from opd_ray.tracking import RunTracker, record_event
from workers.faults import describe

CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"
# The driver computes nothing, and transformers' notes and bars would disturb the run's own.
QUIET_ENV = {"DS_ACCELERATOR": "cpu", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
_RUN_FAILED, _USER_ERROR, _INTERRUPTED = 1, 2, 130  # exit codes
_LAST_SHELL_CODE = 128  # above: a signal ended the run


def train(config: Config, console: RunConsole) -> Metrics:
    """Run one configuration to its end and return its summary.

    Raises ValueError, before any worker starts, for what a user can mend; RayError when a worker fails; CannotGoOn,
    with a checkpoint written, when a teacher is gone or cannot score too many groups, or the run is told to end.
    """
    start = time.perf_counter()
    run_dir = RunDir.of(config)
    check_free(run_dir, config.resume)
    plan = _plan(config, console)
    local = workers.is_local(config.cluster)
    warnings = warnings_of(
        [*machine_findings(config), *model_findings(config, vocab_size=plan.models.vocab_size, local=local)]
    )
    with lease(run_dir), workers.connected(config, console.say), StopSignal().listening() as stop:
        claim(run_dir, config.resume)
        step, checkpoints = open_checkpoints(config, plan, run_dir=run_dir, warn=_warner(run_dir, console))
        sinks = _announce(config, plan, run_dir=run_dir, step=step, warnings=warnings, console=console)
        of_run = held_out(config, plan.prompts)
        measured = measure_teacher(config, held_out=of_run, console=console)
        gaps = measure_engines(config, held_out=of_run, vocab_size=plan.models.vocab_size, console=console)
        run = Run(
            config=config,
            plan=plan,
            run_dir=run_dir,
            console=console,
            checkpoints=checkpoints,
            sinks=sinks,
            stoppable=stop.stoppable,
            replacements=Replacements(warn=_warner(run_dir, console)),
        )
        tracker = _survived(run, step=step, gaps=gaps, warn=_warner(run_dir, console))
    history = tracker.history
    summary = {**summarise(history, wall_s=time.perf_counter() - start), **measured}
    if config.tracking.log_checkpoints:
        tracker.keep("student", run_dir.export, config.num_steps)
    tracker.finish(summary)
    console.table("Result", result_rows(summary, history=history, phases=console.phase_seconds))
    console.say("\n".join(closing_words(run_dir)))
    return summary


def _survived(run: Run, *, step: int, gaps: Metrics, warn: Callable[..., None]) -> RunTracker:
    """Train to the end through the loss of workers, as often as the configuration allows; return the tracker."""
    restarts, rollbacks = Restarts(config=run.config.fault, warn=warn), Rollbacks(warn=warn)
    while True:
        try:
            counts = {"fault/restarts": float(restarts.total), **rollbacks.metrics()}
            return attempt(run, step=step, measured={**gaps, **counts}, retaken=rollbacks.since(step))
        except workers.MustRollBack as fault:
            step = run.checkpoints.roll_back(fault.first)
            allowed = f"fault.max_restarts={run.config.fault.max_restarts} allows no further going back"
            cause = CannotGoOn(f"{fault}; {allowed}; resume=auto goes on from update {step}")
            restarts.after(fault, cause=cause, step=step)
            rollbacks.add(step, fault.last)
        except workers.WorkerLost as loss:
            if isinstance(loss, workers.LearnerOutOfMemory):
                run = replace(run, config=with_half_micro_batches(run.config, cause=loss.cause, warn=warn))
            run.checkpoints.forget()
            step = run.checkpoints.newest()
            restarts.after(loss, cause=loss.cause, step=step)


def _announce(
    config: Config, plan: Plan, *, run_dir: RunDir, step: int, warnings: Sequence[str], console: RunConsole
) -> list[Sink]:
    """Write down and say what the run is made of; open the services that its numbers go to."""
    (run_dir.path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    if plan.prompts.num_dropped:
        record_event(run_dir, kind="prompts_dropped", message=f"{plan.prompts.num_dropped} empty or too long")

    warn = _warner(run_dir, console)
    for warning in [*warnings, *lost_with_the_job(config)]:
        warn(warning, kind="preflight_warning")
    sinks = open_sinks(config, run_dir, step=step, warn=warn)
    words = describe_run(config, models=plan.models, prompts=plan.prompts, run_dir=run_dir, step=step)
    console.say("\n".join([*words, *(f"tracking   {config.tracking.kind.value}, {sink.where}" for sink in sinks)]))
    return sinks


def _warner(run_dir: RunDir, console: RunConsole) -> Callable[..., None]:
    """Return what tells a person, and events.jsonl, of something that the run goes on after."""

    def warn(words: str, kind: str = "tracking_failed") -> None:
        record_event(run_dir, kind=kind, message=words)
        console.say(f"warning: {words}")

    return warn


def _plan(config: Config, console: RunConsole) -> Plan:
    """Build the tiny models that are missing, and plan the run. Raises ValueError for what does not fit."""
    teachers = teachers_of(config).by_name
    workers.check_teachers(config, teachers.values())
    _build_missing_models(config, console)
    models = inspect_models(
        student_path=config.student.path,
        teachers={teacher_key(name): t for name, t in teachers.items()},
        lora=config.student.lora.wanted,
    )
    validate_vocabulary(config, vocab_size=models.vocab_size)
    return plan_run(config, models)


def main() -> None:
    """Run the command line; a mistake of the user's is one line and exit code 2, a failed worker exit code 1."""
    os.environ.update(QUIET_ENV)
    disable_progress_bar()
    register_schema()
    register_launcher()
    try:
        sys.argv[1:] = check_overrides(sys.argv[1:], config_dir=CONFIG_DIR)
    except ValueError as error:
        _fail(str(error), _USER_ERROR)
    _hydra_main()


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")
def _hydra_main(composed: DictConfig) -> float:
    """Run what Hydra has composed and return what a sweeper is told.

    Of a `--multirun` this is one trial: a failure is recorded, and the next trial goes on.
    """
    composed = as_trial(composed)
    outcome = _outcome(composed)
    number = trial_number()
    if number is None or outcome.exit_code > _LAST_SHELL_CODE:  # a signal ends the whole sweep
        if outcome.error:
            _fail(outcome.error, outcome.exit_code)
    else:
        record_trial(
            Path(HydraConfig.get().sweep.dir),
            trial_of(outcome, composed, number=number, overrides=HydraConfig.get().overrides.task),
        )
        if outcome.error:
            print(f"error: trial {number}: {outcome.error}", file=sys.stderr)
    tell_result(outcome.summary)
    return sweep_value(composed.eval.sweep_metric, outcome.summary)


def _outcome(composed: DictConfig) -> Outcome:
    """Run a configuration; a fault becomes words for people and an exit code."""
    try:
        config = load(composed)
        return Outcome(summary=train(config, RunConsole()))
    except RayError as fault:  # first: a worker's ValueError arrives as both
        message = describe(fault, log_dir=RunDir.of(config).logs)
        record_event(RunDir.of(config), kind="worker_failed", message=message)
        return Outcome(error=message, exit_code=_RUN_FAILED)
    except CannotGoOn as fault:
        record_event(RunDir.of(config), kind="run_stopped", message=str(fault))
        return Outcome(error=str(fault), exit_code=fault.exit_code if isinstance(fault, Stopped) else _RUN_FAILED)
    except ValueError as fault:
        return Outcome(error=str(fault), exit_code=_USER_ERROR)
    except OSError as fault:
        if fault.filename is None:
            raise
        return Outcome(error=f"{fault.filename}: {fault.strerror}", exit_code=_RUN_FAILED)
    except KeyboardInterrupt:
        words = "interrupted; resume=auto goes on from the newest checkpoint"
        return Outcome(error=words, exit_code=_INTERRUPTED)


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _build_missing_models(config: Config, console: RunConsole) -> None:
    """Train the tiny models that the configuration describes and that are not there yet."""
    models: dict[str, TeacherConfig | StudentConfig] = {
        teacher_key(name).removesuffix(".path"): teacher for name, teacher in teachers_of(config).by_name.items()
    }
    for role, model in {**models, "student": config.student}.items():
        if model.build is None:
            continue
        path = Path(model.path)
        if is_built(path, model.build):
            console.say(f"{role} is in {path} already")
            continue
        with console.progress_phase(f"build {role}", num_steps=model.build.num_steps) as line:
            build_tiny_model(path, spec=model.build, on_step=lambda step, _, loss: line.show_loss(step, loss))


if __name__ == "__main__":
    main()

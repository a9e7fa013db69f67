"""Starts a run: `python -m opd_ray.train experiment=demo key=value ...`."""

import os
import sys
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import NoReturn

import hydra
from omegaconf import DictConfig, OmegaConf
from ray.exceptions import RayError
from transformers.utils.logging import disable_progress_bar

import workers
from opd_ray.assembly import build_loop, held_out, run_saved
from opd_ray.banner import closing_words, describe_run, result_rows
from opd_ray.config.cli import check_overrides
from opd_ray.config.load import load, register_schema
from opd_ray.config.schema import Config, StudentConfig, TeacherConfig
from opd_ray.config.validate import validate_vocabulary
from opd_ray.console import RunConsole, StepLine
from opd_ray.controller import Fleets
from opd_ray.data.models import inspect_models
from opd_ray.data.teacher_context import with_room
from opd_ray.data.tiny_models import build_tiny_model, is_built
from opd_ray.engine_checks import EngineTest, teacher_gaps
from opd_ray.evaluation import HeldOut, greedy_summaries
from opd_ray.metrics import mean_reward, summarise
from opd_ray.pipeline_log import PipelineLog
from opd_ray.plan import Plan, plan_run
from opd_ray.preflight import machine_findings, model_findings, warnings_of
from opd_ray.protocol import CannotGoOn, GroupSummary, Metrics
from opd_ray.quarantine import DiskQuarantine
from opd_ray.replay import prepare_recording
from opd_ray.routing import teacher_key, teachers_of
from opd_ray.state import DiskCheckpoints, RunDir, check_free, claim
from opd_ray.tracking import RunTracker, Sink, open_sinks, record_event
from workers.faults import describe

CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"
# The driver computes nothing, and transformers' notes and bars would disturb the run's own.
QUIET_ENV = {"DS_ACCELERATOR": "cpu", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
_RUN_FAILED, _USER_ERROR, _INTERRUPTED = 1, 2, 130  # exit codes


def train(config: Config, console: RunConsole) -> Metrics:
    """Run one configuration to its end and return its summary.

    Raises ValueError, before any worker starts, for what a user can mend; RayError when a worker fails; CannotGoOn,
    with a checkpoint written, when a teacher is gone or cannot score too many groups.
    """
    start = time.perf_counter()
    run_dir = RunDir.of(config)
    check_free(run_dir, config.resume)
    plan = _plan(config, console)
    local = workers.is_local(config.cluster)
    warnings = warnings_of(
        [*machine_findings(config), *model_findings(config, vocab_size=plan.models.vocab_size, local=local)]
    )
    with workers.connected(config, console.say):
        step = claim(run_dir, config.resume)
        (run_dir.path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
        prepare_recording(config, run_dir.scores, models=plan.models, ids=plan.ids, step=step)
        if plan.prompts.num_dropped:
            record_event(run_dir, kind="prompts_dropped", message=f"{plan.prompts.num_dropped} empty or too long")
        for warning in warnings:
            record_event(run_dir, kind="preflight_warning", message=warning)
            console.say(f"warning: {warning}")
        sinks = open_sinks(config, run_dir)
        words = describe_run(config, models=plan.models, prompts=plan.prompts, run_dir=run_dir, step=step)
        console.say("\n".join([*words, *(f"W&B        {sink.where}" for sink in sinks)]))
        of_run = held_out(config, plan.prompts)
        measured = _measure_teacher(config, held_out=of_run, console=console)
        gaps = _measure_engines(config, held_out=of_run, vocab_size=plan.models.vocab_size, console=console)
        with ExitStack() as stack:
            with console.phase("start workers"):
                fleets = stack.enter_context(_open_fleets(config, plan))
                checkpoints = DiskCheckpoints(folder=run_dir.checkpoints)
                checkpoints.restore(step, fleets.learner, fleets.teacher)
            training = stack.enter_context(_training_fleets(config, fleets, console=console))
            with console.progress_phase("train", num_steps=config.num_steps, done=step) as line:
                tracker = _open_tracker(config, run_dir, step=step, sinks=sinks, line=line, gaps=gaps)
                loop = build_loop(
                    config,
                    fleets=fleets,
                    training=training,
                    prompts=plan.prompts,
                    checkpoints=checkpoints,
                    tracker=tracker,
                    quarantine=DiskQuarantine(run_dir, say=console.say),
                )
                checkpoints.restore(step, loop.window)
                run_saved(loop, step=step, checkpoints=checkpoints)
            with console.phase("export student"):
                training.learner.export(str(run_dir.export))
    history = tracker.history
    summary = {**summarise(history, wall_s=time.perf_counter() - start), **measured}
    tracker.finish(summary)
    console.table("Result", result_rows(summary, history=history, phases=console.phase_seconds))
    console.say("\n".join(closing_words(run_dir)))
    return summary


def _open_tracker(
    config: Config, run_dir: RunDir, *, step: int, sinks: list[Sink], line: StepLine, gaps: Metrics
) -> RunTracker:
    return RunTracker(
        run_dir,
        step=step,
        num_samples=config.tracking.num_samples,
        sinks=sinks,
        line=line,
        measured=gaps,
        pipeline=PipelineLog(config, run_dir.path),
    )


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


def _open_fleets(config: Config, plan: Plan) -> AbstractContextManager[Fleets]:
    return workers.open_fleets(
        config,
        vocab_size=plan.models.vocab_size,
        ids=plan.ids,
        prompt_tokens=plan.prompt_tokens,
        log_dir=RunDir.of(config).logs,
    )


def main() -> None:
    """Run the command line; a mistake of the user's is one line and exit code 2, a failed worker exit code 1."""
    os.environ.update(QUIET_ENV)
    disable_progress_bar()
    register_schema()
    try:
        sys.argv[1:] = check_overrides(sys.argv[1:], config_dir=CONFIG_DIR)
    except ValueError as error:
        _fail(str(error), _USER_ERROR)
    _hydra_main()


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")
def _hydra_main(composed: DictConfig) -> None:
    try:
        config = load(composed)
        train(config, RunConsole())
    except RayError as error:  # first: a worker's ValueError arrives as both
        run_dir = RunDir.of(config)
        message = describe(error, log_dir=run_dir.logs)
        record_event(run_dir, kind="worker_failed", message=message)
        _fail(message, _RUN_FAILED)
    except CannotGoOn as error:
        record_event(RunDir.of(config), kind="run_stopped", message=str(error))
        _fail(str(error), _RUN_FAILED)
    except ValueError as error:
        _fail(str(error), _USER_ERROR)
    except KeyboardInterrupt:
        _fail("interrupted; resume=auto goes on from the newest checkpoint", _INTERRUPTED)


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


def _measure_teacher(config: Config, *, held_out: HeldOut, console: RunConsole) -> Metrics:
    teachers, summaries = teachers_of(config), list[GroupSummary]()
    for name, teacher in teachers.by_name.items():
        mine = held_out.of_task({p.task for p in held_out.prompts if teachers.name_of(p.task) == name})
        if teacher.evaluate and mine.prompts:
            with (
                console.phase(f"evaluate {teacher_key(name).removesuffix('.path')}"),
                workers.teacher_sampler(
                    with_room(config, [p.teacher_ids_P for p in mine.prompts]), teacher, log_dir=RunDir.of(config).logs
                ) as sampler,
            ):
                summaries += greedy_summaries(mine.as_teacher_reads(), sampler)
    return mean_reward("teacher_accuracy", summaries)


def _training_fleets(config: Config, fleets: Fleets, *, console: RunConsole) -> AbstractContextManager[Fleets]:
    """Return what the loop trains with; when scores can be recorded no longer, that is told and the run goes on."""
    run_dir = RunDir.of(config)

    def say(fault: str) -> None:
        message = f"{fault}; scores are recorded up to there"
        record_event(run_dir, kind="recording_ended", message=message)
        console.say(f"warning: recording ended: {message}")

    return workers.training_fleets(config, fleets, folder=run_dir.scores, log_dir=run_dir.logs, on_fault=say)


def _measure_engines(config: Config, *, held_out: HeldOut, vocab_size: int, console: RunConsole) -> Metrics:
    """Compare teachers with their checkpoints where reference_tokens asks for it."""
    if not any(teacher.reference_tokens for teacher in teachers_of(config).by_name.values()):
        return {}
    test = EngineTest(
        config=config,
        vocab_size=vocab_size,
        temperature=config.rollout.temperature,
        log_dir=RunDir.of(config).logs,
    )
    with console.phase("compare teachers with their checkpoints"):
        return teacher_gaps(test, prompts=held_out.prompts)


if __name__ == "__main__":
    main()

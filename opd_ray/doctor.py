"""Says what would fail before a run starts: `python -m opd_ray.doctor <overrides of train> [--json] [--no-engines]`.

Exit code 0: all green or yellow; 1: something red; 2: the command line or the configuration cannot be used.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from huggingface_hub import get_token
from hydra import compose, initialize_config_dir
from ray.exceptions import RayError
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

import workers
from opd_ray.config.cli import check_overrides
from opd_ray.config.load import load, register_schema
from opd_ray.config.schema import Config
from opd_ray.data.lora import describe_adapters
from opd_ray.data.models import Models, inspect_models
from opd_ray.data.prompts import PromptSets
from opd_ray.data.tiny_models import is_built
from opd_ray.engine_checks import EngineTest, engine_findings, student_as_teacher
from opd_ray.plan import plan_run
from opd_ray.preflight import Finding, Status, error, machine_findings, model_findings, ok, warning
from opd_ray.preflight.machine import dashboard, hub_credentials, tracking_credentials
from opd_ray.protocol import CannotGoOn
from opd_ray.routing import teacher_key, teachers_of
from opd_ray.train import CONFIG_DIR, QUIET_ENV
from opd_ray.wandb_login import has_wandb_credentials
from workers.faults import describe

_FOUND_ERRORS, _USER_ERROR = 1, 2  # exit codes
_PLACEMENT_TIMEOUT_S = 30.0  # a run may wait longer for its place than a look at it should
_COLOURS = {Status.ok: "green", Status.warning: "yellow", Status.error: "red"}
_PLAIN_WIDTH = 160  # columns where there is no terminal


def examine(config: Config, *, engines: bool) -> list[Finding]:
    """Return the findings of all checks; those that the state of things forbids are left out, with the reason.

    With engines, the run's own workers are started on a handful of held-out prompts, one pool after the other.
    """
    findings = [*machine_findings(config), *_credentials(config)]
    models, of_models = _models(config)
    prompts, of_data = _prompts(config, models) if models else (None, [])
    findings = [*of_models, *of_data, *findings]
    with ExitStack() as stack:
        of_cluster = _cluster(config, stack)
        findings += of_cluster
        if not engines:
            return [*findings, warning("engines", "not checked", "leave --no-engines out")]
        red = [finding.name for finding in findings if finding.status is Status.error]
        if models is None or prompts is None or red:
            reason = f"not checked because of: {', '.join(red) or 'models'}"
            return [*findings, warning("engines", reason, "mend that first")]
        return [*findings, *_engines(config, models=models, prompts=prompts)]


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print the table."""
    table = Table(title="Doctor", title_justify="left")
    for column in ("", "check", "found", "what to change"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        colour = _COLOURS[finding.status]
        row = (Text(colour, style=colour), Text(finding.name), Text(finding.found), Text(finding.advice))
        table.add_row(*row)
    console.print(table)


def main() -> None:
    """Run the command line."""
    os.environ.update(QUIET_ENV)
    disable_progress_bar()
    register_schema()
    parser = argparse.ArgumentParser(prog="python -m opd_ray.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for opd_ray.train")
    parser.add_argument("--json", action="store_true", help="print a list of objects name, status, found, advice")
    parser.add_argument("--no-engines", action="store_true", help="start no worker")
    flags = parser.parse_intermixed_args()
    try:
        check_overrides(flags.overrides, config_dir=CONFIG_DIR)
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            config = load(compose("train", overrides=flags.overrides))
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(_USER_ERROR)
    findings = examine(config, engines=not flags.no_engines)
    if flags.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        console = Console(highlight=False)
        show(findings, console if console.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH))
    sys.exit(_FOUND_ERRORS if any(finding.status is Status.error for finding in findings) else 0)


def _models(config: Config) -> tuple[Models | None, list[Finding]]:
    teachers = teachers_of(config).by_name
    built = {"student": config.student} | {teacher_key(n).removesuffix(".path"): t for n, t in teachers.items()}
    missing = [role for role, m in built.items() if m.build is not None and not is_built(Path(m.path), m.build)]
    if missing:
        words = f"{', '.join(missing)}: not there yet, the run trains it itself; the models are not checked"
        return None, [warning("models", words, "start the run, then ask again")]
    try:
        by_key = {teacher_key(name): teacher for name, teacher in teachers.items()}
        models = inspect_models(student_path=config.student.path, teachers=by_key, lora=config.student.lora.wanted)
    except ValueError as refusal:
        return None, [error("models", str(refusal), "give other models")]
    found = f"the files of student and teachers ({len(teachers)}) are whole, their token maps agree"
    found += f"; {describe_adapters(config.student.lora, models.adapters)}" if models.adapters else ""
    local = workers.is_local(config.cluster)
    return models, [ok("models", found), *model_findings(config, vocab_size=models.vocab_size, local=local)]


def _prompts(config: Config, models: Models) -> tuple[PromptSets | None, list[Finding]]:
    try:
        workers.check_teachers(config, teachers_of(config).by_name.values())
        prompts = plan_run(config, models).prompts
    except ValueError as refusal:
        return None, [error("objective and data", str(refusal), "as said")]
    found = f"{len(prompts.train):,} prompts to train on, {len(prompts.held_out):,} held out"
    return prompts, [ok("objective and data", found)]


def _credentials(config: Config) -> list[Finding]:
    paths = {teacher_key(name): teacher.path for name, teacher in teachers_of(config).by_name.items()}
    return [
        tracking_credentials(
            config.tracking.kind, present=has_wandb_credentials(), mode=os.environ.get("WANDB_MODE") or None
        ),
        hub_credentials({"student.path": config.student.path, **paths}, present=get_token() is not None),
    ]


def _cluster(config: Config, stack: ExitStack) -> list[Finding]:
    """Join or start the cluster until the stack is left."""
    try:
        url = stack.enter_context(workers.connected(config, _tell))
    except ValueError as refusal:
        return [error("cluster", str(refusal), "change cluster.*, *.num_workers or *.cpus_per_worker")]
    asked, present = workers.totals(list(workers.pools(config).values())), workers.capacity()
    words = ", ".join(f"{asked[kind]:g} of {present[kind]:g} {kind}s" for kind in asked)
    authenticated = os.environ.get("RAY_AUTH_MODE") == "token"
    found = f"the run asks for {words}"
    if any(asked[kind] > present[kind] for kind in asked):  # not refused: cluster.may_grow=true
        advice = (
            f"an autoscaler must add the rest within cluster.placement_timeout_s={config.cluster.placement_timeout_s:g}"
        )
        return [warning("cluster", found, advice), dashboard(url, authenticated=authenticated)]
    return [ok("cluster", found), dashboard(url, authenticated=authenticated)]


def _tell(line: str) -> None:
    """Print a line beside the table, which may be JSON."""
    print(line, file=sys.stderr)


def _engines(config: Config, *, models: Models, prompts: PromptSets) -> list[Finding]:
    timeout_s = min(config.cluster.placement_timeout_s, _PLACEMENT_TIMEOUT_S)
    test = EngineTest(
        config=replace(config, cluster=replace(config.cluster, placement_timeout_s=timeout_s)),
        vocab_size=models.vocab_size,
        temperature=config.rollout.temperature,
        log_dir=Path(tempfile.mkdtemp(prefix="opd-ray-doctor-")),
    )
    try:
        findings = engine_findings(test, prompts=prompts.held_out, twin=student_as_teacher(config))
    except RayError as fault:  # first: a worker's ValueError arrives as both
        words = describe(fault, log_dir=test.log_dir)
        return [error("engines", words, f"the workers' logs lie in {test.log_dir}")]
    except CannotGoOn as fault:
        return [error("engines", str(fault), f"the workers' logs lie in {test.log_dir}")]
    except ValueError as no_place:
        findings = [warning("engines", f"not checked: {no_place}", "wait until the cluster is free, or --no-engines")]
    shutil.rmtree(test.log_dir)
    return findings


if __name__ == "__main__":
    main()

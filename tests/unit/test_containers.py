"""The images and manifests agree with the project's pins, with one another, and with what they promise."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_files import compose_config

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted((ROOT / "docker" / "kuberay").glob("*.yaml"))
RAY_VERSION = re.search(r"ray\[default\]==([\d.]+)", (ROOT / "pyproject.toml").read_text()).group(1)


def documents(manifest: Path) -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(manifest.read_text())}


def cluster_spec(manifest: Path) -> dict[str, Any]:
    found = documents(manifest)
    return found["RayJob"]["spec"]["rayClusterSpec"] if "RayJob" in found else found["RayCluster"]["spec"]


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [container for pod in pods(spec) for container in pod["containers"]]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_a_cluster_is_of_the_pinned_ray_authenticates_and_gives_every_pool_its_gpus(manifest: Path) -> None:
    spec = cluster_spec(manifest)
    assert spec["rayVersion"] == RAY_VERSION
    assert spec["authOptions"] == {"mode": "token"}
    config = compose_config("experiment=qwen3_math", "data.path=math.parquet")
    gpus = {
        group["groupName"]: int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
        for group in spec["workerGroupSpecs"]
    }
    assert gpus == {
        "rollout": config.rollout.num_workers,
        "teacher": config.teacher.num_workers,
        "learner": config.learner.num_ranks,
    }


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_containers_share_the_runs_have_no_privileges_and_take_secrets_by_reference_alone(manifest: Path) -> None:
    spec = cluster_spec(manifest)
    for container in containers(spec):
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/runs", "/dev/shm"}
        assert container["securityContext"]["runAsNonRoot"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        for variable in container["env"]:
            is_secret = re.search("KEY|TOKEN|SECRET|PASSWORD", variable["name"])
            assert ("secretKeyRef" in variable.get("valueFrom", {})) == bool(is_secret), variable["name"]
    logged_in = [any(v["name"] == "WANDB_API_KEY" for v in c["env"]) for c in containers(spec)]
    assert logged_in == [True, False, False, False]  # the controller alone logs, on the head
    claim = documents(manifest)["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert all(
        pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"] for pod in pods(spec)
    )


def test_a_job_resumes_after_a_failed_attempt_and_leaves_no_cluster_behind() -> None:
    spec = documents(ROOT / "docker" / "kuberay" / "rayjob.yaml")["RayJob"]["spec"]
    command, *overrides = spec["entrypoint"].split("opd_ray.train")
    assert command == "python -m "
    assert "resume=auto" in overrides[0].split()
    assert compose_config(*overrides[0].split()).runs_dir == "/runs"
    assert spec["backoffLimit"] >= 1
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_an_image_does_not_run_as_root_and_authenticates(name: str) -> None:
    lines = (ROOT / "docker" / name).read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000"]
    assert any("RAY_AUTH_MODE=token" in line for line in lines)


def test_what_git_ignores_is_neither_uploaded_nor_built_in() -> None:
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}
    for name in (".rayignore", ".dockerignore"):
        left_out = {line.removeprefix("**/").strip("/") for line in (ROOT / name).read_text().splitlines()}
        assert ignored <= left_out, name

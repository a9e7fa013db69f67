from pathlib import Path

import pytest
from config_files import MANDATORY, compose_config

from opd_ray.config.evaluate import EvaluateConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ALLOWED = "+{pool}.engine_args.trust_remote_code=true"


@pytest.mark.parametrize("pool", ["rollout", "teacher"])
@pytest.mark.parametrize("revision", [None, "main", COMMIT[:12]])
def test_code_of_a_hub_that_may_change_is_refused_by_key(pool: str, revision: str | None):
    named = [f"+{pool}.engine_args.code_revision={revision}"] if revision else []
    with pytest.raises(
        ValueError,
        match=rf"^{pool}\.engine_args\.trust_remote_code=true with code_revision={revision}: expected the 40",
    ):
        compose_config(*MANDATORY, ALLOWED.format(pool=pool), *named)


def test_a_commit_of_a_hub_and_the_code_in_a_folder_are_allowed(tmp_path: Path):
    compose_config(*MANDATORY, ALLOWED.format(pool="rollout"), f"+rollout.engine_args.code_revision={COMMIT}")
    compose_config(*MANDATORY, f"student.path={tmp_path}", ALLOWED.format(pool="rollout"))


def test_an_evaluation_asks_for_the_commit_too():
    with pytest.raises(ValueError, match=r"^engine_args\.trust_remote_code=true with code_revision=None"):
        EvaluateConfig(model="org/model", task="sort", engine_args={"trust_remote_code": True})

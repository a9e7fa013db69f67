"""`experiment=demo_multi` as it is shipped: two teachers, each good at one task, and the student of both."""

from pathlib import Path

import pytest
from helpers import run_train

pytestmark = pytest.mark.ray

_LEAST_SHARE = 0.85  # of each teacher's accuracy


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_the_student_of_two_teachers_comes_near_each_of_them(tmp_path: Path) -> None:
    models = [f"{key}.path={tmp_path}/{key}" for key in ("student", "teachers.sort", "teachers.copy")]
    summary, _ = run_train(["experiment=demo_multi", f"runs_dir={tmp_path}/runs", "tracking=none", *models])
    for task in ("sort", "copy"):
        before, after, teacher = (
            summary[f"{name}_{task}"]
            for name in ("student_accuracy_before", "student_accuracy_after", "teacher_accuracy")
        )
        assert teacher > 0.95
        assert before < 0.5 * teacher
        assert after >= _LEAST_SHARE * teacher

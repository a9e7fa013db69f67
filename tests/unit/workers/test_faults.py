"""The texts here are those of Ray 2.60, taken from real failures of actors and shortened."""

from pathlib import Path

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError

from workers.faults import describe

PLUMBING_FRAMES = """\
  File "/usr/lib/python3.11/concurrent/futures/_base.py", line 449, in result
    return self.__get_result()
           ^^^^^^^^^^^^^^^^^^^
  File "/venv/lib/python3.11/site-packages/ray/util/tracing.py", line 467, in _resume_span
    return await method(self, *_args, **_kwargs)
           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "/usr/lib/python3.11/asyncio/threads.py", line 25, in to_thread
    return await loop.run_in_executor(None, func_call)
"""
OWN_FRAMES = """\
  File "{root}/workers/teacher/worker.py", line 69, in score
    score = await asyncio.to_thread(self._build, hidden_ND, group)
            ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "{root}/workers/teacher/head.py", line 18, in top_k
    values, indices = logits.topk(num_tokens, dim=-1)
"""
HEADER = "Traceback (most recent call last):\n"
LAST_LINES = "RuntimeError: selected index k out of range\nsecond line of the message"


def task_error(*, name: str = "teacher-0", root: str = "/home/me/opd-ray", text: str | None = None) -> RayTaskError:
    frames = PLUMBING_FRAMES + OWN_FRAMES.format(root=root)
    return RayTaskError(
        function_name="score",
        traceback_str=text or HEADER + frames + LAST_LINES,
        cause=RuntimeError("selected index k out of range"),
        proctitle="ray::TeacherWorker.score",
        pid=20273,
        ip="192.0.2.2",
        actor_repr=name,
        actor_id="c3b1d0230dcdb51de526fc9801000000",
    )


def dead_worker(name: str = "rollout-1") -> ActorDiedError:
    context = ActorDiedErrorContext(
        error_message="The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR",
        class_name="RolloutWorker",
        actor_id=bytes(range(16)),
        pid=20273,
        name=name,
        ray_namespace="cb249273-fbfa-41d3-a079-240baa4d9ba0",
        node_ip_address="192.0.2.2",
    )
    return ActorDiedError(context)


def failed_dependency(cause: str) -> RayTaskError:
    text = HEADER + '  File "python/ray/_raylet.pyx", line 1, in ray._raylet.raise_if_dependency_failed\n' + f"{cause}"
    return task_error(name="teacher-0", text=text)


def test_a_failed_call_names_the_worker_its_own_frames_its_error_and_its_log(tmp_path: Path):
    words = describe(task_error(), log_dir=tmp_path)
    assert words.startswith("teacher-0 failed\n")
    assert "/home/me/opd-ray/workers/teacher/worker.py" in words
    assert "values, indices = logits.topk(num_tokens, dim=-1)" in words
    assert LAST_LINES in words
    assert words.endswith(f"its log: {tmp_path}/teacher-0.log")


@pytest.mark.parametrize(
    "plumbing", ["/concurrent/futures/", "/ray/util/", "/asyncio/", "run_in_executor", "get_result", "_args", "ray::"]
)
def test_the_frames_of_the_plumbing_and_their_source_lines_are_left_out(tmp_path: Path, plumbing: str):
    assert plumbing not in describe(task_error(), log_dir=tmp_path)


def test_no_colour_codes_are_left(tmp_path: Path):
    assert "\x1b" in str(task_error())
    assert "\x1b" not in describe(task_error(), log_dir=tmp_path)


def test_the_own_frames_of_a_checkout_in_the_home_of_the_ray_image_are_kept(tmp_path: Path):
    words = describe(task_error(root="/home/ray/opd-ray"), log_dir=tmp_path)
    assert "/home/ray/opd-ray/workers/teacher/worker.py" in words
    assert "/site-packages/ray/" not in words


def test_a_worker_that_could_not_be_built_is_named_with_its_own_frames(tmp_path: Path):
    error = ActorDiedError(task_error(name="teacher-sampler-0"))
    words = describe(error, log_dir=tmp_path)
    assert words.startswith("teacher-sampler-0 failed\n")
    assert "creation task" in words
    assert "/workers/teacher/head.py" in words
    assert "/concurrent/futures/" not in words
    assert words.endswith(f"its log: {tmp_path}/teacher-sampler-0.log")


def test_a_worker_that_died_is_named_with_the_reason_and_the_end_of_its_log(tmp_path: Path):
    (tmp_path / "rollout-1.log").write_text("".join(f"line {n}\n" for n in range(40)))
    words = describe(dead_worker(), log_dir=tmp_path)
    assert words.startswith("rollout-1 died: The actor died unexpectedly")
    assert "Worker exit type: SYSTEM_ERROR" in words
    assert f"the end of its log {tmp_path}/rollout-1.log:" in words
    assert words.endswith("  line 38\n  line 39")
    assert "  line 25\n" in words
    assert "  line 24\n" not in words


@pytest.mark.parametrize("noise", ["class_name", "actor_id", "namespace", "192.0.2.2", "20273"])
def test_the_identifiers_of_a_dead_worker_are_left_out(tmp_path: Path, noise: str):
    assert noise not in describe(dead_worker(), log_dir=tmp_path)


def test_a_log_that_is_not_here_is_on_another_machine(tmp_path: Path):
    words = describe(dead_worker(), log_dir=tmp_path)
    assert f"its log {tmp_path}/rollout-1.log is on the worker's own machine" in words


def test_a_log_that_is_no_text_does_no_harm(tmp_path: Path):
    (tmp_path / "rollout-1.log").write_bytes(b"\xff\xfe broken\n")
    assert "broken" in describe(dead_worker(), log_dir=tmp_path)


def test_a_worker_whose_own_error_is_one_of_rays_is_reported_with_its_message(tmp_path: Path):
    text = HEADER + OWN_FRAMES.format(root="/home/me/opd-ray") + "ray.exceptions.ObjectLostError: Failed to retrieve it"
    assert "Failed to retrieve it" in describe(task_error(text=text), log_dir=tmp_path)


def test_a_failure_that_was_handed_on_names_the_worker_where_it_began(tmp_path: Path):
    cause = f"ray.exceptions.RayTaskError: {task_error(name='rollout-3')}"
    words = describe(failed_dependency(cause), log_dir=tmp_path)
    assert words.startswith("rollout-3 failed")
    assert words.endswith(f"its log: {tmp_path}/rollout-3.log")


def test_a_death_that_was_handed_on_names_the_worker_that_died(tmp_path: Path):
    words = describe(failed_dependency(f"ray.exceptions.ActorDiedError: {dead_worker()}"), log_dir=tmp_path)
    assert words.startswith("rollout-1 died: ")
    assert "ray::" not in words


def test_an_error_that_names_nobody_is_that_of_a_worker(tmp_path: Path):
    assert describe(ActorDiedError(), log_dir=tmp_path).startswith("a worker died: The actor died unexpectedly")


def test_an_answer_that_is_owed_too_long_names_the_keys_and_where_to_look(tmp_path: Path):
    words = describe(GetTimeoutError("Get timed out: some object(s) not ready."), log_dir=tmp_path)
    assert words == (
        "a worker owed an answer for longer than fault.call_timeout_s, or fault.start_timeout_s at its start; what all"
        f" did is in {tmp_path}"
    )

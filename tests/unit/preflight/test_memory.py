from dataclasses import replace

from config_files import MANDATORY, compose_config
from preflight_facts import STUDENT

from opd_ray.preflight.finding import GIB, Status
from opd_ray.preflight.learner import TrainedSize, training_bytes
from opd_ray.preflight.memory import Memory, Need, kv_cache, memory, needs

TEACHER = replace(STUDENT, key="teacher.path", num_parameters=3_000_000)
TRAINED = TrainedSize(num_parameters=1_000_000)
NEED = Need(role="rollout", num_workers=2, gpus_per_worker=0, bytes_per_worker=4 * GIB)


def test_a_worker_needs_weights_cache_and_a_chunk_and_the_learner_its_optimizer():
    config = compose_config(*MANDATORY, "cluster=gpus", "rollout.dtype=float32", "learner.num_ranks=2")
    tokens = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    rollout, teacher, learner = needs(config, student=STUDENT, teachers={"teacher": TEACHER}, trained=TRAINED)
    chunk = config.objective.chunk_tokens * 128 * 4
    assert rollout.bytes_per_worker == 4_000_000 + 4 * tokens * 512 + chunk
    assert teacher.bytes_per_worker == 2 * 3_000_000 + 2 * tokens * 512 + chunk
    assert learner.bytes_per_worker == training_bytes(config.learner, TRAINED) + chunk
    assert (learner.role, learner.num_workers) == ("learner", 2)


def test_workers_of_one_machine_share_its_memory():
    assert memory([NEED], present=Memory(machine_bytes=16 * GIB, gpu_bytes=None)).status is Status.ok
    assert memory([NEED], present=Memory(machine_bytes=int(8.5 * GIB), gpu_bytes=None)).status is Status.warning
    finding = memory([NEED], present=Memory(machine_bytes=7 * GIB, gpu_bytes=None))
    assert finding.status is Status.error
    assert "rollout 2 x 4.0 GiB" in finding.found


def test_workers_on_gpus_have_one_each_or_share_it():
    on_gpus = replace(NEED, gpus_per_worker=1)
    assert memory([on_gpus], present=Memory(machine_bytes=1, gpu_bytes=5 * GIB)).status is Status.ok
    halves = replace(NEED, gpus_per_worker=0.5)
    assert memory([halves], present=Memory(machine_bytes=1, gpu_bytes=5 * GIB)).status is Status.error
    finding = memory([on_gpus], present=Memory(machine_bytes=1, gpu_bytes=None))
    assert finding.status is Status.ok
    assert "the GPU's memory is not known here" in finding.found


def test_workers_that_share_one_gpu_need_room_together_and_none_has_to_fit_its_part():
    small, large = (replace(NEED, num_workers=1, gpus_per_worker=part) for part in (0.7, 0.3))
    small = replace(small, bytes_per_worker=1 * GIB)
    large = replace(large, role="learner", bytes_per_worker=6 * GIB)
    assert memory([small, large], present=Memory(machine_bytes=1, gpu_bytes=8 * GIB)).status is Status.ok
    assert memory([small, large], present=Memory(machine_bytes=1, gpu_bytes=int(6.5 * GIB))).status is Status.error
    on_two = [replace(small, gpus_per_worker=1), large]
    assert memory(on_two, present=Memory(machine_bytes=1, gpu_bytes=8 * GIB)).status is Status.error


def test_a_cache_that_holds_no_sequence_is_red():
    def judge(num_bytes: int):
        config = compose_config(*MANDATORY, f"teacher.engine_args.kv_cache_memory_bytes={num_bytes}")
        return kv_cache(config, student=STUDENT, teachers={"teacher": TEACHER})

    one = 4 * 2048 * 512
    assert judge(one).status is Status.ok
    finding = judge(one - 1)
    assert finding.status is Status.error
    assert f"teacher.engine_args.kv_cache_memory_bytes={one - 1}" in finding.found


def test_a_teacher_that_follows_the_student_holds_an_average_in_float32_beside_its_engine():
    def needed(*overrides: str) -> int:
        common = ("teacher=self", "teacher.path=student", "cluster=local")
        config = compose_config(*MANDATORY, *common, *overrides)
        return needs(config, student=STUDENT, teachers={"teacher": TEACHER}, trained=TRAINED)[1].bytes_per_worker

    assert needed("teacher.self.update=ema") - needed() == 4 * 3_000_000
    assert needed("teacher.self.update=ema", "teacher.gpus_per_worker=1") == needed()

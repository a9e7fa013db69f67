import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError

from workers.health import WorkerLost, starting


def test_workers_that_take_too_long_to_start_are_lost():
    with pytest.raises(WorkerLost, match=r"a worker at its start, for fault\.start_timeout_s"), starting():
        raise GetTimeoutError("Get timed out: some object(s) not ready.")


def test_a_worker_that_is_gone_at_its_start_is_lost_and_the_cause_is_kept():
    cause = ActorDiedError()
    with pytest.raises(WorkerLost, match="a worker at its start") as lost, starting():
        raise cause
    assert lost.value.cause is cause

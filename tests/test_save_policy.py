import time

import pytest

from tinyllama_jax.config import Checkpoint
from tinyllama_jax.errors import CheckpointError
from tinyllama_jax.train.save_policy import SaveFailed, Saver


class Disk:
    """Fails the saves of the steps in `bad`, as checkpoints do: at the next one."""

    def __init__(self, bad):
        self.bad, self.failure, self.saved = bad, None, []

    def write(self, step, permanent, blocking):
        self.raise_failure()
        if step in self.bad:
            self.failure = CheckpointError(f"step {step}: no space left")
            if blocking:
                self.raise_failure()
        else:
            self.saved.append(step)

    def raise_failure(self):
        failure, self.failure = self.failure, None
        if failure:
            raise failure


def saver(bad, **settings):
    disk, warned = Disk(bad), []
    cfg = Checkpoint(temporary_seconds=0, retry_seconds=0.05, **settings)
    return Saver(cfg, disk.write, lambda step, text: warned.append((step, text))), disk, warned


def test_a_failed_periodic_save_is_a_warning_and_tried_again():
    policy, disk, warned = saver({10})
    policy.save(10, permanent=False, essential=False)
    assert not warned and not policy.due()
    policy.failure(11, disk.failure)  # noticed in the background
    disk.failure = None
    assert warned == [(11, "step 10: no space left; tried again in 0.05 s")]
    time.sleep(0.06)
    assert policy.due() and not policy.due()
    policy.save(12, permanent=False, essential=False)
    policy.save(20, permanent=False, essential=False)
    assert disk.saved == [12, 20] and policy.failed_in_a_row == 0


def test_three_in_a_row_end_the_run_with_a_status_that_is_tried_again():
    policy, disk, warned = saver({10, 20, 30})
    with pytest.raises(SaveFailed, match="3 saves in a row have failed, the last one: step 30") as caught:
        for step in (10, 20, 30):
            policy.save(step, permanent=False, essential=False)
            policy.failure(step, disk.failure)
            disk.failure = None
    assert caught.value.exit_status == 1 and len(warned) == 2


def test_failures_between_good_saves_do_not_add_up():
    policy, disk, _ = saver({10, 30, 50, 70})
    for step in range(10, 80, 10):
        policy.save(step, permanent=False, essential=False)
        if disk.failure:
            policy.failure(step, disk.failure)
            disk.failure = None
        else:
            policy.save(step + 5, permanent=False, essential=False)
    assert disk.saved[-1] == 65


def test_a_stage_end_that_cannot_be_saved_ends_the_run():
    policy, disk, warned = saver({30})
    with pytest.raises(SaveFailed, match="step 30 must be saved and cannot be"):
        policy.save(30, permanent=True, essential=True)
    policy, disk, warned = saver({20})
    policy.save(20, permanent=False, essential=False)  # fails in the background, unnoticed
    policy.save(30, permanent=True, essential=True)
    assert disk.saved == [30] and len(warned) == 1, "the failure before it is not its own"

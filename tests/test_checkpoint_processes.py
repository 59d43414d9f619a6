"""Several processes save and restore together: real ones, over gloo, killed, starved of disk, or late."""

import os
import signal
import time

import pytest
from checkpoint_process import Group

pytestmark = pytest.mark.faults


@pytest.fixture
def group():
    groups = []

    def start(*arguments, **options) -> Group:
        groups.append(Group(*arguments, **options))
        return groups[-1]

    yield start
    for one in groups:
        one.kill()


def save(step, **more):
    return {"do": "save", "step": step, **more}


RESTORE = {"do": "restore"}


@pytest.mark.parametrize("writers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_some_processes_saved_any_number_restores_bit_for_bit(group, tmp_path, writers):
    mesh = {"mesh": (2, writers)}  # each half of the devices holds the whole state
    said = group(writers, tmp_path, [save(10), save(20, **mesh, permanent=True), save(20, **mesh), save(30)]).end()
    for lines in said:
        assert [line for line in lines if line.startswith("saved")] == ["saved 10", "saved 20", "saved 20", "saved 30"]
    assert sorted(os.listdir(tmp_path)) == ["00000010", "00000020", "00000030"]
    chunks = [p for p in (tmp_path / "00000030/params/embed/c").rglob("*") if p.is_file()]
    assert len(chunks) == 2 * writers, "a file for each device"
    for readers in (1, 2, 4) if writers == 2 else (1, 2):
        for lines in group(readers, tmp_path, [RESTORE]).end():
            assert "restored 30" in lines


def test_one_process_saved_and_two_restore(group, tmp_path):
    group(1, tmp_path, [save(5)]).end()
    for lines in group(2, tmp_path, [RESTORE, {"do": "restore", "mesh": (2, 2)}, save(6)]).end():
        assert lines.count("restored 5") == 2 and "saved 6" in lines


@pytest.mark.parametrize("at", ["writing 20", pytest.param("written 20", marks=pytest.mark.slow)])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_kill_between_the_phases_leaves_only_what_the_next_start_clears_away(group, tmp_path, at, victim):
    running = group(2, tmp_path, [{"do": "hold", "at": at, "process": victim}, save(10), save(20)])
    running.wait_for(victim, "held")
    time.sleep(0.5)  # the other one gets as far as it can
    running.processes[victim].send_signal(signal.SIGKILL)
    running.kill()
    # When all have written, process 0 commits; it does not wait for another one that is killed then.
    committed = at == "written 20" and victim == 1
    assert (tmp_path / "00000020").exists() == committed
    left = {p.name.partition(".tmp-")[0] for p in tmp_path.iterdir() if ".tmp-" in p.name}
    assert left == (set() if committed else {"00000020"})
    for lines in group(2, tmp_path, [RESTORE, save(20), RESTORE]).end():
        assert [line for line in lines if line.startswith("restored")] == [
            f"restored {20 if committed else 10}",
            "restored 20",
        ]
    assert sorted(os.listdir(tmp_path)) == ["00000010", "00000020"]


def test_a_full_disk_is_one_line_in_every_process_and_the_next_save_is_as_good_as_any(group, mount):
    disk = mount("size=1m")
    filler = disk / "filler"
    plan = [save(10), {"do": "fill", "process": 1, "path": str(filler), "but": 30_000}, save(20)]
    said = group(2, disk / "checkpoints", [*plan, RESTORE]).end()
    for lines in said:
        failures = [line for line in lines if line.startswith("failed")]
        assert len(failures) == 1, lines
        assert "00000020: checkpoint could not be written: no space left on the device" in failures[0]
        assert "earlier checkpoints are intact" in failures[0] and "restored 10" in lines
    assert os.listdir(disk / "checkpoints") == ["00000010"]
    filler.unlink()
    for lines in group(2, disk / "checkpoints", [save(30), RESTORE]).end():
        assert "restored 30" in lines


def test_what_fails_in_one_process_fails_in_all_and_names_it(group, tmp_path):
    """Process 1 finds a folder where a chunk of its own is to go."""
    plan = [save(10), {"do": "obstruct", "process": 1}, save(20), {"do": "clear"}, save(30), RESTORE]
    for lines in group(2, tmp_path, plan).end():
        failures = [line for line in lines if line.startswith("failed")]
        assert len(failures) == 1 and "(process 1 (here))" in failures[0], lines
        assert "saved 10" in lines and "saved 30" in lines and lines[-2] == "restored 30"
    assert sorted(os.listdir(tmp_path)) == ["00000010", "00000030"]


def test_damage_that_one_process_finds_makes_all_use_the_one_before(group, tmp_path):
    group(2, tmp_path, [save(10), save(20)]).end()
    chunk = max(p for p in (tmp_path / "00000020/params/embed/c").rglob("*") if p.is_file())
    data = bytearray(chunk.read_bytes())
    data[7] ^= 16
    chunk.write_bytes(data)
    running = group(2, tmp_path, [RESTORE])
    heard = []
    for process in running.processes:
        out, err = process.communicate(timeout=180)
        assert "restored 10" in out, err
        heard.append(err)
    assert "set aside" in heard[0] and "differs from its checksum" in heard[0] and "set aside" not in heard[1]
    assert sorted(os.listdir(tmp_path)) == ["00000010", "00000020.corrupt"]


def test_who_does_not_come_is_named(group, tmp_path):
    plan = [save(10), {"do": "limit", "seconds": 3}, {"do": "hold", "at": "writing 20", "process": 1, "seconds": 12}]
    running = group(2, tmp_path, [*plan, save(20)])
    said, _ = running.processes[0].communicate(timeout=120)
    failure = next(line for line in said.splitlines() if line.startswith("failed"))
    assert "process 1 (here) did not come to 'save 20 written' within 3 s" in failure
    assert "earlier checkpoints are intact" in failure

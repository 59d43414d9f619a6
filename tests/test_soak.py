"""Three minutes of the soak; an hour of it is `make proof-soak`."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from cannot import cannot
from many_hosts import same_run
from soak_faults import Disk, damage

TESTS = Path(__file__).parent


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.timeout(900)  # a machine with much else to do ends the last run later
def test_three_minutes_of_faults_leave_no_trace(tmp_path):
    seed = "0" if os.environ.get("CI") else str(random.randrange(2**32))
    out = tmp_path / "soak.json"
    options = ["--minutes", "3", "--seed", seed, "--processes", "1", "--workdir", str(tmp_path), "--out", str(out)]
    done = subprocess.run([sys.executable, TESTS / "soak.py", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    print(f"seed {seed}: {result['faults']}, {result['left_out']}")
    assert result == json.loads(done.stdout)
    assert result["verdict"] == "all held" and result["seed"] == int(seed)
    assert sum(result["faults"].values()) >= 5 and result["starts"] > result["runs"] >= 1
    assert not [path for path in tmp_path.iterdir() if path != out], "nothing stays behind"


@pytest.mark.parametrize("seed", range(6))
def test_damage_changes_one_file_of_a_checkpoint(tmp_path, seed):
    files = {f"params/{i}": os.urandom(50) for i in range(3)}
    (tmp_path / "params").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    kind = damage(tmp_path, random.Random(seed))
    found = {n: (tmp_path / n).read_bytes() if (tmp_path / n).exists() else None for n in files}
    changed = [n for n in files if found[n] != files[n]]
    assert len(changed) == 1
    before, after = files[changed[0]], found[changed[0]]
    if kind == "deleted file":
        assert after is None
    elif kind == "truncated file":
        assert before.startswith(after) and len(after) < len(before)
    else:
        assert sum((a ^ b).bit_count() for a, b in zip(before, after, strict=True)) == 1


def test_a_full_disk_has_the_room_that_is_left_to_it(tmp_path):
    disk = Disk(tmp_path / "disk")
    if not disk.mounted:
        cannot("mounting a tmpfs is not permitted")
    try:
        disk.fill(1 << 20)
        (disk.place / "half").write_bytes(bytes(1 << 19))
        with pytest.raises(OSError, match="No space left"):
            (disk.place / "whole").write_bytes(bytes(1 << 20))
        (disk.place / "whole").unlink()
        (disk.place / "half").unlink()
        disk.fill(1 << 19)  # what has become free is taken as well
        with pytest.raises(OSError, match="No space left"):
            (disk.place / "whole").write_bytes(bytes(1 << 20))
        disk.free()
        (disk.place / "whole").write_bytes(bytes(8 << 20))
    finally:
        disk.close()


def test_a_run_that_loses_a_step_is_noticed(tmp_path):
    """The records of a hurt run are compared with care: a line lost, one twice and another loss are all found."""

    def write(name: str, steps: list[int], shift: float = 0.0) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        fixed = {"tokens": 0, "valid_tokens": 0, "stage": "basic", "mixture": {}, "epoch": {}, "lr": 0.1}
        records = [fixed | {"step": step, "loss": 3.0 + shift * (step == 3)} for step in steps]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return folder

    whole = write("whole", [1, 2, 3, 4])
    assert same_run(write("same", [1, 2, 3, 4]), whole, exact=True) == 4
    assert same_run(write("near", [1, 2, 3, 4], 5e-6), whole) == 4
    assert same_run(write("begun", [1, 2]), whole, so_far=True) == 2
    for name, steps, shift in (("lost", [1, 2, 4], 0), ("twice", [1, 2, 2, 3, 4], 0), ("other", [1, 2, 3, 4], 1e-3)):
        with pytest.raises(AssertionError):
            same_run(write(name, steps, shift), whole)
    with pytest.raises(AssertionError):
        same_run(tmp_path / "begun", whole)
    with pytest.raises(AssertionError):
        same_run(tmp_path / "near", whole, exact=True)

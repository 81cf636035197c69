import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed_run import evaluate

HERE = Path(__file__).parent
COUNTS = (1, 5, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes wrote: their results, and anything that went to the home or cache folder."""
    folder = tmp_path_factory.mktemp("two_processes")
    caches = {name: str(folder / "caches" / name) for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME")}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {**os.environ, **caches, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([*command, str(HERE / "distributed_run.py"), str(folder)], check=True, env=environment, timeout=180)
    return folder


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_equal_one_and_count_every_sample_once(folder, rank):
    """F11: padding with repeated samples, or a split gallery, would change a metric."""
    results = json.loads((folder / f"rank{rank}.json").read_text())
    for count in COUNTS:
        assert results[str(count)] == evaluate(count)
        assert results[str(count)]["retrieval"]["images"] == results[str(count)]["zero_shot"]["images"] == count


def test_metrics_of_two_processes_do_not_meet_and_leave_no_file(folder):
    """F11: each process scores its own samples."""
    assert [json.loads((folder / f"rank{rank}.json").read_text())["accuracy"] for rank in (0, 1)] == [0.5, 1]
    assert [path for path in (folder / "caches").rglob("*") if path.is_file()] == []

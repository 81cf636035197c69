"""The memory that a conversion takes above that of the interpreter, measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 1 << 20
SCRIPT = Path(__file__).parent / "measure_memory.py"

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone counts these pages")


def measure(folder: Path, mebibytes: int) -> list[dict]:
    command = [sys.executable, str(SCRIPT), str(folder), str(mebibytes)]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.mark.parametrize("mebibytes", [96, pytest.param(1632, marks=pytest.mark.slow)])
def test_saving_takes_a_few_tensors_and_building_one_copy(tmp_path, mebibytes):
    peaks = measure(tmp_path, mebibytes)
    print(*peaks, sep="\n")
    assert [peak["case"] for peak in peaks] == [
        "safetensors float32 save",
        "safetensors float32 build",
        "archive float16 save",
        "archive float16 build",
    ]
    for peak in peaks:
        copies = 0 if peak["case"].endswith("save") else 1.01
        assert peak["anonymous"] <= copies * peak["weights"] + 48 * MIB, peak
        assert peak["resident"] <= copies * peak["weights"] + peak["file"] + 72 * MIB, peak

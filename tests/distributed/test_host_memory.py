"""What a rank on a CPU frees goes back to the system, and does not without us or where the user tunes malloc."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
from pathlib import Path
import torch
from posttrain.distributed.host_memory import give_back_freed

def held():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1024

if sys.argv[1] == "ours":
    give_back_freed()
layer = torch.ones(300_000)
del layer  # from here on glibc keeps what is as large
layers = [torch.ones(300_000) for _ in range(100)]
before = held()
del layers[::2]
print(before - held())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
@pytest.mark.parametrize(
    ("who", "variables", "gives_back"),
    [("ours", {}, True), ("theirs", {}, False), ("ours", {"MALLOC_MMAP_THRESHOLD_": "8388608"}, False)],
)
def test_a_freed_layer_goes_back_to_the_system(who, variables, gives_back):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, who], check=True, capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )  # fmt: skip
    freed_mib = float(done.stdout)
    assert (freed_mib > 50) == gives_back, freed_mib

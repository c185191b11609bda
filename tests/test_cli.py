import subprocess
import sys

import pytest

CHURN = """
import resource, sys
import torch
from pneumo.cli import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for step in range(10):
    if step == 5:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24).sum()  # 64 MB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
def test_freed_memory_is_used_again(repo):
    def faults(what: str) -> int:
        done = subprocess.run([sys.executable, "-c", CHURN, what], capture_output=True, text=True, check=True, cwd=repo)
        return int(done.stdout)

    assert faults("keep") < 1000 < faults("return")  # 64 MB are 16,384 pages

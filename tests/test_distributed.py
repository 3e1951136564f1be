import re
import subprocess

import pytest
from launching import needs_mpirun, run_python

SECONDS = 900


@needs_mpirun
@pytest.mark.timeout(SECONDS + 20)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_distributed_tests_pass_under_mpirun(ranks):
    arguments = ["-m", "pytest", "--capture=sys", "-p", "no:cacheprovider", "-rs"]
    try:
        result = run_python(ranks, [*arguments, "tests/distributed"], SECONDS, DISTOPT_TIMEOUT="60")
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"not done after {SECONDS} s:\n{error.stdout}\n{error.stderr}")
    shown = f"\n{result.stdout}\n{result.stderr}"
    assert result.returncode == 0, shown
    assert re.search(r"\d+ passed", result.stdout), shown
    assert f"rank 0 of {ranks} on host" in result.stdout, shown

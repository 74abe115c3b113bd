"""Other people's programs, each in an environment of its own that `tools/test_clients.sh` makes."""

import os
import subprocess
from pathlib import Path

ENVIRONMENTS = Path(__file__).parents[1] / ".cache" / "clients"
SECONDS_MAX = 280.0


def run(environment: str, program: str, *arguments: str, seconds_max: float = SECONDS_MAX) -> str:
    """Runs a program of an environment; returns what it wrote, fails with it."""
    path = ENVIRONMENTS / environment / "bin" / program
    assert path.exists(), f"{path} is missing: run `make test-clients`"
    return run_alone(path, *arguments, seconds_max=seconds_max)


def run_alone(path: Path, *arguments: str, seconds_max: float = SECONDS_MAX) -> str:
    """Runs a program without what this machine's environment says."""
    # Proxies and tokens of the machine are none of the clients' business.
    names = {"PATH", "HOME", "LANG", "TMPDIR"}
    clean = {name: value for name, value in os.environ.items() if name in names}
    clean |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_COLOR": "1"}
    done = subprocess.run(
        [str(path), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds_max,
        env=clean,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout

"""Peak memory of one rollout, measured in a process of its own: ``python -m benchmarks.speed_memory CASE ROWS``.

``env`` steps the environment and keeps nothing, ``collect`` keeps the whole path as agents do, ``bare`` is the
loop that knows no environment. Prints one JSON object in MiB.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def high_water() -> float:
    """The most memory this process has held, in MiB.

    Linux's ``ru_maxrss`` starts at the parent's, whose memory a child shares for an instant; ``VmHWM`` does not.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        (kib,) = re.findall(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        return int(kib) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def peak(case: str, rows: int, device: str) -> dict[str, Any]:
    """One rollout: memory after the imports, at the peak, and what the GPU's allocator held at its peak."""
    import torch

    from benchmarks.speed_rollout import bare_rollout, env_rollout
    from prefenv.envs import FlowVectorEnv
    from prefenv.rollout import collect

    torch.set_num_threads(1)
    # Imports what the first step imports, and loads the checkpoint.
    small = FlowVectorEnv(1, array="torch", device=device)
    env_rollout(small, small.reference)()
    imports = high_water()
    env = FlowVectorEnv(rows, array="torch", device=device)
    if env.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if case == "bare":
        bare_rollout(env)()
    elif case == "env":
        env_rollout(env, env.reference)()
    else:
        collect(env, env.reference)
    held = torch.cuda.max_memory_allocated() / 2**20 if env.device.type == "cuda" else 0.0
    return {
        "case": case,
        "rows": rows,
        "device": device,
        "imports": round(imports, 1),
        "peak": round(high_water(), 1),
        "cuda": round(held, 1),
    }


def measure(case: str, rows: int, device: str) -> dict[str, Any]:
    """``peak`` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.speed_memory", case, str(rows), device]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    print(json.dumps(peak(sys.argv[1], int(sys.argv[2]), sys.argv[3])))

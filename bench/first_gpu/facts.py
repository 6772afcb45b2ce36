"""What the machine is, in one JSON: ``python -m bench.first_gpu.facts FILE``."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from apt.files.whole import write_json
from bench.plan import machine
from bench.rows import environment

ASKED = (
    "driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu,"
    "memory.total,memory.used,ecc.mode.current,mig.mode.current"
)


def facts() -> dict[str, Any]:
    """Versions and commit, the device as torch knows it, what its driver says, and the host."""
    found: dict[str, Any] = {"folder": machine(), **environment(), "cuda": torch.version.cuda}
    found |= {"cores": os.cpu_count(), "system": platform.platform(), "argv": sys.argv[1:]}
    found["environment"] = {key: value for key, value in os.environ.items() if key.startswith(("TRITON_", "APT_"))}
    if torch.cuda.is_available():
        found |= {"properties": _properties(), "capability": torch.cuda.get_device_capability()}
        found |= {"cudnn": torch.backends.cudnn.version(), "devices": torch.cuda.device_count()}
    return found


def _properties() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    names = [name for name in dir(properties) if not name.startswith("_")]
    values = {name: getattr(properties, name) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, int | float | str)}


def driver() -> dict[str, str]:
    """Clocks, power and memory by nvidia-smi, where there is one."""
    if shutil.which("nvidia-smi") is None:
        return {"note": "there is no nvidia-smi"}
    command = ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv,noheader,nounits", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    if done.returncode:
        return {"note": (done.stdout + done.stderr).strip()[:300]}
    return dict(zip(ASKED.split(","), (part.strip() for part in done.stdout.split(",")), strict=False))


if __name__ == "__main__":
    known = facts()
    write_json(Path(sys.argv[1]), known)
    if torch.cuda.is_available():  # may hang, so what is known is on disk by now
        write_json(Path(sys.argv[1]), known | {"driver": driver()})
    print(f"{known['device']}, torch {known['torch']}, triton {known['triton'] or 'missing'}")

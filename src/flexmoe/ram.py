"""How much memory of this machine is free."""

from __future__ import annotations

from pathlib import Path

import psutil

GROUP = Path("/sys/fs/cgroup")  # the control group of this process, in a container


def free_ram() -> int:
    """Bytes of memory that are free: what the control group of this process leaves. What it holds
    of files goes as soon as memory is needed, so what was not used of late counts as free."""
    free = int(psutil.virtual_memory().available)
    limit, used, parts = (GROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdecimal():
        stat = dict(line.split() for line in parts.read_text().splitlines())
        free = min(free, int(most) - int(used.read_text()) + int(stat["inactive_file"]))
    return free

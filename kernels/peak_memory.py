"""How much memory a function needs at most, as Linux tells it: whatever allocates it, libraries included."""

from collections.abc import Callable
from pathlib import Path


def resident_bytes(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (at most so far) of this process."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def peak_memory_added(function: Callable[[], object]) -> int:
    """Bytes that `function` adds, at most, to this process; best in a fresh one, which reuses nothing freed before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident_bytes("VmRSS")
    function()
    return resident_bytes("VmHWM") - before

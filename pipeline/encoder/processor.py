"""The processor of this machine: its name, and whether it multiplies bf16 itself.

Read from the kernel's own list, without torch, which takes seconds to import.
"""

import functools
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# Of x86 since Cooper Lake, Zen 4 and Sapphire Rapids; of ARM since Neoverse V1, Graviton3.
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}

NO_BF16 = "this processor has no instructions for bf16: precision bf16 is slower here than fp32"


def cpu_name() -> str:
    """The processor as its maker calls it, or its architecture."""
    names = _values("model name")
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def has_bf16() -> bool:
    """Whether every core has instructions for bf16; False where the kernel does not say."""
    cores = [set(line.split()) for line in _values("flags") or _values("Features")]
    return bool(cores) and bool(set.intersection(*cores) & BF16_FLAGS)


def _values(key: str) -> list[str]:
    """What the kernel's list says for a key, once for each core; nothing where there is no list."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return []
    pairs = (line.partition(":") for line in lines)
    return [value.strip() for name, _, value in pairs if name.strip() == key]

"""A GPU of one's own: encodes that run side by side on a machine take one each.

A claim is a name in the kernel, an abstract socket of this machine; it ends with its process,
however that ends. Nobody waits: with more encodes than GPUs they share them evenly.
"""

import ctypes
import itertools
import socket

_MOST = 64  # claims on one GPU
_SLEEP = 4  # CU_CTX_SCHED_BLOCKING_SYNC
_claims: list[socket.socket] = []  # held until the process ends


def claim(device: str) -> str:
    """`device`; for a bare "cuda" where there are several GPUs, one with the fewest claims."""
    gpus = gpu_names() if device == "cuda" else []
    if len(gpus) < 2:
        return device
    places = itertools.product(range(_MOST), range(len(gpus)))
    return next((f"cuda:{i}" for turn, i in places if _is_mine(f"{gpus[i]} {turn}")), device)


def wait_asleep(device: str) -> None:
    """Let threads of this process that wait for a GPU sleep; by default each keeps a core busy.

    To be called before torch uses the GPU. Where the driver refuses, all is as it was.
    """
    if device == "cpu":
        return
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    gpu = ctypes.c_int(0)
    index = int(device.partition(":")[2] or 0)
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(gpu), index) == 0:
        driver.cuDevicePrimaryCtxSetFlags_v2(gpu, _SLEEP)


def gpu_names() -> list[str]:
    """The driver's names of the GPUs that this process may use, in torch's order.

    They are the same in every process, whatever CUDA_VISIBLE_DEVICES leaves of the GPUs.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, device, name = ctypes.c_int(0), ctypes.c_int(0), (ctypes.c_ubyte * 16)()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    names = []
    for index in range(count.value):
        if driver.cuDeviceGet(ctypes.byref(device), index) != 0:
            return []
        if driver.cuDeviceGetUuid(ctypes.byref(name), device) != 0:
            return []
        names.append(bytes(name).hex())
    return names


def _is_mine(gpu: str) -> bool:
    """Claim a turn on a GPU; False if another process has it."""
    mark = socket.socket(socket.AF_UNIX)
    try:
        mark.bind(f"\0listing-vectors gpu {gpu}")
    except OSError:
        mark.close()
        return False
    _claims.append(mark)
    return True

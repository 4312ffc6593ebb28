"""The NVIDIA GPU of this machine, asked of its driver; nothing beside the driver has to be installed for that."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

_OK = 0
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_NAME_BYTES = 256
_DRIVERS = ("libcuda.so.1", "nvcuda.dll")


@dataclass(frozen=True)
class Gpu:
    """A GPU that can be used.

    Attributes:
        name: as its driver says.
        capability: compute capability, such as ``8.6``.
        cuda: newest version of CUDA that the driver serves, such as ``13.0``.
    """

    name: str
    capability: str
    cuda: str


@functools.cache
def find_gpu() -> Gpu | str:
    """Return the first GPU of this machine, or in one sentence why there is none."""
    driver = _driver()
    if driver is None:
        return "this machine has no NVIDIA driver."
    status = driver.cuInit(0)
    if status != _OK:
        return f"the NVIDIA driver does not start: {_reason(driver, status)}."
    count, version, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    if not count.value:
        return "the NVIDIA driver finds no GPU."
    name = ctypes.create_string_buffer(_NAME_BYTES)
    numbers = []
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetName(name, _NAME_BYTES, device)
    driver.cuDriverGetVersion(ctypes.byref(version))
    for attribute in (_MAJOR, _MINOR):
        found = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(found), attribute, device)
        numbers.append(found.value)
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Gpu(name.value.decode(errors="replace"), ".".join(map(str, numbers)), cuda)


def _driver() -> ctypes.CDLL | None:
    for name in _DRIVERS:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _reason(driver: ctypes.CDLL, status: int) -> str:
    told = ctypes.c_char_p()
    driver.cuGetErrorString(status, ctypes.byref(told))
    return told.value.decode(errors="replace") if told.value else f"error {status}"

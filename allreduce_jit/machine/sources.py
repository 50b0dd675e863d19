"""The narrow seam between the probe and the machine: four sources of plain Python values.

Every method may raise; the probe turns that into a named problem. A fake for tests implements the same methods.
None of the calls creates a CUDA context.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import runpy
import socket
import sys
from dataclasses import dataclass, field
from typing import Any

from . import toolchain

_VIRTUALIZATION = ("none", "passthrough", "vgpu", "host-vgpu", "host-vsga")
_FABRIC = ("not_supported", "not_started", "in_progress", "completed")
_P2P_INDEX = {"read": 0, "write": 1, "nvlink": 2, "atomics": 3}
_P2P_OK, _P2P_UNKNOWN = 0, 6


class NvmlSource:
    """NVML: sees every GPU of the container whatever ``CUDA_VISIBLE_DEVICES`` says, and names it by UUID."""

    def start(self) -> int:
        """Open NVML; the number of GPUs it sees."""
        try:
            from cuda.bindings import nvml
        except ImportError as e:
            raise RuntimeError(f"cuda-bindings has no NVML (>= 12.9.6 or >= 13.2 has): {e}") from e
        nvml.init_v2()
        self._nvml = nvml
        return nvml.device_get_count_v2()

    def stop(self) -> None:
        self._nvml.shutdown()

    def version(self) -> str:
        return self._nvml.system_get_nvml_version()

    def driver_version(self) -> str:
        return self._nvml.system_get_driver_version()

    def uuid(self, index: int) -> str:
        return self._nvml.device_get_uuid(self._nvml.device_get_handle_by_index_v2(index))

    def is_mig(self, uuid: str) -> bool:
        """Whether ``uuid`` is a MIG instance, or a GPU cut into such."""
        handle = self._handle(uuid)
        if self._nvml.device_is_mig_device_handle(handle):
            return True
        try:
            return self._nvml.device_get_mig_mode(handle)[0] == 1
        except self._nvml.NotSupportedError:
            return False

    def virtualization(self, uuid: str) -> str:
        return _VIRTUALIZATION[int(self._nvml.device_get_virtualization_mode(self._handle(uuid)))]

    def fabric(self, uuid: str) -> str:
        """State of the NVSwitch fabric: ``completed``, ``in_progress``, ``not_started``, ``not_supported``."""
        try:
            return _FABRIC[int(self._nvml.device_get_gpu_fabric_info_v(self._handle(uuid)).state)]
        except self._nvml.NotSupportedError:
            return _FABRIC[0]

    def p2p_status(self, uuid: str, peer: str, what: str) -> bool | None:
        """``what``: read, write, nvlink or atomics. None: NVML itself does not know."""
        status = int(self._nvml.device_get_p2p_status(self._handle(uuid), self._handle(peer), _P2P_INDEX[what]))
        return None if status == _P2P_UNKNOWN else status == _P2P_OK

    def _handle(self, uuid: str) -> int:
        return self._nvml.device_get_handle_by_uuid(uuid)


class DriverSource:
    """The CUDA driver: sees the GPUs that this process may use, by ordinal."""

    def start(self) -> int:
        """Open the driver; the number of GPUs that this process may use."""
        from cuda.bindings import driver

        self._driver = driver
        self._ask("cuInit", 0)
        return self._ask("cuDeviceGetCount")

    def version(self) -> str:
        """The CUDA version of the driver; works where ``start`` found no GPU."""
        from cuda.bindings import driver

        self._driver = driver
        number = self._ask("cuDriverGetVersion")
        return f"{number // 1000}.{number % 1000 // 10}"

    def uuid(self, ordinal: int) -> str:
        """``GPU-…``, or ``MIG-…`` for a MIG instance: the name that NVML uses too."""
        # Bindings of CUDA 12 have both; there the old one names a MIG instance's parent.
        name = "cuDeviceGetUuid_v2" if hasattr(self._driver, "cuDeviceGetUuid_v2") else "cuDeviceGetUuid"
        raw = bytes(self._ask(name, self._device(ordinal)).bytes).hex()
        text = "-".join((raw[:8], raw[8:12], raw[12:16], raw[16:20], raw[20:]))
        return ("MIG-" if " MIG " in self.name(ordinal) else "GPU-") + text

    def name(self, ordinal: int) -> str:
        return self._text(self._ask("cuDeviceGetName", 128, self._device(ordinal)))

    def pci_bus_id(self, ordinal: int) -> str:
        return self._text(self._ask("cuDeviceGetPCIBusId", 32, self._device(ordinal)))

    def memory_bytes(self, ordinal: int) -> int:
        return int(self._ask("cuDeviceTotalMem", self._device(ordinal)))

    def attribute(self, ordinal: int, name: str) -> int:
        """``name`` as in ``CU_DEVICE_ATTRIBUTE_<NAME>``, in lower case."""
        attribute = getattr(self._driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name.upper()}")
        return int(self._ask("cuDeviceGetAttribute", attribute, self._device(ordinal)))

    def p2p_attribute(self, ordinal: int, peer: int, name: str) -> int:
        """``name`` as in ``CU_DEVICE_P2P_ATTRIBUTE_<NAME>``, in lower case."""
        attribute = getattr(self._driver.CUdevice_P2PAttribute, f"CU_DEVICE_P2P_ATTRIBUTE_{name.upper()}")
        return int(self._ask("cuDeviceGetP2PAttribute", attribute, self._device(ordinal), self._device(peer)))

    def _device(self, ordinal: int) -> Any:
        return self._ask("cuDeviceGet", ordinal)

    def _ask(self, name: str, *args: Any) -> Any:
        error, *values = getattr(self._driver, name)(*args)
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name}: {error.name}")
        return values[0] if values else None

    @staticmethod
    def _text(raw: bytes) -> str:
        return raw.split(b"\0")[0].decode()


class HostSource:
    """Who this process shares memory and process ids with."""

    def boot_id(self) -> str:
        """The kernel's own name for this run of it: two that cannot tell theirs are not known to be one."""
        with open("/proc/sys/kernel/random/boot_id") as f:
            found = f.read().strip()
        if not found:
            raise OSError("/proc/sys/kernel/random/boot_id is empty")
        return found

    def hostname(self) -> str:
        return socket.gethostname()

    def namespace(self, kind: str) -> str:
        """Inode of ``/proc/self/ns/<kind>``, the kernel's own name of a namespace."""
        return str(os.stat(f"/proc/self/ns/{kind}").st_ino)

    def shm_bytes(self) -> int:
        """Size of ``/dev/shm`` (not what is free now: that changes by the second)."""
        stat = os.statvfs("/dev/shm")
        return stat.f_frsize * stat.f_blocks

    def memfd(self) -> bool:
        """Whether memory can be made that has a file descriptor and no name."""
        os.close(os.memfd_create("allreduce_jit_probe", os.MFD_CLOEXEC))
        return True


class SoftwareSource:
    """Versions, found without importing torch or triton."""

    def python(self) -> str:
        return platform.python_version()

    def distribution(self, name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def triton(self) -> str | None:
        return toolchain.triton()

    def nvrtc(self) -> str:
        return toolchain.nvrtc()

    def hip(self) -> str | None:
        """ROCm's version if torch was built for it, read from torch's ``version.py`` alone."""
        spec = importlib.util.find_spec("torch")
        if spec is None or not spec.submodule_search_locations:
            return None
        return runpy.run_path(os.path.join(spec.submodule_search_locations[0], "version.py")).get("hip")

    def current_device(self) -> int:
        """The ordinal that a device without an index means; a torch that has not started CUDA means 0."""
        torch = sys.modules.get("torch")
        return torch.cuda.current_device() if torch is not None and torch.cuda.is_initialized() else 0


@dataclass(frozen=True)
class Sources:
    """Everything that the probe asks."""

    nvml: NvmlSource = field(default_factory=NvmlSource)
    driver: DriverSource = field(default_factory=DriverSource)
    host: HostSource = field(default_factory=HostSource)
    software: SoftwareSource = field(default_factory=SoftwareSource)

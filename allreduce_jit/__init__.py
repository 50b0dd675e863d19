"""The all-reduce for the GPUs of one host. See README.md; ``init`` is the front door.

Importing this needs no driver and costs next to nothing: names are loaded when first used.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

from .version import __version__

_HOMES = {
    "communicator": ("Communicator", "init"),
    "describe": ("Band", "CommunicatorReport", "FusedFamily"),
    "integrations.installed": ("Installation", "InstallationReport", "install", "uninstall"),
    "integrations.operators": ("register_communicator",),
    "integrations.sglang": (
        "CustomAllReduceV2",
        "CustomAllreduce",
        "THRESHOLD_2_SHOT_MAP",
        "_maybe_init_config",
        "can_use_custom_all_reduce_v2",
        "can_use_custom_all_reduce_with_nvlink",
        "dispatch_custom_allreduce",
    ),
    "norms": ("add_rms_norm", "add_rms_norm_fp8", "norm_family"),
    "policy.dispatch": ("apply_multi_node_policy", "decide"),
    "errors": (
        "AllReduceError",
        "CallMismatchError",
        "ClosedError",
        "CommunicatorFailedError",
        "CompileError",
        "ConcurrentUseError",
        "FailureReport",
        "InputError",
        "InputTypeError",
        "NotDeterministicError",
        "PeerLostError",
        "PeerTimeoutError",
        "PoisonedError",
        "RankReport",
        "SettingsError",
        "SetupError",
        "SignedCall",
    ),
    "machine.probe": ("Capabilities",),
    "policy.verdict": ("Path", "Reason", "Verdict"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(name for name in _HOME if not name.startswith("_"))

logging.getLogger("allreduce_jit").addHandler(logging.NullHandler())

if TYPE_CHECKING:
    from .communicator import Communicator, init
    from .describe import Band, CommunicatorReport, FusedFamily
    from .errors import (
        AllReduceError,
        CallMismatchError,
        ClosedError,
        CommunicatorFailedError,
        CompileError,
        ConcurrentUseError,
        FailureReport,
        InputError,
        InputTypeError,
        NotDeterministicError,
        PeerLostError,
        PeerTimeoutError,
        PoisonedError,
        RankReport,
        SettingsError,
        SetupError,
        SignedCall,
    )
    from .integrations.installed import Installation, InstallationReport, install, uninstall
    from .integrations.operators import register_communicator
    from .integrations.sglang import (
        THRESHOLD_2_SHOT_MAP,
        CustomAllreduce,
        CustomAllReduceV2,
        can_use_custom_all_reduce_v2,
        can_use_custom_all_reduce_with_nvlink,
        dispatch_custom_allreduce,
    )
    from .machine.probe import Capabilities
    from .norms import add_rms_norm, add_rms_norm_fp8, norm_family
    from .policy.dispatch import apply_multi_node_policy, decide
    from .policy.verdict import Path, Reason, Verdict


def __getattr__(name: str):
    if name not in _HOME:
        errors = importlib.import_module(".errors", __name__)
        if name in errors.RENAMED:
            return getattr(errors, name)  # with a warning
        raise AttributeError(f"module 'allreduce_jit' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

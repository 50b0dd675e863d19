import gc
import os

import pytest
import torch

# What takes longest begins first, so that no worker is left alone with it; others follow as they are.
FIRST = ["proofs", "setup"]


# A child collects nothing of its parent: what earlier tests left behind may have threads, which the child has not, and the destructor of a
# gloo group waits for them for ever. Before the fork, for Python's own handlers run first in the child, and may start a collection.
os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)


def pytest_configure(config):
    config.option.loadscopereorder = False  # xdist would begin with the files of most tests


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: [*FIRST, item.path.parent.name].index(item.path.parent.name))
    if os.environ.get("PROOFS_FOLLOW"):
        again = [item for item in items if item.path.parent.name == "proofs" and item.get_closest_marker("long")]
        items[:] = [item for item in items if item not in again]
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        for mark in item.iter_markers("gpus"):
            if present < mark.args[0]:
                item.add_marker(pytest.mark.skip(reason=f"needs {mark.args[0]} CUDA GPUs, this machine has {present}"))


def pytest_terminal_summary(terminalreporter):
    """What tests recorded as ``shown``: figures, and which check caught which planted bug."""
    lines = [text for report in terminalreporter.getreports("passed") for name, text in report.user_properties if name == "shown"]
    if lines:
        terminalreporter.section("shown")
        terminalreporter.write_line("\n".join(lines))

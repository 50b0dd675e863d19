import pytest
import torch


def pytest_collection_modifyitems(items):
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        for mark in item.iter_markers("gpus"):
            if present < mark.args[0]:
                item.add_marker(pytest.mark.skip(reason=f"needs {mark.args[0]} CUDA GPUs, this machine has {present}"))

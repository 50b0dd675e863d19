"""Prints, as JSON, what it takes to build a communicator: cold (empty cache), warm, and a second one.

Usage: python tools/construction.py GPUS
"""

import json
import os
import sys
import tempfile
import time

from allreduce_jit.harness import ranks


def build(place):
    import torch

    import allreduce_jit

    free, _ = torch.cuda.mem_get_info()
    started = time.perf_counter()
    comm = allreduce_jit.init(device=place.device)
    seconds = time.perf_counter() - started
    described = comm.describe()
    comm.close()
    again = time.perf_counter()
    allreduce_jit.init(device=place.device).close()
    return {
        "path": described["path"],
        "kernels": described["kernels"],
        "seconds": round(max(place.gather(seconds)), 3),
        "second_in_process_seconds": round(time.perf_counter() - again, 3),
        "timings": described["timings"],
        "device_bytes": described["device_bytes"],
    }


def main() -> None:
    gpus = int(sys.argv[1])
    report = {"gpus": gpus}
    for path, switch in (("v2", "1"), ("legacy", "0")):
        os.environ["SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2"] = switch
        with tempfile.TemporaryDirectory() as folder:
            os.environ["ALLREDUCE_JIT_CACHE_DIR"] = folder
            for state in ("cold", "warm"):
                report[f"{path} {state}"] = ranks.run(build, gpus=gpus, deadline=60).value
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

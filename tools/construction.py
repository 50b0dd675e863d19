"""Prints, as JSON, what it takes to build a communicator: cold (empty cache), warm, and a second one; on V2 also one that is asked for
norms of rows of 4096 bf16 elements.
"""

import argparse
import json
import os
import tempfile
import time

from allreduce_jit.harness import ranks


def build(place, norms=False):
    import torch

    import allreduce_jit

    torch.cuda.mem_get_info()  # makes the context
    operations = [allreduce_jit.norm_family("bfloat16", 4096)] if norms else []
    started = time.perf_counter()
    comm = allreduce_jit.init(device=place.device, operations=operations)
    seconds = time.perf_counter() - started
    described = comm.describe()
    comm.close()
    again = time.perf_counter()
    allreduce_jit.init(device=place.device, operations=operations).close()
    return {
        "path": described.path.value,
        "kernels": described.kernels.to_dict(),
        "seconds": round(max(place.gather(seconds)), 3),
        "second_in_process_seconds": round(time.perf_counter() - again, 3),
        "timings": described.timings,
        "device_bytes": described.device_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gpus", type=int, metavar="GPUS", help="ranks, one per GPU")
    gpus = parser.parse_args().gpus
    report = {"gpus": gpus}
    for path, switch, norms in (("v2", "1", False), ("v2", "1", True), ("legacy", "0", False)):
        os.environ["SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2"] = switch
        with tempfile.TemporaryDirectory() as folder:
            os.environ["ALLREDUCE_JIT_CACHE_DIR"] = folder
            for state in ("cold", "warm"):
                name = f"{path} with norms {state}" if norms else f"{path} {state}"
                report[name] = ranks.run(build, norms, gpus=gpus, deadline=60).value
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

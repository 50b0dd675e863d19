"""The local norm's kernel in Triton's interpreter, against the reference, bit for bit.

As a script: takes a job from standard input (folders of kernels by name, cases), plays every case on each of them, and prints by
name the cases whose bits differ, each with what differs. With ``first`` it goes on to the next folder at the first one.

TRITON_INTERPRET has to be set before Triton is imported, hence the other process. The interpreter's conversions, which truncate or round
to nearest but not to even, are replaced by torch's.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import torch
from helpers.norms import Case, difference, taken

from allreduce_jit.engine import norm_reference
from allreduce_jit.policy import local_norm


class Crashed(AssertionError):
    """A kernel that wrote where it must not, and took its process with it."""


def play(folders: dict[str, str], cases: list[Case], first: bool = False) -> dict[str, list[str]]:
    """In another process: by name, ``case: difference`` of each that differs. Raises ``Crashed``."""
    job = {"folders": folders, "cases": [dataclasses.asdict(case) for case in cases], "first": first, "path": sys.path}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if done.returncode < 0:
        raise Crashed(f"signal {-done.returncode}: {done.stderr[-4000:]}")
    assert not done.returncode, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def repair_conversions(interpreter) -> None:
    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}
    words = {4: torch.int32, 2: torch.int16, 1: torch.int8}

    def convert(data, from_type, to_type, _rounding):
        source, target = types[from_type.name], types[to_type.name]
        bits = np.ascontiguousarray(data).view(f"i{source.itemsize}")
        values = torch.from_numpy(bits.copy()).view(source)
        if target is torch.float8_e4m3fn:  # as if nothing else saturated: some versions of torch do
            values = torch.where(values.abs() > 448, torch.nan, values)
        values = values.to(target)
        return values.view(words[target.itemsize]).numpy().view(f"u{target.itemsize}")

    interpreter._convert_float = convert
    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, source, target):
        """Between any two of these; numpy rounds fp16 as it should."""
        names = source.dtype.scalar.name, target.scalar.name
        if {*names} <= {*types} and "fp8e4nv" in names:
            data = convert(source.data, source.dtype.scalar, target.scalar, None)
            return interpreter.TensorHandle(data.view(interpreter._get_np_dtype(target)), target.scalar)
        return cast(self, source, target)

    interpreter.InterpreterBuilder.cast_impl = cast_impl


def launch(kernel, tl, case: Case) -> tuple[torch.Tensor, ...]:
    call = taken(case)
    spec, norm = call.spec, call.spec.epilogue
    arguments = dict.fromkeys(local_norm.ARGUMENTS, 0)
    arguments |= {pointer.name: tensor.data_ptr() for pointer, tensor in zip(spec.pointers, call.tensors, strict=True)}
    arguments |= dict(rows=spec.rows, hidden=spec.hidden, inverse=float(np.float32(1 / spec.hidden)), eps=norm.eps)
    arguments |= dict(weight_bias=float(norm.weight_bias), weight_is_fp32=int(norm.weight == "float32"))
    if norm.quant == "group":
        arguments |= dict(scale_row=norm.scale_strides[0], scale_group=norm.scale_strides[1])
    else:
        arguments |= dict(scale_row=1)
    constants = dict(local_norm.module(spec).constants) | {"INTERPRET": True}
    constants["DTYPE"] = getattr(tl, constants["DTYPE"])
    grid = local_norm.grid(spec.rows, 4)  # fewer programs than rows
    kernel[(grid,)](**arguments, **constants)
    return call.results


def main() -> None:
    import triton.language as tl
    from legacy_ranks import patch_once, repair_masks
    from triton.runtime import interpreter

    np.seterr(all="ignore")
    torch.set_num_threads(1)
    repair_conversions(interpreter)
    repair_masks(interpreter, tl.int1)
    patch_once(interpreter)
    job = json.load(sys.stdin)
    cases = [Case(**case) for case in job["cases"]]
    wanted = []
    for case in cases:
        call = taken(case)
        norm_reference.run(call.spec, call.tensors)
        wanted.append(call.results)
    wrong = {}
    for number, (name, folder) in enumerate(job["folders"].items()):
        package = importlib.util.spec_from_file_location(
            f"kernels_{number}", f"{folder}/__init__.py", submodule_search_locations=[folder]
        )
        sys.modules[package.name] = importlib.util.module_from_spec(package)
        kernel = importlib.import_module(f"{package.name}.norm").add_rms_norm
        wrong[name] = []
        for case, want in zip(cases, wanted, strict=True):
            try:
                found = difference(case, launch(kernel, tl, case), want)
            except Exception as e:
                found = f"{type(e).__name__}: {e}" + (f" from {e.__cause__!r}" if e.__cause__ else "")
            if found:
                wrong[name].append(f"{case}: {found}")
            if found and job["first"]:
                break
    print(json.dumps(wrong))


if __name__ == "__main__":
    main()

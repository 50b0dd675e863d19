"""What arguments of the command line may be: each function reads one, or tells why not. Imports no torch."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

from ..harness.report import parse_size

COMPETITORS = ("nccl", "nccl_symm", "torch_one_shot", "torch_two_shot", "sglang", "flashinfer")
_MAX_SECONDS = 1_000_000  # poll and the timeouts of torch count milliseconds in 31 bits
_DTYPES = {name: name for name in ("float", "half", "bfloat16")} | {
    "float32": "float",
    "fp32": "float",
    "float16": "half",
    "fp16": "half",
    "bf16": "bfloat16",
}


def size_from(least: int) -> Callable[[str], int]:
    def size(text: str) -> int:
        try:
            found = parse_size(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if found < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {least} bytes or more")
        return found

    return size


def whole(least: int, most: int = 10**9) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or len(text) > 20 or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {least} to {most}")
        return int(text)

    return number


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= _MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r}: expected seconds, more than 0 and at most {_MAX_SECONDS}")
    return value


def dtype(text: str) -> str:
    if text not in _DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(_DTYPES)}")
    return _DTYPES[text]


def new_file(text: str) -> Path:
    """Refused now what could not be written once everything is measured."""
    folder = os.path.dirname(text) or "."
    if os.path.isdir(text) or not os.path.isdir(folder) or not os.access(text if os.path.exists(text) else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a file that can be written, in a folder that exists")
    return Path(text)


def arch(text: str) -> str:
    if not re.fullmatch(r"sm_\d{2,3}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected an architecture such as sm_90")
    return text


def competitors(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name and name != "none")
    unknown = [name for name in names if name not in COMPETITORS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: expected some of {', '.join(COMPETITORS)}, or none")
    return names


def several(one: Callable[[str], int]) -> Callable[[str], tuple[int, ...]]:
    """Numbers with commas in between."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(dict.fromkeys(map(one, text.split(","))))

    return numbers

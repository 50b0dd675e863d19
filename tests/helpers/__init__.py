"""What tests of several folders use: stand-ins, machines from tables, and how cubins are read. None of it is a test."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"

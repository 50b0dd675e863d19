"""The names of the paths, as users see them: in the API, in ``ALLREDUCE_JIT_PATH``, on the command line."""

from __future__ import annotations

import enum


class Path(str, enum.Enum):
    """A rung of the ladder, the highest first. All but the last have a row in ``policy.backends``."""

    V2 = "v2"
    LEGACY = "legacy"
    HOST = "host"
    TORCH = "torch.distributed"

    def __str__(self) -> str:  # Python 3.12 changed what a mixed-in str prints
        return self.value

    @property
    def short(self) -> str:
        """As ``ALLREDUCE_JIT_PATH`` has it: ``torch`` for torch.distributed."""
        return self.value.partition(".")[0]

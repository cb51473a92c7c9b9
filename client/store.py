"""What stays on a client between rounds: its personal adapter, and what its optimizer remembers. A file a round."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from safetensors.torch import load_file, save_file
from torch import Tensor

KEPT = 3
"""Files kept: a run that is killed goes back by one round at the most."""


@dataclass(frozen=True)
class Store:
    """The folder of one client in one run. Nothing is made before something is saved."""

    folder: Path

    @classmethod
    def of(cls, root: Path, run: str, client_id: str) -> "Store":
        """`root`/run/client. Raises ValueError for a run that is no hexadecimal number: it comes from outside."""
        if not re.fullmatch(r"[0-9a-f]{0,64}", run):
            raise ValueError(f"the order's run must be a hexadecimal number, got {run!r}")
        return cls(root / (run or "run") / f"client-{quote(client_id, safe='')}")

    def load(self, round_number: int) -> dict[str, Tensor]:
        """What was saved in the newest round before `round_number`; nothing where there is none.

        A round that is done again, because its run was killed, finds what it found the first time.
        """
        earlier = [path for path in self._files() if _round(path) < round_number]
        return load_file(earlier[-1]) if earlier else {}

    def save(self, round_number: int, tensors: Mapping[str, Tensor]) -> None:
        """Writes the file of a round whole, and takes the oldest away."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"round-{round_number:05}.safetensors"
        temporary = path.with_suffix(".tmp")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        temporary.replace(path)
        for old in [p for p in self._files() if _round(p) <= round_number][:-KEPT]:
            old.unlink()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("round-*.safetensors"))


def _round(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose name begins with `prefix/`, without it."""
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}

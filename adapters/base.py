"""Base models: opened once per process, in any precision, never written to."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, GgufConfig
from transformers.pytorch_utils import Conv1D

from corolla.adapters.heads import HEADS, LANGUAGE_MODEL, Head, draw_head
from corolla.adapters.source import Source, base_hash, find_base


@dataclass(frozen=True, eq=False)
class Base:
    """An open base: the model (in eval mode, no gradients), its tokenizer, and its identity."""

    source: Source
    model: Any
    tokenizer: Any
    hash: str
    dtype: str
    device: torch.device
    head: Head = LANGUAGE_MODEL
    quantized: bool = False


def choose_device(device: str = "auto") -> torch.device:
    """The device by name; "auto" is CUDA where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


QUANTIZATIONS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
"""How the weights of linear modules may be held -> the options of bitsandbytes."""

CLASSIFIERS = ["classifier", "score", "pre_classifier", "classification_head", "pooler"]
"""Modules that bitsandbytes leaves whole in a classifier: they are trained."""

DEVICE_MAPS = ("balanced", "balanced_low_0", "sequential")
"""Values of model.device by which accelerate spreads the layers of one base over several GPUs."""


def open_base(
    name: str,
    dtype: str = "float32",
    device: str = "auto",
    *,
    head: Head = LANGUAGE_MODEL,
    quantization: str = "none",
    attention: str = "auto",
) -> Base:
    """The base `name` in `dtype` on `device`, opened once per process: the same object for the same arguments.

    `device` may be one of DEVICE_MAPS; `quantization` one of QUANTIZATIONS; `attention` an implementation by
    transformers' name, or "auto". Read-only by contract: adapters are attached beside it (`adapters.lora.attached`)
    and taken off again. Raises FileNotFoundError, ImportError without bitsandbytes where it is needed, ValueError for
    options that do not go together.
    """
    source = find_base(name)
    if device not in DEVICE_MAPS:
        device = str(choose_device(device))
    return _open(source, base_hash(source), Opening(dtype, device, head, quantization, attention))


@dataclass(frozen=True)
class Opening:
    """How a base is opened; its identity depends on the head alone."""

    dtype: str = "float32"
    device: str = "cpu"
    head: Head = LANGUAGE_MODEL
    quantization: str = "none"
    attention: str = "auto"

    def options(self, source: Source) -> dict[str, Any]:
        """What from_pretrained is told. Raises ValueError for what does not go together."""
        options: dict[str, Any] = {"dtype": getattr(torch, self.dtype), **self.head.options()}
        if source.gguf:
            options |= {"gguf_file": source.gguf, "quantization_config": GgufConfig(dequantize=True)}
        else:
            options |= {"use_safetensors": True}
        if self.quantization != "none":
            options |= {"quantization_config": self._quantization(source), "device_map": {"": self.device}}
        if self.device in DEVICE_MAPS:
            options["device_map"] = self.device
        if self.attention != "auto":
            options["attn_implementation"] = self.attention
        return options

    def _quantization(self, source: Source) -> BitsAndBytesConfig:
        if self.quantization not in QUANTIZATIONS:
            raise ValueError(f"model.quantization must be one of {', '.join(QUANTIZATIONS)}, got {self.quantization!r}")
        if source.gguf:
            raise ValueError(
                f"model.quantization = {self.quantization!r} needs a base in safetensors, got {source.name}, which is "
                "opened dequantised: use 'none'"
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ImportError(
                f"model.quantization = {self.quantization!r} needs bitsandbytes: pip install 'corolla[quant]'"
            )
        compute = {"bnb_4bit_compute_dtype": getattr(torch, self.dtype)} if "4" in self.quantization else {}
        whole = {"llm_int8_skip_modules": CLASSIFIERS} if self.head.labels else {}
        return BitsAndBytesConfig(**QUANTIZATIONS[self.quantization], **compute, **whole)


def load_model(source: Source, opening: Opening = Opening()) -> Any:
    """The source's model, a new object at every call, a head that the checkpoint lacks drawn from its name."""
    auto = HEADS[opening.head.kind]
    model, facts = auto.from_pretrained(
        source.folder, local_files_only=True, output_loading_info=True, **opening.options(source)
    )
    draw_head(model, opening.head, facts["missing_keys"])
    return model


def empty_model(source: Source, dtype: str = "float32", head: Head = LANGUAGE_MODEL, attention: str = "auto") -> Any:
    """The source's model from its configuration alone, on torch's meta device: no weights are read, none are made.

    Attention that needs a GPU is replaced by sdpa, which holds as much.
    """
    attention = "eager" if attention == "eager" else "sdpa"
    options = {"gguf_file": source.gguf} if source.gguf else {}
    config = AutoConfig.from_pretrained(source.folder, local_files_only=True, **options, **head.options())
    with torch.device("meta"):
        model = HEADS[head.kind].from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
    return model.requires_grad_(False).eval()


QUANTIZED_BYTES = {"nf4": 0.5 + 1 / 64 + 1 / 4096, "fp4": 0.5 + 1 / 64 + 1 / 4096, "int8": 1.0}
"""Bytes of a weight: 4 bits with an 8-bit scale for every 64 of them and a float32 for every 256 scales; or 8 bits."""


def quantized_bytes(model: Any, quantization: str) -> tuple[float, float]:
    """(bytes that quantising spares in the linear layers of `model`, bytes of the largest of these as it computes).

    A layer is taken back to the model's precision for each of its passes, one at a time.
    """
    if quantization == "none":
        return 0.0, 0.0
    whole = model.get_output_embeddings()
    weights = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and module is not whole
        and not set(name.split(".")) & set(CLASSIFIERS)
    ]
    spared = sum(weight.nbytes - weight.numel() * QUANTIZED_BYTES[quantization] for weight in weights)
    return spared, float(max((weight.nbytes for weight in weights), default=0))


def open_tokenizer(source: Source) -> Any:
    """The source's tokenizer, the same object for as long as its files stay as they are.

    What has no padding token pads with the end token.
    """
    files = ((path, path.stat()) for path in sorted(source.folder.iterdir()) if path.is_file())
    return _open_tokenizer(source, tuple((path.name, facts.st_mtime_ns, facts.st_size) for path, facts in files))


@lru_cache(maxsize=8)
def _open_tokenizer(source: Source, files: tuple[tuple[str, int, int], ...]) -> Any:
    options = {"gguf_file": source.gguf} if source.gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(source.folder, local_files_only=True, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@lru_cache(maxsize=2)
def _open(source: Source, digest: str, opening: Opening) -> Base:
    model = load_model(source, opening)
    tokenizer = open_tokenizer(source)
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.requires_grad_(False)
    if "device_map" not in opening.options(source):
        model = model.to(opening.device)
    identity = opening.head.identity(digest)
    return Base(
        source,
        model.eval(),
        tokenizer,
        identity,
        opening.dtype,
        model.device,
        opening.head,
        opening.quantization != "none",
    )

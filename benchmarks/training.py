"""A client's local training against a bare loop of PEFT and TRL on the same batches."""

import tempfile
import time
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from corolla.adapters import Base, attached, open_base
from corolla.client.config import DataConfig, TrainConfig
from corolla.client.data.generated import generate_tasks
from corolla.client.tasks.causal_lm import TextExample, encode
from corolla.client.training import train_round
from corolla.server.config import Config
from corolla.simulations.simulate import DEMO_CONFIG

STEPS, PAIRS = 6, 3


def client_over_bare() -> tuple[str, float, float]:
    """(what, tokens/s of a client, tokens/s of the bare loop): SmolLM2-135M, rank 16, alternating, the best of each."""
    config = Config.load(DEMO_CONFIG, [f"train.local_steps={STEPS}"])
    base = open_base(config.model.name)
    examples = _examples(base, config.data, STEPS * config.train.batch_size)
    tokens = sum(len(example.input_ids) for example in examples)
    speeds: dict[str, list[float]] = {"client": [], "bare": []}
    for _ in range(PAIRS):
        for name, work in (("client", _client), ("bare", _bare)):
            speeds[name].append(tokens / _seconds(lambda work=work: work(base, config, examples)))  # type: ignore[misc]
    what = f"a client's tokens/s / bare PEFT + TRL, SmolLM2-135M, rank 16, {STEPS} steps with set-up"
    return what, max(speeds["client"]), max(speeds["bare"])


def _examples(base: Base, data: DataConfig, count: int) -> list[TextExample]:
    rows, _ = generate_tasks(0, None, count // 8, 1)
    return [encode(base.tokenizer, data, dict(row)) for row in rows]


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _client(base: Base, config: Config, examples: list[TextExample]) -> None:
    with attached(base.model, config.adapter.spec(16)) as model:
        train_round(model, base, config.train, examples, 1, 1, 0)


def _bare(base: Base, config: Config, examples: list[TextExample]) -> None:
    train: TrainConfig = config.train
    targets = config.adapter.target_modules
    lora = LoraConfig(r=16, lora_alpha=64, target_modules=targets, task_type="CAUSAL_LM")
    model: Any = get_peft_model(base.model, lora)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=train.batch_size,
            learning_rate=train.learning_rate,
            train_sampling_strategy="sequential",
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            bf16=False,
            use_cpu=base.device.type == "cpu",
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = SFTTrainer(
            model,
            arguments,
            train_dataset=Dataset.from_list([example.features() for example in examples]),
            processing_class=base.tokenizer,
        )
        trainer.train()
    model.unload()
    base.model.__dict__.pop("peft_config", None)

"""Trains one adapter with plain PEFT, as a user without Corolla would: python train_with_peft.py BASE OUT JSON."""

import json
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

base, out, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
seed = options.pop("seed")
torch.manual_seed(seed)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **options))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
ids = torch.randint(0, 256, (4, 24))
for _ in range(3):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained(out)

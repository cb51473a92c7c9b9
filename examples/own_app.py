"""Corolla's strategy and adapters in a Flower app of your own: your model, your loop, none of our configuration.

python examples/own_app.py runs it in this process; `client` and `server` are ordinary Flower apps otherwise.
"""

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from transformers import LlamaConfig, LlamaForCausalLM

from corolla.adapters import AdapterSpec, attached, read_adapter, target_shapes
from corolla.aggregation import FreshRows, GlobalModel, fill_adapter
from corolla.client.protocol import Assignment, Hello, Reply
from corolla.server.record import RoundRecord
from corolla.server.strategy import FederatedLoRA

client, server = ClientApp(), ServerApp()
BASE = "my-model-v1"  # whatever names your base: clients with another one are refused
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
)


def spec(context: Context) -> AdapterSpec:
    """Every client its own rank: 2, 4, 8 …"""
    return AdapterSpec(2 ** (int(context.node_config["partition-id"]) + 1), alpha=8.0, target_modules="all-linear")


@client.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Who this client is, and what it adapts."""
    mine = spec(context)
    name = f"site-{context.node_config['partition-id']}"
    return Message(Hello(name, mine.rank, BASE, 100, target_shapes(model, mine)).pack(), reply_to=message)


@client.train()
def train(message: Message, context: Context) -> Message:
    """Any loop will do: here, five steps on a sequence that only this client knows."""
    assignment, mine = Assignment.unpack(message.content), spec(context)
    fresh = FreshRows(assignment.order.seed, assignment.order.fresh_round)
    start = fill_adapter(assignment.start, target_shapes(model, mine), mine.rank, fresh)
    tokens = torch.arange(24)[None] * (mine.rank + 1) % 64
    with attached(model, mine, start, assignment.frozen, assignment.order.trains) as peft_model:
        optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(5):
            loss = peft_model(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        adapter = read_adapter(peft_model)
    name, order = f"site-{context.node_config['partition-id']}", assignment.order
    metrics = {"loss_before": losses[0], "train_loss": losses[-1]}
    return Message(Reply(name, order.round, order.model, BASE, 100, 5, adapter, metrics).pack(), reply_to=message)


def report(record: RoundRecord, model: GlobalModel, replies: object) -> None:
    """After each round: the loss of what the clients received."""
    print(record.received_loss)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Three rounds; the global model is strategy.model afterwards."""
    strategy = FederatedLoRA("flora", clients=3, evaluate="never", on_round=report)
    strategy.run(grid, rounds=3)


if __name__ == "__main__":
    from corolla.simulations.grid import InProcessGrid

    main(InProcessGrid(client, [{"partition-id": k} for k in range(3)], {}), None)  # type: ignore[arg-type]

"""The ClientApp: Flower's messages to `corolla.client.answers`, in the node's worker or here. A thin shell.

Flower starts a process for every message: nothing here may import torch before it is needed.
"""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from corolla.client.forward import NoWorker, forward

app = ClientApp()

WORKER = "worker"
"""In a node's configuration, the Unix socket of its worker (`corolla worker`)."""


def _answer(name: str, message: Message, context: Context) -> Message:
    """The reply of the node's worker; of this process where the node has none, or where none answers there."""
    if socket := context.node_config.get(WORKER):
        try:
            return Message(forward(name, message.content, context, str(socket)), reply_to=message)
        except NoWorker as error:
            from flwr.common.logger import log

            log(30, "%s: this process opens the base itself, which takes longer", error)
    from corolla.client.answers import ANSWERS, Node

    return Message(ANSWERS[name](message.content, Node(context.node_config, context.state)), reply_to=message)


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Says who this node is."""
    return _answer("hello", message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains its share and replies the adapter."""
    return _answer("train", message, context)


@app.train("secure")
def train_secure(message: Message, context: Context) -> Message:
    """Trains its share and replies a masked sketch of the change."""
    return _answer("secure_train", message, context)


@app.query("secure_keys")
def secure_keys(message: Message, context: Context) -> Message:
    """Begins a round of secure sums."""
    return _answer("secure_keys", message, context)


@app.query("secure_shares")
def secure_shares(message: Message, context: Context) -> Message:
    """Shares its secrets out among the round's clients."""
    return _answer("secure_shares", message, context)


@app.query("secure_project")
def secure_project(message: Message, context: Context) -> Message:
    """Replies the second masked vector."""
    return _answer("secure_project", message, context)


@app.query("secure_reveal")
def secure_reveal(message: Message, context: Context) -> Message:
    """Replies its shares of what takes the masks off the sum."""
    return _answer("secure_reveal", message, context)


@app.query("secure_end")
def secure_end(message: Message, context: Context) -> Message:
    """Forgets what is left of a round that failed."""
    return _answer("secure_end", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluates the global model and replies numbers."""
    return _answer("evaluate", message, context)

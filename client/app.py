"""The ClientApp: Flower's messages to `corolla.client.answers`, in the node's worker or here. A thin shell.

Flower starts a process for every message: nothing here may import torch before it is needed.
"""

from functools import partial

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


for _register, _name in (
    (app.query("hello"), "hello"),
    (app.train(), "train"),
    (app.evaluate(), "evaluate"),
    (app.query("secure_keys"), "secure_keys"),
    (app.query("secure_shares"), "secure_shares"),
    (app.train("secure"), "secure_train"),
    (app.query("secure_project"), "secure_project"),
    (app.query("secure_reveal"), "secure_reveal"),
    (app.query("secure_end"), "secure_end"),
):
    _register(partial(_answer, _name))

"""What an operator is told of a run, from the lines of its log."""

from corolla.server.deployed import RunStatus, _take


def line(number, clients, refused=(), quarantined=()):
    return {
        "kind": "round", "round": number, "clients": {name: {"rank": 2, "train_loss": 1.5} for name in clients},
        "refused": dict.fromkeys(refused, "its base"), "quarantined": dict.fromkeys(quarantined, "NaN"),
    }  # fmt: skip


def test_rounds_count_whoever_else_claims_the_name():
    """`refused` lasts; that another node claimed a client's name does not take its rounds away."""
    found = RunStatus(1, "running", "")
    _take(found, {"kind": "begin", "rounds": 3})
    for number in (1, 2, 3):
        _take(found, line(number, ["ann", "bob"], refused=["ann", "cleo"], quarantined=["bob"]))
    ann, bob, cleo = (found.clients[name] for name in ("ann", "bob", "cleo"))
    assert (ann.rounds, ann.last, ann.loss, ann.trouble) == (3, 3, 1.5, "round 3: its base")
    assert (bob.rounds, bob.last, bob.trouble) == (0, None, "round 3: NaN")
    assert (cleo.rounds, cleo.rank) == (0, None)
    assert (found.round, found.rounds) == (3, 3)

"""A client's secrets: given out once, in order, and never both of one client's."""

import contextlib
import itertools

import numpy as np
import pytest
import torch
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from hypothesis import given, settings
from hypothesis import strategies as st

from corolla.client.secure.keys import KeyPair, commitment, derive, keystream, new_seed, seal, unseal
from corolla.client.secure.masks import Pass, require_no_small_difference
from corolla.client.secure.session import Session, keys_of, text_of

NAMES = ("ann", "bob", "cleo", "dan", "eve")


def opened(names=NAMES, threshold=4) -> dict[str, Session]:
    """All sessions of a round in which everybody's shares came."""
    begun = {name: Session.new(name, "run", 1) for name in names}
    roster = {name: session.public() for name, session in begun.items()}
    shared = {name: session.share(roster, threshold) for name, session in begun.items()}
    return {
        name: session.open({other: shared[other][1][name] for other in names if other != name})
        for name, (session, _) in shared.items()
    }


def masked(vectors, sessions):
    done = {name: session.mask(vectors[name], NAMES) for name, session in sessions.items()}
    return {n: s for n, (s, _) in done.items()}, {n: v for n, (_, v) in done.items()}


def vectors(count=50, dtype=torch.int64):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randint(-(2**20), 2**20, (count,), generator=generator, dtype=dtype) for name in NAMES}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pairwise_masks_cancel_and_own_masks_do_not(dtype):
    truth = vectors(dtype=dtype)
    sessions, sent = masked(truth, opened())
    total = sum(sent.values())
    assert (total != sum(truth.values())).any()
    now = Pass(sessions["ann"].name, 0, NAMES)
    for name in NAMES:
        total = total - now.own(name, sessions[name].seeds[0], 50, dtype)
    assert torch.equal(total, sum(truth.values()))


def test_a_pass_is_revealed_once_and_shares_of_both_secrets_never_come():
    sessions, _ = masked(vectors(), opened())
    survivors = ("ann", "bob", "cleo", "eve")
    after, shares = sessions["ann"].reveal(survivors)
    held = sessions["ann"].held
    assert shares == {name: held[name][0 if name == "dan" else 1] for name in NAMES}
    for again in (survivors, NAMES, ("ann", "bob", "cleo", "dan")):
        with pytest.raises(ValueError, match="ann must have done 'masked 2' of round 1 last, got 'revealed 1'"):
            after.reveal(again)
    with pytest.raises(ValueError, match=r"'opened' of round 1 last|'revealed 1' of round 1 last"):
        sessions["ann"].mask(vectors()["ann"], NAMES)


def test_what_opens_a_lost_client_in_the_first_pass_does_not_open_the_second():
    sessions, _ = masked(vectors(), opened())
    pieces = [
        session.reveal(("ann", "bob", "cleo", "eve"))[1]["dan"] for name, session in sessions.items() if name != "dan"
    ]
    secret = combine_shares(pieces[:4])
    assert KeyPair.of(secret) == sessions["dan"].masks[0]
    assert secret not in (sessions["dan"].masks[1].private, *sessions["dan"].seeds)
    with pytest.raises(ValueError, match="must be over ann and others of ann, bob, cleo, eve, got"):
        sessions["ann"].reveal(("ann", "bob", "cleo", "eve"))[0].mask(vectors()["ann"], NAMES)


def test_fewer_shares_than_the_threshold_do_not_open():
    sessions = opened()
    pieces = [session.held["dan"][1] for session in sessions.values()]
    assert combine_shares(pieces[1:]) == sessions["dan"].seeds[0]
    for few in itertools.combinations(pieces, 3):
        with contextlib.suppress(ValueError):
            assert combine_shares(list(few)) != sessions["dan"].seeds[0]


def test_masks_are_for_one_session_pass_and_group():
    seed = new_seed()
    passes = [Pass("s", 0, NAMES), Pass("s", 1, NAMES), Pass("s", 0, NAMES[:4]), Pass("t", 0, NAMES)]
    masks = [p.own("ann", seed, 4, torch.int64) for p in passes] + [passes[0].own("bob", seed, 4, torch.int64)]
    assert len({tuple(mask.tolist()) for mask in masks}) == 5


@pytest.mark.parametrize(
    ("survivors", "message"),
    [
        (("ann", "bob"), "at least 4 clients, got 2"),
        (("ann", "bob", "cleo", "zoe"), "survivors must be of"),
        (("ann", "ann", "ann", "bob"), "at least 4 clients, got 2"),
    ],
)
def test_a_sum_of_few_or_of_strangers_is_not_opened(survivors, message):
    sessions, _ = masked(vectors(), opened())
    with pytest.raises(ValueError, match=message):
        sessions["ann"].reveal(survivors)


def test_a_roster_must_be_large_enough_with_own_keys_and_a_majority():
    sessions = {name: Session.new(name, "run", 1) for name in NAMES}
    roster = {name: session.public() for name, session in sessions.items()}
    ann = sessions["ann"]
    with pytest.raises(ValueError, match="more than half of 5 clients, got 2"):
        ann.share(roster, 2)
    with pytest.raises(ValueError, match="a roster needs at least 3 clients, got 2"):
        ann.share({name: roster[name] for name in ("ann", "bob")}, 2)
    with pytest.raises(ValueError, match="the keys of ann as it sent them"):
        ann.share({**roster, "ann": roster["bob"]}, 4)
    with pytest.raises(ValueError, match="keys of its own, got some twice"):
        ann.share({**roster, "cleo": roster["bob"]}, 4)


def test_clients_that_were_told_different_rosters_cannot_open_each_others_shares():
    begun = {name: Session.new(name, "run", 1) for name in NAMES}
    roster = {name: session.public() for name, session in begun.items()}
    other = {**roster, "eve": Session.new("eve", "run", 1).public()}
    _, sealed = begun["ann"].share(other, 4)
    bob, _ = begun["bob"].share(roster, 4)
    with pytest.raises(ValueError, match=r"shares of ann for bob .* changed on its way"):
        bob.open({"ann": sealed["bob"], "cleo": sealed["bob"], "dan": sealed["bob"]})


def test_one_or_two_clients_between_the_passes_would_be_alone_in_the_difference():
    for lost in (0, 3, 4):
        require_no_small_difference(range(7), range(lost, 7))
    for lost in (1, 2):
        with pytest.raises(ValueError, match="none or at least 3"):
            require_no_small_difference("abcdefg", "abcdefg"[lost:])


def test_a_client_refuses_a_second_sum_with_one_less():
    sessions, _ = masked(vectors(), opened())
    after, _ = sessions["ann"].reveal(NAMES)
    with pytest.raises(ValueError, match="none or at least 3, got eve"):
        after.mask(vectors()["ann"], NAMES[:4])
    second, _ = after.mask(vectors()["ann"], NAMES)
    with pytest.raises(ValueError, match="none or at least 3, got eve"):
        second.reveal(NAMES[:4])


def test_memory_and_wire_give_back_what_they_took():
    sessions, _ = masked(vectors(), opened())
    assert Session.from_json(sessions["ann"].to_json()) == sessions["ann"]
    import json

    keys = sessions["ann"].public()
    assert keys_of(json.loads(text_of({"ann": keys}))["ann"]) == keys
    with pytest.raises(ValueError, match="32 bytes"):
        keys_of({"channel": "00", "masks": ["00", "00"], "seeds": ["00", "00"]})
    with pytest.raises(ValueError, match="public keys must be"):
        keys_of({"channel": "00"})


def test_a_stream_is_uniform_differs_by_purpose_and_is_the_published_one():
    key = derive(bytes(32), "a purpose")
    stream = keystream(key, 50_000, torch.int64).numpy()
    counts = np.bincount(np.frombuffer(stream.tobytes(), dtype=np.uint8), minlength=256)
    assert 150 < ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 390
    other = keystream(derive(bytes(32), "another"), 50_000, torch.int64).numpy()
    assert not (stream == other).any()
    # RFC 8439, A.1: the first block of ChaCha20 with a key, counter and nonce of zeros
    assert keystream(bytes(32), 2, torch.int64).numpy().tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"


def test_flowers_own_mask_generator_is_one_of_two_to_the_32():
    """Why it is not used: two seeds of 256 bits whose words have one xor give one mask."""
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

    one = bytes(range(32))
    other = one[4:8] + one[:4] + one[8:]
    assert one != other
    assert (pseudo_rand_gen(one, 2**31, [(50,)])[0] == pseudo_rand_gen(other, 2**31, [(50,)])[0]).all()


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 10**6))
def test_a_sealed_text_comes_back_and_a_changed_one_does_not(text, where):
    key = new_seed()
    sealed = seal(key, text, "about")
    assert unseal(key, sealed, "about") == text
    where %= len(sealed)
    changed = sealed[:where] + bytes([sealed[where] ^ 1]) + sealed[where + 1 :]
    for wrong in ((key, changed, "about"), (key, sealed, "other"), (new_seed(), sealed, "about"), (key, b"", "about")):
        with pytest.raises(ValueError, match="changed on its way"):
            unseal(*wrong)


def test_two_agree_and_a_third_does_not():
    one, two, three = KeyPair.new(), KeyPair.new(), KeyPair.new()
    assert one.agree(two.public, "p") == two.agree(one.public, "p")
    assert len({one.agree(two.public, "p"), one.agree(two.public, "q"), three.agree(two.public, "p")}) == 3
    assert commitment(bytes(32)) != commitment(bytes(31) + b"\x01")

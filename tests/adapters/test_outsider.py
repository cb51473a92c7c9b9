"""A kind that an outsider adds: one file, one line in the registry; it keeps the laws and runs like the others."""

import pytest

from corolla import simulate
from corolla.adapters import KINDS
from corolla.adapters.kinds.catalogue import catalogue
from corolla.simulations.export import export_checkpoint
from tests.adapters.outsider import FourierFt
from tests.adapters.test_kinds import combined_is_the_mean, read_is_what_was_trained, spec_of, whole
from tests.simulations.test_kinds import config_of, rounds

__all__ = ["whole"]


@pytest.fixture
def name(monkeypatch):
    monkeypatch.setitem(KINDS, "fourierft", FourierFt())
    return "fourierft"


def test_it_keeps_the_laws(name, whole):
    assert combined_is_the_mean(whole, name) < 1e-6
    assert read_is_what_was_trained(whole, name) < 1e-5


def test_it_runs_resumes_exports_and_is_listed(name, tiny_folder, tmp_path, tiny):
    run = simulate(config_of(tiny_folder, tmp_path / "whole", name, aggregation={"noise": True}))
    simulate(config_of(tiny_folder, tmp_path / "parts", name, run={"rounds": 1}, aggregation={"noise": True}))
    parts = simulate(None, out=tmp_path / "parts", resume=True, overrides=["run.rounds=3"])
    assert parts.model.digest() == run.model.digest()
    assert all(line["update"]["certificate"]["exact"] for line in rounds(run))
    assert {c["bytes_up"] for line in rounds(run) for c in line["clients"].values()} == {4 * 4 * 16}
    assert export_checkpoint(tmp_path / "whole", tmp_path / "merged", merged=True).logits_error < 1e-5
    entry = next(entry for entry in catalogue(tiny.model, spec_of) if entry.name == name)
    assert entry.bytes_up == 4 * 4 * 16

"""Every number that clients report is averaged, and any task's score is named and shown."""

from corolla.server.scores import average, describe, describe_change, score_in, score_of


def test_every_number_is_averaged_by_its_own_examples():
    clients = {
        "a": {"examples": 4.0, "accuracy": 1.0, "accuracy/x": 1.0, "examples/x": 3.0, "margin": 2.0},
        "b": {"examples": 12.0, "accuracy": 0.0, "accuracy/x": 0.0, "examples/x": 1.0},
        "c": {"held_out_loss": 5.0},  # does not say of how many examples
    }
    assert average(clients) == {"accuracy": 0.25, "accuracy/x": 0.75, "margin": 2.0}
    assert average({}) == {}


def test_the_score_of_a_run_is_what_its_lines_name_and_have():
    old = {"kind": "evaluation", "mean": {"held_out_loss": 1.0, "exact_match": 0.5}, "clients": {}}
    new = {"kind": "evaluation", "score": "accuracy", "mean": {"held_out_loss": 1.0, "accuracy": 0.5}, "clients": {}}
    plain = {"kind": "evaluation", "score": "exact_match", "mean": {"held_out_loss": 1.0}, "clients": {}}
    nobody = {"kind": "evaluation", "mean": {"held_out_loss": None, "exact_match": None}, "clients": {}}
    assert [score_of([line]) for line in (old, new, plain, nobody)] == ["exact_match", "accuracy", None, None]
    assert score_of([{"kind": "round"}, nobody, new]) == "accuracy"
    assert score_in({"preference_accuracy": 1.0, "seconds": 3.0}) == "preference_accuracy"
    assert score_in({"held_out_loss": 1.0}) is None


def test_words():
    assert describe({"held_out_loss": 1.0, "accuracy": 0.5}, "accuracy") == "held-out loss 1.000, accuracy 50.0%"
    assert describe({"held_out_loss": 1.0}, None) == "held-out loss 1.000"
    assert describe({"held_out_loss": None}, "exact_match") == "no numbers"
    assert describe_change({"held_out_loss": 2.0}, {"held_out_loss": 1.0, "accuracy": 0.5}, "accuracy") == (
        "held-out loss 2.000 → 1.000"
    )
    assert describe_change({}, {}, None) == ""


def test_showing_results_imports_no_trainer():
    import subprocess
    import sys

    code = "import sys, corolla.server.scores; sys.exit('trl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""What a verb says while it works."""

from tinyllama_jax import terminal


def test_a_phase_that_begins_long_after_the_last_line_has_no_speed_yet(monkeypatch, capsys):
    """Its first report may come at the very instant at which it begins."""
    clock = iter([100.0, 200.0, 220.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with terminal.Progress() as progress:
        progress("tokenize", 3, 1000, 0.1)
        progress("tokenize", 6, 2000, 0.5)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "tokenize: 3 documents, 1,000 tokens"
    assert second == "tokenize: 6 documents, 2,000 tokens, 100 a second, 50.0 %, 20 s left"

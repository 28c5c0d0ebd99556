import pytest

from tinsmith.core.errors import Stopped
from tinsmith.core.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told to."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_progress_prints_percentage_speed_and_eta_every_five_seconds(clock):
    output = []
    progress = Progress("encoding x", 1000, output.append)
    for _ in range(12):
        clock(1)
        progress.advance(10)
    assert output == [
        " prepare   encoding x:   5%  10 B/s  eta 1m35s",
        " prepare   encoding x:  10%  10 B/s  eta 1m30s",
    ]


def test_progress_without_a_total_prints_the_amount_done(clock):
    output = []
    progress = Progress("reading x", None, output.append)
    clock(10)
    progress.advance(2_000_000)
    assert output == [" prepare   reading x: 2 MB  200 kB/s"]


def test_a_stop_request_raises_at_the_next_advance(clock):
    progress = Progress("reading x", None, print, stop=lambda: True)
    with pytest.raises(Stopped) as caught:
        progress.advance(1)
    assert caught.value.code == 75

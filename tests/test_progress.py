import io
import sys

import pytest

from ride_timm.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "seconds"), [(Terminal, 0.5), (io.StringIO, 30)], ids=["terminal", "log"])
def test_a_log_is_not_filled_with_bars(monkeypatch, stream, seconds):
    monkeypatch.setattr(sys, "stderr", stream())
    with progress_bar(range(3), desc="reading") as bar:
        assert list(bar) == [0, 1, 2] and bar.mininterval == seconds
    assert "reading: 100%" in sys.stderr.getvalue()

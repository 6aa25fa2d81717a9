"""What the tests of hub/ share: its modules, which lie beside the package, and the double of the Hub."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / "hub"), str(HERE)]

# the clients of the Hub freeze its address when they are imported: these tests run in a process of their own
collect_ignore = [] if os.environ.get("RIDE_TIMM_LOOPBACK") else ["loopback"]

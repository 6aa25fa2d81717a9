"""python -m ride_timm evaluate | predict | demo | export | merge | flops | datasets | models | sweep"""

import sys

from .cli.main import main
from .cli.process import exit_code


def run() -> int:
    """Exit code of one command; the console script `ride-timm` starts here, too."""
    return exit_code(main, None)


if __name__ == "__main__":
    sys.exit(run())

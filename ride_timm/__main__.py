"""python -m ride_timm evaluate | predict | export | flops | datasets | models | sweep"""

import sys

from .cli.main import main
from .cli.process import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main, None))

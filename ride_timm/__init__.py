"""RIDE for timm: `import ride_timm` registers the `ride_*` models."""

from .errors import InputError, RunError
from .models import Ride, Router, load_legacy

__version__ = "0.1.0"
__all__ = ["InputError", "Ride", "Router", "RunError", "__version__", "load_legacy"]

"""The commands of `python -m ride_timm`."""

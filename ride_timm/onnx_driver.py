"""Public name of the driver of routed ONNX exports."""

from .inference.onnx_driver import OnnxRouted, load_session

__all__ = ["OnnxRouted", "load_session"]

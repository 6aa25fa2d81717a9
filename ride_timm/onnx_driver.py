"""The driver of routed ONNX exports under its public name."""

from .inference.onnx_driver import OnnxRouted, load_session

__all__ = ["OnnxRouted", "load_session"]

"""Run a trained model: load, fast inference options, ONNX export."""

"""ONNX graphs: tracing a model, and rewriting what was traced."""

"""The Phoenix inference server: Open Inference Protocol v2 over REST and gRPC on ONNX Runtime."""

__version__ = "0.1.0"

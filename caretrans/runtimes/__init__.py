"""Runtimes that both benchmarks and exports use: torch.export, ONNX Runtime, OpenVINO."""

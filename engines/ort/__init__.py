"""ONNX Runtime, and its own copy of a segment's graph."""

"""OpenVINO, on the CPU: the segments as they are, in single precision or in bfloat16."""

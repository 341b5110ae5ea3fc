"""TensorRT and TensorRT-RTX: compiling, running, and what is kept between builds and runs."""

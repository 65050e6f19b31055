"""The CUDA kernels on the CPU: the same sources, compiled with the host's C++ compiler."""

"""A strict simulated CuPy: CUDA devices made of host memory, their queued work run late and in hostile orders."""

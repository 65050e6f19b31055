"""Where arrays live and how their bytes are reached: the host, or a CUDA device through CuPy."""

from gpusaver.device.admission import HOST, Admitted, admit, cuda_module, known_dtype
from gpusaver.device.base import Event, HostBuffer, Runtime, Transfer

__all__ = ["HOST", "Admitted", "Event", "HostBuffer", "Runtime", "Transfer", "admit", "cuda_module", "known_dtype"]

"""Looks into a network that somebody has published as a TensorFlow SavedModel, and writes it as safetensors.

    python examples/published_network.py basic_pitch/saved_models/icassp_2022/nmp network.safetensors

Neither TensorFlow nor safetensors is needed. `gpusaver show` and `gpusaver convert` do the same from the command line.
"""

from __future__ import annotations

import sys

import gpusaver
from gpusaver.conversion import convert


def main(model: str, destination: str) -> None:
    problems = list(gpusaver.verify(f"{model}/variables/variables"))
    if problems:
        raise SystemExit("\n".join(map(str, problems)))
    reader = gpusaver.load_checkpoint(f"{model}/variables/variables")
    dtypes = reader.get_variable_to_dtype_map()
    arrays = {name: reader.get_tensor(name) for name in reader if dtypes[name].name != "string"}
    largest = sorted(arrays, key=lambda name: -arrays[name].nbytes)
    print(f"{len(arrays)} tensors, {sum(array.nbytes for array in arrays.values()):,} bytes; the largest:")
    for name in largest[:5]:
        print(f"  {arrays[name].nbytes:>10,}  {arrays[name].dtype}{list(arrays[name].shape)}  {name}")
    done = convert(model, destination)
    print(f"{destination}: {done.tensors} tensors; left out: {', '.join(done.left_out) or 'nothing'}")


if __name__ == "__main__":
    main(*sys.argv[1:])

// The update of an optimizer step, as gpu_state.py needs one: every 32-bit word of every array changes, whatever it
// stands for, in one launch, as fused optimizers do it. Words of a tile: tiles[2 * i] is its address, [2 * i + 1] their
// number.

extern "C" __global__ void change(const unsigned long long* tiles) {
    unsigned int* words = reinterpret_cast<unsigned int*>(tiles[2 * blockIdx.x]);
    unsigned int count = static_cast<unsigned int>(tiles[2 * blockIdx.x + 1]);
    for (unsigned int i = threadIdx.x; i < count; i += blockDim.x) {
        words[i] = words[i] * 1664525u + 1013904223u + i + blockIdx.x;
    }
}

// What the kernels use of CUDA C++, for a host compiler. The threads of a block take turns; see shim.cpp.
#pragma once

#define __device__
#define __global__
#define __host__
#define __launch_bounds__(threads)
#define __shared__ static __attribute__((section("shared")))  // one block runs at a time

struct Index {
    unsigned x, y, z;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

void __syncthreads();
unsigned __shfl_xor_sync(unsigned mask, unsigned value, int lane_mask);

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift)
{
    return static_cast<unsigned>((static_cast<unsigned long long>(high) << 32 | low) >> shift % 32);
}

template <class Value>
Value __ldg(const Value* address)
{
    return *address;
}

inline unsigned atomicXor(unsigned* address, unsigned value)
{
    unsigned before = *address;
    *address ^= value;
    return before;
}

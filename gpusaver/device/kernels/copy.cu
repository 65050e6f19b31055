// Copies between arrays and an image of a part of a data file, bytes at any address on either side.
//
//     image    | piece | gap |    piece    | piece |      contiguous parts of arrays: gather and scatter copy one
//               tile          tile . tile    tile         tile per block, thousands of them in one launch
//
//     head     bytes up to the target's next multiple of 16, one thread each
//     body     16 bytes a thread and turn, stored at once; loaded at once where the source is aligned alike, else from
//              the four or five aligned 32-bit words that they lie in, shifted into place
//     tail     up to 15 bytes, one thread each
//
// An access of n bytes at an address that n does not divide is a fault that ends the process' use of the device. The
// words that are loaded for shifting all hold a byte of the piece, so none of them leaves the memory that it lies in.
//
// The host cuts the pieces into tiles rather than have each block search for its own: 24 bytes a tile, one load that
// depends on nothing, against a chain of up to 16 dependent loads.
//
// gather_strided and scatter_strided move one array that is not contiguous. Its row-major form is seen as units of 1,
// 2, 4, 8 or 16 bytes, the widest to which everything is aligned, and at most eight dimensions, the innermost first.
//
// Compiled by NVRTC, which has no headers: nothing is included.

typedef unsigned char Byte;
typedef unsigned long long Address;

constexpr unsigned THREADS = 256;  // a block
constexpr unsigned VECTORS = 8;    // a thread, all loaded before the first is stored
constexpr unsigned DIMS = 8;
constexpr unsigned UNITS = 4;  // a thread
constexpr unsigned TILE_UNITS = THREADS * UNITS;

struct Tile {
    Address array;
    unsigned long long offset;  // in the image
    unsigned long long nbytes;  // at most 16 * VECTORS * THREADS
};

// The 16 bytes that begin `shift` bits into the first of the given words.
__device__ inline uint4 shifted(const unsigned* words, unsigned shift)
{
    unsigned first = __ldg(words), second = __ldg(words + 1), third = __ldg(words + 2), fourth = __ldg(words + 3);
    unsigned fifth = shift ? __ldg(words + 4) : 0;  // without a shift it may be another allocation's
    return uint4{
        __funnelshift_r(first, second, shift),
        __funnelshift_r(second, third, shift),
        __funnelshift_r(third, fourth, shift),
        __funnelshift_r(fourth, fifth, shift),
    };
}

__device__ inline void copy(Byte* __restrict__ target, const Byte* __restrict__ source, unsigned nbytes)
{
    unsigned to_boundary = -static_cast<unsigned>(reinterpret_cast<Address>(target)) % 16;
    unsigned head = to_boundary < nbytes ? to_boundary : nbytes;
    unsigned vectors = (nbytes - head) / 16;
    unsigned tail = head + 16 * vectors;
    unsigned thread = threadIdx.x;
    if (thread < head)
        target[thread] = source[thread];
    if (thread < nbytes - tail)
        target[tail + thread] = source[tail + thread];

    uint4* body = reinterpret_cast<uint4*>(target + head);
    Address from = reinterpret_cast<Address>(source + head);
    const uint4* alike = reinterpret_cast<const uint4*>(from);
    const unsigned* words = reinterpret_cast<const unsigned*>(from / 4 * 4);
    unsigned shift = from % 4 * 8;
    uint4 held[VECTORS];
    if (from % 16 == 0) {
#pragma unroll
        for (unsigned turn = 0; turn < VECTORS; ++turn)
            if (unsigned vector = turn * THREADS + thread; vector < vectors)
                held[turn] = __ldg(alike + vector);
    } else {
#pragma unroll
        for (unsigned turn = 0; turn < VECTORS; ++turn)
            if (unsigned vector = turn * THREADS + thread; vector < vectors)
                held[turn] = shifted(words + 4 * vector, shift);
    }
#pragma unroll
    for (unsigned turn = 0; turn < VECTORS; ++turn)
        if (unsigned vector = turn * THREADS + thread; vector < vectors)
            body[vector] = held[turn];
}

extern "C" __global__ void __launch_bounds__(THREADS) gather(const Tile* tiles, Byte* image)
{
    Tile tile = tiles[blockIdx.x];
    copy(image + tile.offset, reinterpret_cast<const Byte*>(tile.array), static_cast<unsigned>(tile.nbytes));
}

extern "C" __global__ void __launch_bounds__(THREADS) scatter(const Tile* tiles, const Byte* image)
{
    Tile tile = tiles[blockIdx.x];
    copy(reinterpret_cast<Byte*>(tile.array), image + tile.offset, static_cast<unsigned>(tile.nbytes));
}

struct Dimension {
    long long size;
    long long stride;  // in bytes
    long long place;   // the index of the block's first unit
};

// Fills in where the unit with this number is, by a thread for each dimension.
__device__ inline void locate(
    Dimension* dimensions, unsigned long long number, const long long (&sizes)[DIMS], const long long (&strides)[DIMS])
{
    unsigned own = threadIdx.x;
    unsigned long long inner = 1;
    Dimension mine = {1, 0, 0};
#pragma unroll
    for (unsigned dim = 0; dim < DIMS; ++dim) {
        if (dim < own)
            inner *= sizes[dim];
        if (dim == own)
            mine = {sizes[dim], strides[dim], 0};
    }
    if (own < DIMS) {
        mine.place = number / inner % mine.size;
        dimensions[own] = mine;
    }
    __syncthreads();
}

// Moves the units of one block, the first `count` of them; `flat` is where the first one goes or comes from.
template <bool TO_ARRAY, class Unit>
__device__ inline void move(Byte* array, Unit* flat, long long count, const Dimension* dimensions, unsigned dims)
{
    long long carry[UNITS];
    long long offset[UNITS];
#pragma unroll
    for (unsigned turn = 0; turn < UNITS; ++turn) {
        carry[turn] = turn * THREADS + threadIdx.x;
        offset[turn] = 0;
    }
    for (unsigned dim = 0; dim < dims; ++dim) {
        Dimension at = dimensions[dim];
#pragma unroll
        for (unsigned turn = 0; turn < UNITS; ++turn) {
            long long index = at.place + carry[turn];
            if (index < at.size) {
                carry[turn] = 0;
            } else if (at.size > TILE_UNITS) {
                carry[turn] = 1;
                index -= at.size;
            } else {  // both below 2^32, and 64 bits take four times as long to divide
                carry[turn] = static_cast<unsigned>(index) / static_cast<unsigned>(at.size);
                index -= carry[turn] * at.size;
            }
            offset[turn] += index * at.stride;
        }
    }
    Unit held[UNITS];
#pragma unroll
    for (unsigned turn = 0; turn < UNITS; ++turn)
        if (unsigned unit = turn * THREADS + threadIdx.x; unit < count)
            held[turn] = TO_ARRAY ? flat[unit] : *reinterpret_cast<Unit*>(array + offset[turn]);
#pragma unroll
    for (unsigned turn = 0; turn < UNITS; ++turn)
        if (unsigned unit = turn * THREADS + threadIdx.x; unit < count)
            (TO_ARRAY ? *reinterpret_cast<Unit*>(array + offset[turn]) : flat[unit]) = held[turn];
}

// Units [first, first + count) of the array's row-major form, the first of which is at `flat`; sizes and strides are
// those of the units. Requires: what is not among the first `dims` sizes is 1.
template <bool TO_ARRAY>
__device__ inline void move_units(
    Byte* array, Byte* flat, long long first, long long count, unsigned unit_nbytes, unsigned dims,
    const long long (&sizes)[DIMS], const long long (&strides)[DIMS])
{
    __shared__ Dimension dimensions[DIMS];
    long long done = static_cast<long long>(blockIdx.x) * TILE_UNITS;
    locate(dimensions, first + done, sizes, strides);
    flat += done * unit_nbytes;
    count -= done;
    switch (unit_nbytes) {
    case 1: return move<TO_ARRAY>(array, reinterpret_cast<unsigned char*>(flat), count, dimensions, dims);
    case 2: return move<TO_ARRAY>(array, reinterpret_cast<unsigned short*>(flat), count, dimensions, dims);
    case 4: return move<TO_ARRAY>(array, reinterpret_cast<unsigned*>(flat), count, dimensions, dims);
    case 8: return move<TO_ARRAY>(array, reinterpret_cast<uint2*>(flat), count, dimensions, dims);
    default: return move<TO_ARRAY>(array, reinterpret_cast<uint4*>(flat), count, dimensions, dims);
    }
}

#define DIMENSIONS                                                                                                   \
    long long n0, long long n1, long long n2, long long n3, long long n4, long long n5, long long n6, long long n7,  \
    long long s0, long long s1, long long s2, long long s3, long long s4, long long s5, long long s6, long long s7

extern "C" __global__ void __launch_bounds__(THREADS) gather_strided(
    Byte* array, Byte* flat, long long first, long long count, unsigned unit_nbytes, unsigned dims, DIMENSIONS)
{
    long long sizes[] = {n0, n1, n2, n3, n4, n5, n6, n7};
    long long strides[] = {s0, s1, s2, s3, s4, s5, s6, s7};
    move_units<false>(array, flat, first, count, unit_nbytes, dims, sizes, strides);
}

extern "C" __global__ void __launch_bounds__(THREADS) scatter_strided(
    Byte* array, Byte* flat, long long first, long long count, unsigned unit_nbytes, unsigned dims, DIMENSIONS)
{
    long long sizes[] = {n0, n1, n2, n3, n4, n5, n6, n7};
    long long strides[] = {s0, s1, s2, s3, s4, s5, s6, s7};
    move_units<true>(array, flat, first, count, unit_nbytes, dims, sizes, strides);
}

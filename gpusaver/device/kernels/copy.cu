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

constexpr unsigned THREADS = 256;
constexpr unsigned VECTORS = 8;                            // a thread, and in flight before the first store
constexpr unsigned TILE_NBYTES = THREADS * VECTORS * 16;  // cuda_kernels.py cuts to this
constexpr unsigned DIMS = 8;
constexpr unsigned UNITS = 4;  // a thread
constexpr unsigned TILE_UNITS = THREADS * UNITS;

struct Tile {
    Address array;
    unsigned long long offset;  // in the image
    unsigned long long nbytes;  // at most TILE_NBYTES
};

// The 16 bytes that begin `shift` bits into the first of the given words.
__device__ inline uint4 shifted(const unsigned* words, unsigned shift)
{
    unsigned last = shift ? words[4] : 0;  // without a shift it may be another allocation's
    return uint4{
        __funnelshift_r(words[0], words[1], shift),
        __funnelshift_r(words[1], words[2], shift),
        __funnelshift_r(words[2], words[3], shift),
        __funnelshift_r(words[3], last, shift),
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
                held[turn] = alike[vector];
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

// How many units of the array lie before, in each dimension, the one that is `local` units after `start`.
// Requires: local < TILE_UNITS.
__device__ inline long long offset_of(
    const long long* start, unsigned local, const long long (&sizes)[DIMS], const long long (&strides)[DIMS])
{
    long long offset = 0;
    long long carry = local;
#pragma unroll
    for (unsigned dim = 0; dim < DIMS; ++dim) {
        long long place = start[dim] + carry;
        if (place < sizes[dim]) {
            carry = 0;
        } else if (sizes[dim] > TILE_UNITS) {
            place -= sizes[dim];
            carry = 1;
        } else {  // both are small, and dividing 64 bits takes four times as long
            carry = static_cast<unsigned>(place) / static_cast<unsigned>(sizes[dim]);
            place -= carry * sizes[dim];
        }
        offset += place * strides[dim];
    }
    return offset;
}

// CRC-32C of many pieces of device memory, the value that gpusaver.bundle.crc.crc32c gives for each.
//
//     piece    |  part 0   | part 1 | part 2 |              cut from its end, so that all but the first have one size
//
//     part     |  ..aaaa|aaaa|aaaa|aa.. |                   a warp takes one, in rows of 512 bytes counted from its
//                   row   row  row  row                     end, 16 bytes = 4 words a lane; padding counts as zeros
//
// A message is a polynomial over GF(2) and its checksum the remainder of message * x^32, so it is linear: a word may be
// replaced by anything congruent. Each lane folds the words of one column from row to row:
//
//     sum = sum * x^4096 + word     modulo the polynomial of CRC-32C (4096 bits are a row)
//
// At the end the sum of column c is multiplied by x^(32 (128 - c)), the lanes' are added, and the total is multiplied
// by x^(the bits that follow in the piece). Zeros before a message change nothing, and zeros after it are undone by a
// negative power: x^(2^31 - 1) = 1, so every power is one with an exponent below that. The parts' results are added in
// place (atomicXor), in any order.
//
// Multiplying by x^4096 is a table lookup: the sum's bits are cut into groups of 6, 6, 5, 5, 5 and 5, which takes 256
// entries in all. Each has a copy per bank of shared memory, 32 KiB, so that the 32 lanes never wait for each other.
//
// Estimate, not measured: per word of its lanes a warp makes 6 lookups at 1 a cycle, 13 operations at 2 a cycle (4
// shifts, 6 masks, 3 exclusive ors of three) and 2 shifts that the compiler turns into multiplications: 6.5 cycles for
// 128 bytes, or 19.7 bytes a cycle and multiprocessor. 132 of them at 1.755 GHz: 4.6 TB/s, about what the memory of an
// H200 delivers. The ends of a part cost as much as 25 rows, and 64 KiB have 128: 3.8 TB/s.
//
// Considered: four tables for 8 bits each without copies (4 KiB, but bank conflicts make it 14 cycles); 32 copies of
// them (5 cycles, but 128 KiB: one block a multiprocessor, and a launch attribute); dividing by the polynomial in
// x^4096 instead of x, bit-sliced in 32 registers without a table (4.3 cycles, but it leaves 32 rows for the tables).
//
// All polynomials are reflected, as the checksum is: bit 31 is the coefficient of x^0, and a little-endian word of the
// message has its first byte where the highest powers are.
//
// Compiled by NVRTC, which has no headers: nothing is included.

typedef unsigned long long Address;

constexpr unsigned POLYNOMIAL = 0x82f63b78u;
constexpr unsigned ONE = 1u << 31;

constexpr unsigned LANES = 32;
constexpr unsigned WARPS = 8;  // a block is LANES x WARPS threads: threadIdx.x is the lane
constexpr unsigned ROW_NBYTES = 16 * LANES;
constexpr unsigned ROWS_IN_FLIGHT = 4;
constexpr unsigned ENTRIES = 256;
constexpr unsigned ENTRY_NBYTES = 4 * LANES;

struct Part {
    Address address;
    unsigned nbytes;    // at least 4, unless it is the whole piece; at most 2^31
    unsigned exponent;  // the power of x that the part's own result, padded to a multiple of 16, is multiplied by
    unsigned piece;
    unsigned flips;  // how many of its first bytes are complemented: the four of the piece, or fewer if it has fewer
};

__host__ __device__ constexpr unsigned times_x(unsigned a)
{
    return a >> 1 ^ (a & 1 ? POLYNOMIAL : 0);
}

__host__ __device__ constexpr unsigned multiply(unsigned a, unsigned b)
{
    unsigned product = 0;
    for (unsigned bit = 0; bit < 32; ++bit)
        product = times_x(product) ^ (a >> bit & 1 ? b : 0);
    return product;
}

struct Constants {
    unsigned row[32];            // bit * x^4096, per bit of a word
    unsigned column[4 * LANES];  // x^(32 (128 - column))
    unsigned power[8][16];       // x^(digit 16^place), per place and digit
};

constexpr Constants make_constants()
{
    Constants made{};
    unsigned base = ONE >> 1;
    for (unsigned place = 0; place < 8; ++place) {
        unsigned power = ONE;
        for (unsigned digit = 0; digit < 16; ++digit, power = multiply(power, base))
            made.power[place][digit] = power;
        base = power;
    }
    unsigned power = ONE;
    unsigned word = made.power[1][2];
    for (unsigned column = 4 * LANES; column-- > 0;)
        made.column[column] = power = multiply(power, word);
    for (unsigned bit = 0; bit < 32; ++bit)
        made.row[bit] = multiply(1u << bit, power);
    return made;
}

__device__ const Constants CONSTANTS = make_constants();

// The bits of a sum in groups, each looked up in its part of the table. A group begins at this bit.
__host__ __device__ constexpr unsigned group_bit(unsigned group)
{
    return group < 2 ? 6 * group : 5 * group + 2;
}

__host__ __device__ constexpr unsigned group_entry(unsigned group)
{
    return group < 2 ? 64 * group : 64 + 32 * group;
}

__device__ inline void fill(unsigned* table)
{
    static_assert(LANES * WARPS == ENTRIES, "a thread makes one entry");
    unsigned entry = threadIdx.y * LANES + threadIdx.x;
    unsigned group = entry < 128 ? entry / 64 : entry / 32 - 2;
    unsigned value = 0;
    for (unsigned bit = 0; bit < 6; ++bit)
        if ((entry - group_entry(group)) >> bit & 1)
            value ^= CONSTANTS.row[group_bit(group) + bit];
    for (unsigned copy = 0; copy < LANES; ++copy)  // begun at different banks, or all lanes would use the same
        table[entry * LANES + (entry + copy) % LANES] = value;
    __syncthreads();
}

// `column` is where in an entry the lane's copy is, in bytes: with it the address takes a shift and one operation more.
template <unsigned GROUP>
__device__ inline unsigned lookup(const unsigned* table, unsigned sum, unsigned column)
{
    constexpr unsigned bit = group_bit(GROUP);
    constexpr unsigned mask = (group_entry(GROUP + 1) - group_entry(GROUP) - 1) * ENTRY_NBYTES;
    unsigned entry = bit < 7 ? sum << (7 - bit) % 32 : sum >> (bit - 7) % 32;  // times ENTRY_NBYTES
    const char* group = reinterpret_cast<const char*>(table) + group_entry(GROUP) * ENTRY_NBYTES;
    return *reinterpret_cast<const unsigned*>(group + ((entry & mask) | column));
}

__device__ inline unsigned fold(const unsigned* table, unsigned sum, unsigned word, unsigned column)
{
    return lookup<0>(table, sum, column) ^ lookup<1>(table, sum, column) ^ lookup<2>(table, sum, column)
        ^ lookup<3>(table, sum, column) ^ lookup<4>(table, sum, column) ^ lookup<5>(table, sum, column) ^ word;
}

__device__ inline void fold(const unsigned* table, uint4& sums, uint4 words, unsigned column)
{
    sums.x = fold(table, sums.x, words.x, column);
    sums.y = fold(table, sums.y, words.y, column);
    sums.z = fold(table, sums.z, words.z, column);
    sums.w = fold(table, sums.w, words.w, column);
}

// Ones in those bytes of the word at `word` that lie in [begin, end).
__device__ inline unsigned bytes_within(Address word, Address begin, Address end)
{
    if (end <= word || begin >= word + 4 || end <= begin)
        return 0;
    unsigned before = begin > word ? static_cast<unsigned>(begin - word) : 0;
    unsigned after = end < word + 4 ? static_cast<unsigned>(word + 4 - end) : 0;
    return ~0u << 8 * before & ~0u >> 8 * after;
}

__device__ inline unsigned edge_word(Address word, Address begin, Address end, unsigned flips)
{
    unsigned ours = bytes_within(word, begin, end);
    unsigned value = ours ? __ldg(reinterpret_cast<const unsigned*>(word)) & ours : 0;
    return value ^ bytes_within(word, begin, begin + flips);
}

// The 16 bytes at a vector that may lie partly, or not at all, in the part.
__device__ inline uint4 edge(Address vector, Address begin, Address end, unsigned flips)
{
    return uint4{
        edge_word(vector, begin, end, flips),
        edge_word(vector + 4, begin, end, flips),
        edge_word(vector + 8, begin, end, flips),
        edge_word(vector + 12, begin, end, flips),
    };
}

// Folds whole rows; `vector` is the lane's in the first one. Requires: rows is a positive multiple of ROWS_IN_FLIGHT.
__device__ inline void fold_inner(const unsigned* table, uint4& sums, Address vector, unsigned rows, unsigned column)
{
    uint4 held[ROWS_IN_FLIGHT];
#pragma unroll
    for (unsigned row = 0; row < ROWS_IN_FLIGHT; ++row)
        held[row] = __ldg(reinterpret_cast<const uint4*>(vector + row * ROW_NBYTES));
    for (; rows; rows -= ROWS_IN_FLIGHT) {
        vector += ROWS_IN_FLIGHT * ROW_NBYTES;
#pragma unroll
        for (unsigned row = 0; row < ROWS_IN_FLIGHT; ++row) {
            fold(table, sums, held[row], column);
            // Loaded a turn before it is used, or the compiler would have each row wait for its own load.
            if (rows > ROWS_IN_FLIGHT)
                held[row] = __ldg(reinterpret_cast<const uint4*>(vector + row * ROW_NBYTES));
        }
    }
}

// The sums of the four columns of this lane.
__device__ inline uint4 fold_part(const unsigned* table, const Part& part)
{
    unsigned column = threadIdx.x * 4;
    Address end = part.address + part.nbytes;
    Address padded_end = (end + 15) / 16 * 16;
    unsigned rows = static_cast<unsigned>(padded_end - part.address + ROW_NBYTES - 1) / ROW_NBYTES;
    Address vector = padded_end - static_cast<Address>(rows) * ROW_NBYTES + 16 * threadIdx.x;
    uint4 sums = {0, 0, 0, 0};
    for (unsigned row = 0; row < rows; ++row) {
        if (row == 2 && rows > 2 + ROWS_IN_FLIGHT) {  // what is complemented may reach into the second row
            unsigned inner = (rows - 3) / ROWS_IN_FLIGHT * ROWS_IN_FLIGHT;
            fold_inner(table, sums, vector, inner, column);
            vector += static_cast<Address>(inner) * ROW_NBYTES;
            row += inner;
        }
        fold(table, sums, edge(vector, part.address, end, part.flips), column);
        vector += ROW_NBYTES;
    }
    return sums;
}

// The lane's share of the remainder: its sums times the powers that their columns stand for.
__device__ inline unsigned weigh(const uint4& sums)
{
    const unsigned* columns = CONSTANTS.column + 4 * threadIdx.x;
    unsigned first = columns[0], second = columns[1], third = columns[2], fourth = columns[3];
    unsigned total = 0;
    for (unsigned bit = 0; bit < 32; ++bit)
        total = times_x(total) ^ (sums.x >> bit & 1 ? first : 0) ^ (sums.y >> bit & 1 ? second : 0)
            ^ (sums.z >> bit & 1 ? third : 0) ^ (sums.w >> bit & 1 ? fourth : 0);
    return total;
}

// x^exponent: each of eight lanes does one digit, and all get the product.
__device__ inline unsigned power_of_x(unsigned exponent)
{
    unsigned place = threadIdx.x % 8;
    unsigned power = CONSTANTS.power[place][exponent >> 4 * place & 15];
    for (unsigned other = 1; other < 8; other *= 2)
        power = multiply(power, __shfl_xor_sync(~0u, power, other));
    return power;
}

// Adds the parts' results to `checksums`, which begin as initial_checksums in launch_plan.py says.
// Requires: blocks of LANES x WARPS threads, as many as one likes.
extern "C" __global__ void __launch_bounds__(LANES * WARPS) crc32c(
    const Part* parts, unsigned count, unsigned* checksums)
{
    __shared__ unsigned table[ENTRIES * LANES];
    fill(table);
    for (unsigned number = blockIdx.x * WARPS + threadIdx.y; number < count; number += gridDim.x * WARPS) {
        Part part = parts[number];
        unsigned remainder = weigh(fold_part(table, part));
        for (unsigned other = 1; other < LANES; other *= 2)
            remainder ^= __shfl_xor_sync(~0u, remainder, other);
        if (part.exponent)
            remainder = multiply(remainder, power_of_x(part.exponent));
        if (threadIdx.x == 0)
            atomicXor(checksums + part.piece, remainder);
    }
}

// Runs the kernels on the CPU with a GPU's results: one block after the other, and each thread of a block on a fiber of
// its own until it ends or has to wait for others.
//
// Stricter than a GPU in one thing: a barrier that a thread of the block, or of the warp, never comes to ends the
// process with a message.

#include "shim.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include <ucontext.h>

#include <sanitizer/asan_interface.h>

Index threadIdx, blockIdx, blockDim, gridDim;

// Where the linker put all shared memory.
extern "C" char __start_shared[], __stop_shared[];

namespace copy_cu {
#include "copy.cu"
}
namespace crc32c_cu {
#include "crc32c.cu"
}

namespace {

constexpr unsigned WARP = 32;
constexpr size_t STACK_NBYTES = 128 << 10;

enum class State { Ready, AtShuffle, AtBarrier, Ended };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK_NBYTES]};
};

struct Thread {
    State state;
    Fiber* fiber;
    unsigned shuffles;     // how many it has come to
    unsigned given[2];     // to the last one and to the one before, which others may still have to read
};

std::mutex one_launch_at_a_time;
std::function<void()> kernel;
std::vector<Thread> threads;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> idle;
ucontext_t scheduler;
unsigned current;
unsigned started;

void enter(unsigned thread)
{
    current = thread;
    threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y};
}

void wait(State state)
{
    Thread& own = threads[current];
    own.state = state;
    swapcontext(&own.fiber->context, &scheduler);
}

// Takes over thread after thread, so that kernels without barriers switch once a block.
void run_threads(Fiber* own)
{
    while (started < threads.size()) {
        enter(started++);
        threads[current] = {State::Ready, own, 0, {}};
        kernel();
        threads[current].state = State::Ended;
    }
    idle.push_back(own);
}

void begin_fiber(unsigned low, unsigned high)
{
    run_threads(reinterpret_cast<Fiber*>(static_cast<uintptr_t>(high) << 32 | low));
}

Fiber* fresh_fiber()
{
    if (idle.empty()) {
        fibers.push_back(std::make_unique<Fiber>());
        idle.push_back(fibers.back().get());
    }
    Fiber* fiber = idle.back();
    idle.pop_back();
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = STACK_NBYTES;
    fiber->context.uc_link = &scheduler;
    auto address = reinterpret_cast<uintptr_t>(fiber);
    makecontext(
        &fiber->context, reinterpret_cast<void (*)()>(begin_fiber), 2, static_cast<unsigned>(address),
        static_cast<unsigned>(address >> 32));
    return fiber;
}

// Lets the threads [first, last) go on if all of them wait for it.
bool release(unsigned first, unsigned last, State state)
{
    for (unsigned thread = first; thread < last; ++thread)
        if (threads[thread].state != state)
            return false;
    for (unsigned thread = first; thread < last; ++thread) {
        threads[thread].state = State::Ready;
        enter(thread);
        swapcontext(&scheduler, &threads[thread].fiber->context);
    }
    return true;
}

bool all_ended()
{
    for (const Thread& thread : threads)
        if (thread.state != State::Ended)
            return false;
    return true;
}

void run_block()
{
    std::memset(__start_shared, 0xdb, __stop_shared - __start_shared);
    started = 0;
    while (started < threads.size())
        swapcontext(&scheduler, &fresh_fiber()->context);
    while (!all_ended()) {
        unsigned count = static_cast<unsigned>(threads.size());
        bool progressed = release(0, count, State::AtBarrier);
        for (unsigned warp = 0; warp < count; warp += WARP)
            progressed |= release(warp, warp + WARP < count ? warp + WARP : count, State::AtShuffle);
        if (!progressed) {
            std::fprintf(stderr, "kernel shim: a barrier is waited for that not all threads come to\n");
            std::abort();
        }
    }
}

// `shape` is the size of the grid and of a block, three numbers each.
void launch(const unsigned* shape, std::function<void()> body)
{
    std::lock_guard<std::mutex> lock(one_launch_at_a_time);
    gridDim = {shape[0], shape[1], shape[2]};
    blockDim = {shape[3], shape[4], shape[5]};
    kernel = std::move(body);
    threads.assign(blockDim.x * blockDim.y * blockDim.z, Thread{});
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
                run_block();
}

}  // namespace

void __syncthreads()
{
    wait(State::AtBarrier);
}

unsigned __shfl_xor_sync(unsigned, unsigned value, int lane_mask)
{
    unsigned lane = current;
    unsigned turn = threads[lane].shuffles++ % 2;
    threads[lane].given[turn] = value;
    wait(State::AtShuffle);
    return threads[lane ^ lane_mask].given[turn];
}

extern "C" {

extern const unsigned SHIM_TILE_NBYTES = 16 * copy_cu::VECTORS * copy_cu::THREADS;
extern const unsigned SHIM_TILE_UNITS = copy_cu::TILE_UNITS;
extern const unsigned SHIM_MAX_DIMS = copy_cu::DIMS;

void launch_gather(const unsigned* shape, const copy_cu::Tile* tiles, unsigned char* image)
{
    launch(shape, [=] { copy_cu::gather(tiles, image); });
}

void launch_scatter(const unsigned* shape, const copy_cu::Tile* tiles, const unsigned char* image)
{
    launch(shape, [=] { copy_cu::scatter(tiles, image); });
}

#define STRIDED_PARAMETERS                                                                                           \
    const unsigned *shape, unsigned char *array, unsigned char *flat, long long first, long long count,              \
        unsigned unit_nbytes, unsigned dims, DIMENSIONS
#define STRIDED_ARGUMENTS                                                                                            \
    array, flat, first, count, unit_nbytes, dims, n0, n1, n2, n3, n4, n5, n6, n7, s0, s1, s2, s3, s4, s5, s6, s7

void launch_gather_strided(STRIDED_PARAMETERS)
{
    launch(shape, [=] { copy_cu::gather_strided(STRIDED_ARGUMENTS); });
}

void launch_scatter_strided(STRIDED_PARAMETERS)
{
    launch(shape, [=] { copy_cu::scatter_strided(STRIDED_ARGUMENTS); });
}

void launch_crc32c(const unsigned* shape, const crc32c_cu::Part* parts, unsigned count, unsigned* checksums)
{
    launch(shape, [=] { crc32c_cu::crc32c(parts, count, checksums); });
}

// `nbytes` bytes after `skipped` others. AddressSanitizer sees every access beyond them, rounded up to a multiple of 4,
// and those before them, rounded down to a multiple of 8.
unsigned char* allocate(size_t skipped, size_t nbytes)
{
    auto* block = static_cast<unsigned char*>(std::malloc((skipped + nbytes + 3) / 4 * 4));
    ASAN_POISON_MEMORY_REGION(block, skipped / 8 * 8);
    return block + skipped;
}

void release_memory(unsigned char* bytes, size_t skipped)
{
    ASAN_UNPOISON_MEMORY_REGION(bytes - skipped, skipped);
    std::free(bytes - skipped);
}

}  // extern "C"

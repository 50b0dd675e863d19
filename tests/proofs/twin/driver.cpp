// Runs kernels built with shim.hpp: a queue of launches per rank, as many blocks of it resident as a GPU would hold.
//
// A kernel may start when every block of the one before it on its rank has triggered or exited (or, without
// programmatic dependent launch, when that one is complete). Blocks start in the order of their index, while there is
// room. griddepcontrol_wait returns when the kernel before is complete; a kernel is complete when all its blocks
// have exited, their stores have left the buffers, and the kernel before it is complete. A kernel sees what was
// complete when it started even before it waits: the launches of a stream that follow rely on that for their input.
//
// Never instrumented itself: under ThreadSanitizer every fiber is a thread of its own, the driver is one more, switches
// order nothing, and the order that CUDA promises is told by acquire() and release(). Fibers are used again, by a thread drawn at
// random, which orders those two threads though CUDA does not; there are more fibers than needed, so
// that another seed does not order them.
//
// Requests come on stdin, one JSON line answers each on stdout (tests/twin.py). After a failure the process ends.
#include <fcntl.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <queue>
#include <string>
#include <unordered_map>
#include <vector>

#include "shim.hpp"

#ifdef TWIN_TSAN
#include <sanitizer/tsan_interface.h>
static int reports = 0;
extern "C" void __tsan_on_report(void *) { reports++; }
#else
// The same calls, for nothing.
static const int reports = 0;
static void *__tsan_create_fiber(unsigned) { return nullptr; }
static void *__tsan_get_current_fiber() { return nullptr; }
static void __tsan_switch_to_fiber(void *, unsigned) {}
static void __tsan_acquire(void *) {}
static void __tsan_release(void *) {}
#endif

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

typedef void (*Entry)(const void *args);
extern const Entry entries[];      // generated: the kernels by number
extern const unsigned args_bytes;  // generated: sizeof(Args)

namespace {

constexpr u32 WARP = 32, EMPTY = 0xFFFFFFFFu, BUFFERED = 24, LOOKBACK = 64;
constexpr u32 REPORTED = 3;  // words of a Report: code, sequence and tag, zero until they are written
constexpr size_t STACK = 64 << 10;
constexpr u32 SHARED_AT = 1024, UNWRITTEN = 0x7FCDEAD1u;  // where a block's shared memory begins; what nobody wrote there, a NaN
constexpr size_t SHARED = 64 << 20;                       // bytes of it that a run has in all: none is used again

struct Fiber;

// Waiting and release of the threads of a warp or a block. Two objects in turn: who is early at the next barrier does
// not yet order who is late in leaving this one.
struct Barrier {
    u32 live = 0, turn = 0;
    const char *what = nullptr;                  // in which operation threads meet
    bool all = true, outcome[2] = {true, true};  // votes
    u32 word[2][WARP], told[2] = {0, 0};         // of each lane that has told one
    u32 count[2] = {0, 0};                       // of those that met
    std::vector<Fiber *> arrived;
    char order[2] = {0, 0};
};

struct Store {
    u64 address, value;
    u32 nbytes;
    bool packet;
    u64 number;
};

struct Kernel;
struct Block;

// Blocks that are resident together, and the barrier of their threads.
struct Cluster {
    std::vector<Block *> blocks;  // null once they have ended
    u32 threads, arrived = 0, turn = 0;
    std::vector<Fiber *> waiting;
};

// In a block's shared memory, for one phase.
struct Mbarrier {
    u32 at, due;  // its place; bytes that have not come
    std::vector<Fiber *> waiting;
    char order = 0;
};

struct Block {
    Kernel *kernel;
    u32 index, live;
    bool triggered = false, dirty = false;
    u32 *shared = nullptr, words = 0;  // once some thread has begun
    std::shared_ptr<Cluster> cluster;
    std::deque<Mbarrier> mbarriers;
    Barrier all;
    std::vector<Barrier> warps;
    std::vector<Store> stores;
};

struct Kernel {
    u32 rank, grid, block, cluster;
    bool dependent;  // programmatic dependent launch
    Entry entry;
    std::vector<char> args;
    u32 started = 0, triggered = 0, drained = 0;
    bool complete = false, waited = false;
    char order = 0, start = 0;
};

struct Rank {
    std::deque<Kernel> stream;
    size_t completed = 0, started = 0;  // kernels
    u32 resident = 0;                   // threads
    std::vector<Fiber *> runnable, waiting;
    void *context = nullptr;            // ThreadSanitizer's, of the stream itself
    char order = 0;
};

struct Fiber {
    void *registers[5];
    twin::Lane lane;
    Block *block = nullptr;
    void *context = nullptr;
    u32 position = 0;                // among the runnable of its rank
    u64 polled = 0, ticket = 0;      // the packet that it waits for; counts the times that it fell asleep
    bool fenced = false, arrived = false;  // at the cluster's barrier
    u32 turn = 0;
    u64 since_fence[LOOKBACK];
    u32 loads = 0;
    ucontext_t start;
};

struct Sleeper {
    u64 until, ticket;
    Fiber *fiber;
    bool operator<(const Sleeper &other) const { return until > other.until; }
};

struct Slots {
    u64 begin, end;
    u32 owner, header;  // bytes before the slots, which peers write as well; first among them the word that stops the owner
};

struct Poke {  // the host writes a word
    u64 step, address;
    u32 value, reserved;
};

// What Python sends: this, then launches, each followed by its Args, slots, pokes, addresses of reports and of pages that nobody may touch.
struct Request {
    u64 seed, patience;  // steps without progress that count as a hang
    u64 tick;            // nanoseconds of a step
    u32 ranks, room;     // threads resident on a rank
    u32 yield, sleep;    // chances of 65536 that an access yields, and that it sleeps
    u32 launches, slots, pokes, reports, holes, page;
    u32 poisoned, reserved;  // whether an empty slot is known by what it holds
};

struct LaunchRequest {
    u32 rank, kernel, grid, block, dependent, cluster;
};

Request request;
std::vector<Rank> ranks;
std::vector<Slots> slots;
std::vector<Poke> pokes;
std::vector<u64> report_addresses;
std::vector<std::vector<u32>> first_reports;
std::vector<Fiber *> idle;
std::vector<Block *> dirty;
std::priority_queue<Sleeper> sleepers;
std::unordered_map<u64, Fiber *> pollers;  // by packet
Fiber host;
Fiber *current = &host;
ucontext_t creator;
u64 state, now, progress, mood_until, store_number, pushes, switches;
u32 favoured;
size_t unfinished, fibers;
char launch_order;
u32 *shared_words;
size_t shared_used;

u64 draw() {  // xorshift64*
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 2685821657736338717ull;
}

u32 below(u32 n) { return u32((draw() >> 32) * n >> 32); }

// While it lives, ThreadSanitizer takes what happens for the driver's doing.
struct Driver {
    Driver() { __tsan_switch_to_fiber(host.context, 1); }
    ~Driver() { __tsan_switch_to_fiber(current->context, 1); }
};

void acquire(void *context, void *object) {
    __tsan_switch_to_fiber(context, 1);
    __tsan_acquire(object);
    __tsan_switch_to_fiber(host.context, 1);
}

void release(void *context, void *object) {
    __tsan_switch_to_fiber(context, 1);
    __tsan_release(object);
    __tsan_switch_to_fiber(host.context, 1);
}

[[noreturn]] void fail(const char *kind, const std::string &text) {
    std::printf("{\"status\": \"%s\", \"text\": \"%s\", \"steps\": %llu, \"reports\": %d}\n", kind, text.c_str(), now, reports);
    std::fflush(stdout);
    _exit(3);
}

const Slots *slots_of(u64 address) {
    auto after = std::upper_bound(slots.begin(), slots.end(), address, [](u64 a, const Slots &s) { return a < s.begin; });
    return after != slots.begin() && address < after[-1].end ? &after[-1] : nullptr;
}

// The protocol's invariant, at every word that reaches a slot.
void check_slot(u64 address, u32 value, u32 rank) {
    const Slots *s = request.poisoned ? slots_of(address) : nullptr;
    if (!s) return;
    const bool push = value != EMPTY;
    pushes += push;
    if (push ? *reinterpret_cast<u32 *>(address) == EMPTY : s->owner == rank) return;
    fail(push ? "overwritten" : "foreign poison", "rank " + std::to_string(rank) + (push ? " pushes to unread word " : " poisons word ")
        + std::to_string((address - s->begin) / 4) + " of the slots of rank " + std::to_string(s->owner));
}

void make_runnable(Fiber *fiber) {
    auto &runnable = ranks[fiber->block->kernel->rank].runnable;
    fiber->position = runnable.size();
    runnable.push_back(fiber);
}

void park() {
    auto &runnable = ranks[current->block->kernel->rank].runnable;
    runnable[current->position] = runnable.back();
    runnable[current->position]->position = current->position;
    runnable.pop_back();
}

void wake(Fiber *fiber) {
    fiber->ticket++;
    if (fiber->polled) pollers.erase(fiber->polled);
    fiber->polled = 0;
    make_runnable(fiber);
}

// A word of a packet has changed: its poller looks when the packet is whole, and sometimes before.
void changed(u64 address) {
    progress = now;
    const auto found = pollers.find(address / 16);
    if (found == pollers.end()) return;
    const u32 *w = reinterpret_cast<const u32 *>(address / 16 * 16);
    if ((w[0] != EMPTY && w[1] != EMPTY && w[2] != EMPTY && w[3] != EMPTY) || below(4) == 0) wake(found->second);
}

void commit(Block &block, size_t i) {
    for (size_t j = 0; j < i; j++)
        if (block.stores[j].address == block.stores[i].address) i = j;
    const Store s = block.stores[i];
    block.stores.erase(block.stores.begin() + i);
    if (s.packet) check_slot(s.address, s.value, block.kernel->rank);
    if (s.nbytes == 4) __atomic_store_n(reinterpret_cast<u32 *>(s.address), u32(s.value), __ATOMIC_RELAXED);
    else __atomic_store_n(reinterpret_cast<u64 *>(s.address), s.value, __ATOMIC_RELAXED);
    changed(s.address);
}

void advance(Rank &rank);

void trigger(Block &block) {
    if (block.triggered) return;
    block.triggered = true;
    block.kernel->triggered++;
    advance(ranks[block.kernel->rank]);
}

// All threads of a block have exited, and its last store has become visible.
void drained(Block *block) {
    Kernel &kernel = *block->kernel;
    Rank &rank = ranks[kernel.rank];
    kernel.drained++;
    delete block;
    while (rank.completed < rank.stream.size()) {
        Kernel &next = rank.stream[rank.completed];
        if (next.drained < next.grid) break;
        // Then whoever waits for it waits for all before it, too.
        if (next.dependent && !next.waited) fail("unordered", "a kernel ended none of whose threads has waited for the kernel before");
        next.complete = true;
        rank.completed++;
        unfinished--;
        acquire(rank.context, &next.order);
        release(rank.context, &rank.order);
        // Wakes everybody who waits; who waits for a later kernel goes back to waiting.
        for (Fiber *fiber : rank.waiting) make_runnable(fiber);
        rank.waiting.clear();
    }
    advance(rank);
}

void drain_one() {
    const size_t i = below(dirty.size());
    Block *block = dirty[i];
    if (!block->stores.empty()) commit(*block, below(block->stores.size()));
    if (!block->stores.empty()) return;
    dirty[i] = dirty.back();
    dirty.pop_back();
    block->dirty = false;
    if (!block->live) drained(block);
}

__attribute__((noinline)) void jump(Fiber *to) { __builtin_longjmp(to->registers, 1); }

__attribute__((noinline)) void switch_to(Fiber *to) {
    Fiber *from = current;
    if (from == to) return;
    switches++;
    current = to;
    twin::lane = &to->lane;
    if (__builtin_setjmp(from->registers) == 0) jump(to);
}

// Every now and then some ranks stand still, or all but one.
void change_mood() {
    const u32 all = (1u << ranks.size()) - 1, one = 1u << below(ranks.size());
    favoured = below(2) ? all : below(2) ? all & ~one : one;
    mood_until = now + (1ull << below(13));
}

void look_at_reports() {
    for (size_t i = 0; i < report_addresses.size(); i++) {
        const u32 *words = reinterpret_cast<const u32 *>(report_addresses[i]);
        if (first_reports[i].empty() && __atomic_load_n(words, __ATOMIC_ACQUIRE)) first_reports[i].assign(words, words + REPORTED);
    }
}

void step() {
    now++;
    if (!dirty.empty() && below(4) == 0) drain_one();
    while (!sleepers.empty() && sleepers.top().until <= now) {
        const Sleeper s = sleepers.top();
        sleepers.pop();
        if (s.ticket == s.fiber->ticket) wake(s.fiber);
    }
    while (!pokes.empty() && pokes.back().step <= now) {
        __atomic_store_n(reinterpret_cast<u32 *>(pokes.back().address), pokes.back().value, __ATOMIC_RELEASE);
        pokes.pop_back();
    }
    look_at_reports();
    if (now >= mood_until) change_mood();
    if (now - progress > request.patience) fail("hang", "no progress for " + std::to_string(now - progress) + " steps");
}

Fiber *pick() {
    for (;;) {
        if (!unfinished) return &host;
        Rank *found = nullptr;
        u32 several = 0;
        bool liked = false;
        for (size_t r = 0; r < ranks.size(); r++) {
            if (ranks[r].runnable.empty()) continue;
            const bool like = favoured >> r & 1;
            if (like && !liked) several = 0, liked = true;
            if (like == liked && below(++several) == 0) found = &ranks[r];
        }
        if (found) return found->runnable[below(found->runnable.size())];
        if (!dirty.empty()) drain_one();
        else if (!sleepers.empty()) now = std::max(now, sleepers.top().until);
        else fail("hang", "all threads are blocked");
        step();
    }
}

void yield() {
    step();
    switch_to(pick());
}

void sleep() {
    park();
    sleepers.push({now + (1ull << below(14)), current->ticket, current});
    yield();
}

void open(Barrier &barrier) {
    barrier.outcome[barrier.turn] = barrier.all;
    barrier.count[barrier.turn] = barrier.arrived.size();
    barrier.all = true;
    barrier.turn ^= 1;
    barrier.told[barrier.turn] = 0;
    for (Fiber *fiber : barrier.arrived)
        if (fiber != current) make_runnable(fiber);
    barrier.arrived.clear();
    progress = now;
}

bool meet(Barrier &barrier, const char *what, bool vote = true) {
    current->fenced = false;
    if (barrier.arrived.empty()) barrier.what = what;
    else if (barrier.what != what) fail("apart", std::string("some threads are at ") + what + ", others at " + barrier.what);
    const u32 turn = barrier.turn;
    release(current->context, &barrier.order[turn]);
    barrier.all &= vote;
    barrier.arrived.push_back(current);
    if (barrier.arrived.size() == barrier.live) {
        open(barrier);
    } else {
        park();
        yield();
    }
    acquire(current->context, &barrier.order[turn]);
    return barrier.outcome[turn];
}

void leave(Barrier &barrier) {
    barrier.live--;
    if (barrier.live && barrier.arrived.size() == barrier.live) open(barrier);
}

void run_lane() {
    Block *block = current->block;
    Kernel &kernel = *block->kernel;
    current->fenced = false;
    current->loads = 0;
    acquire(current->context, &launch_order);
    acquire(current->context, &kernel.start);
    __tsan_switch_to_fiber(current->context, 1);
    try {
        kernel.entry(kernel.args.data());
    } catch (const twin::Exit &) {
    }
    Driver driver;
    release(current->context, &kernel.order);
    progress = now;
    leave(block->warps[current->lane.thread.x / WARP]);
    current->arrived = false;
    park();
    idle.push_back(current);
    if (--block->live == 0) {
        ranks[kernel.rank].resident -= kernel.block;
        if (block->cluster) block->cluster->blocks[block->index % kernel.cluster] = nullptr;
        trigger(*block);
        if (block->dirty) advance(ranks[kernel.rank]);
        else drained(block);
    }
    step();
    switch_to(pick());
}

void fiber_main() {
    if (__builtin_setjmp(current->registers) == 0) swapcontext(&current->start, &creator);
    for (;;) run_lane();
}

Fiber *new_fiber() {
    void *stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fail("setup", "no memory for a stack");
    Fiber *fiber = new Fiber, *me = current;
    fibers++;
    fiber->context = __tsan_create_fiber(0);
    getcontext(&fiber->start);
    fiber->start.uc_stack = {stack, 0, STACK};
    makecontext(&fiber->start, fiber_main, 0);
    current = fiber;
    swapcontext(&creator, &fiber->start);
    current = me;
    return fiber;
}

// Of a cluster, some blocks are late.
void start_block(Rank &rank, Kernel &kernel, const std::shared_ptr<Cluster> &cluster) {
    Block *block = new Block;
    block->kernel = &kernel;
    block->cluster = cluster;
    if (cluster) cluster->blocks.push_back(block);
    const u64 late = cluster && below(2) ? 64ull << below(9) : 0;
    block->index = kernel.started++;
    block->live = block->all.live = kernel.block;
    block->warps.resize((kernel.block + WARP - 1) / WARP);
    rank.resident += kernel.block;
    for (u32 t = 0; t < kernel.block; t++) {
        const u32 i = below(idle.size());
        Fiber *fiber = idle[i];
        idle[i] = idle.back();
        idle.pop_back();
        block->warps[t / WARP].live++;
        fiber->block = block;
        fiber->lane = {{t, 0, 0}, {block->index, 0, 0}, {kernel.block, 1, 1}, {kernel.grid, 1, 1}};
        if (late) sleepers.push({now + late, fiber->ticket, fiber});
        else make_runnable(fiber);
    }
    progress = now;
}

void start_cluster(Rank &rank, Kernel &kernel) {
    std::shared_ptr<Cluster> cluster;
    if (kernel.cluster > 1) {
        cluster = std::make_shared<Cluster>();
        cluster->threads = kernel.cluster * kernel.block;
    }
    for (u32 i = 0; i < kernel.cluster; i++) start_block(rank, kernel, cluster);
}

// Start what may start and has room.
void advance(Rank &rank) {
    while (rank.started < rank.stream.size()) {
        Kernel &kernel = rank.stream[rank.started];
        if (rank.started) {
            const Kernel &before = rank.stream[rank.started - 1];
            if (kernel.dependent ? before.triggered < before.grid : !before.complete) return;
        }
        if (kernel.started == 0) release(rank.context, &kernel.start);
        while (kernel.started < kernel.grid) {
            if (rank.resident + kernel.block * kernel.cluster > request.room) return;
            start_cluster(rank, kernel);
        }
        rank.started++;
    }
}

template <class T>
void read_into(T *to, size_t count) {
    if (count && std::fread(to, sizeof(T), count, stdin) != count) _exit(0);
}

void run() {
    read_into(&request, 1);
    state = request.seed * 0x9E3779B97F4A7C15ull | 1;
    now = progress = mood_until = store_number = pushes = switches = shared_used = 0;
    ranks.assign(request.ranks, Rank());
    u32 largest = 0;
    for (u32 i = 0; i < request.launches; i++) {
        LaunchRequest launch;
        read_into(&launch, 1);
        ranks[launch.rank].stream.emplace_back();
        Kernel &kernel = ranks[launch.rank].stream.back();
        kernel.rank = launch.rank;
        kernel.grid = launch.grid;
        kernel.block = launch.block;
        kernel.cluster = launch.cluster;
        kernel.dependent = launch.dependent;
        kernel.entry = entries[launch.kernel];
        kernel.args.resize(args_bytes);
        read_into(kernel.args.data(), args_bytes);
        largest = std::max(largest, launch.block * launch.cluster);
    }
    slots.resize(request.slots);
    read_into(slots.data(), slots.size());
    std::sort(slots.begin(), slots.end(), [](const Slots &a, const Slots &b) { return a.begin < b.begin; });
    pokes.resize(request.pokes);
    read_into(pokes.data(), pokes.size());
    std::sort(pokes.begin(), pokes.end(), [](const Poke &a, const Poke &b) { return a.step > b.step; });
    report_addresses.resize(request.reports);
    read_into(report_addresses.data(), report_addresses.size());
    first_reports.assign(request.reports, {});
    std::vector<u64> holes(request.holes);
    read_into(holes.data(), holes.size());
    for (u64 hole : holes) mprotect(reinterpret_cast<void *>(hole), request.page, PROT_NONE);

    request.room = std::max(request.room, largest);
    while (fibers < request.ranks * request.room * 5 / 4) idle.push_back(new_fiber());
    unfinished = request.launches;
    __tsan_release(&launch_order);
    static std::vector<void *> contexts;
    for (size_t r = 0; r < ranks.size(); r++) {
        if (contexts.size() <= r) contexts.push_back(__tsan_create_fiber(0));
        ranks[r].context = contexts[r];
    }
    for (Rank &rank : ranks) advance(rank);
    step();
    switch_to(pick());
    for (Rank &rank : ranks) acquire(host.context, &rank.order);
    for (u64 hole : holes) mprotect(reinterpret_cast<void *>(hole), request.page, PROT_READ | PROT_WRITE);

    for (size_t i = 0; i < report_addresses.size(); i++)
        for (size_t w = 0; w < first_reports[i].size(); w++)
            if (!first_reports[i][w] && reinterpret_cast<u32 *>(report_addresses[i])[w])
                fail("early report", "rank " + std::to_string(i) + " signals its report before it is whole");
    std::printf("{\"status\": \"ok\", \"text\": \"\", \"steps\": %llu, \"switches\": %llu, \"pushes\": %llu, \"reports\": %d}\n",
                now, switches, pushes / 4, reports);
    std::fflush(stdout);
}

}  // namespace

namespace twin {

Lane *lane = &host.lane;

void pause() {
    const u32 dice = u32(draw() >> 48);
    if (dice < request.sleep) { Driver driver; sleep(); }
    else if (dice < request.sleep + request.yield) { Driver driver; yield(); }
}

void spin(u64 address) {
    Driver driver;
    if (below(16)) {
        current->polled = address / 16;
        pollers[address / 16] = current;
        sleep();
    } else {
        yield();
    }
}

u32 random(u32 n) { return below(n); }

void hold(u32 cycles) {
    if (cycles >> 17) fail("pause", "of " + std::to_string(cycles) + " cycles");
    pause();
}
u64 clock() { return now * request.tick + (1ull << 50); }  // a GPU's clock did not begin with the kernel, either

void syncwarp() {
    pause();
    Driver driver;
    meet(current->block->warps[current->lane.thread.x / WARP], "__syncwarp");
}

void syncthreads() {
    pause();
    Driver driver;
    meet(current->block->all, "__syncthreads");
}

// Whether those are the lanes of `mask`.
static void met(const Barrier &barrier, u32 turn, u32 mask, const char *what) {
    const bool in = mask >> current->lane.thread.x % WARP & 1;
    if (!in || u32(__builtin_popcount(mask)) != barrier.count[turn]) fail("apart", std::string("other lanes than those of the mask: ") + what);
}

bool all(bool vote, u32 mask) {
    pause();
    Driver driver;
    Barrier &warp = current->block->warps[current->lane.thread.x / WARP];
    const u32 turn = warp.turn;
    const bool outcome = meet(warp, "all_sync", vote);
    met(warp, turn, mask, "all_sync");
    return outcome;
}

// What each lane of the warp has told, and which have.
static const u32 *exchange(u32 v, const char *what, u32 mask, u32 &told) {
    pause();
    Driver driver;
    const u32 lane = current->lane.thread.x % WARP;
    Barrier &warp = current->block->warps[current->lane.thread.x / WARP];
    const u32 turn = warp.turn;
    warp.word[turn][lane] = v;
    warp.told[turn] |= 1u << lane;
    meet(warp, what);
    met(warp, turn, mask, what);
    told = warp.told[turn];
    return warp.word[turn];
}

static u32 word_of(u32 v, u32 from, const char *what, u32 mask) {
    u32 told;
    const u32 *words = exchange(v, what, mask, told);
    if (!(told >> from & 1)) fail("apart", std::string("a lane wants the word of one that has ended: ") + what);
    return words[from];
}

u32 broadcast(u32 v, u32 mask) { return word_of(v, 0, "broadcast", mask); }
u32 shuffle(u32 v, u32 from) { return word_of(v, from, "a shuffle", ~0u); }

u32 ballot(bool p) {
    u32 told, found = 0;
    const u32 *words = exchange(p, "a ballot", ~0u, told);
    for (u32 lane = 0; lane < WARP; lane++) found |= (told >> lane & words[lane] & 1) << lane;
    return found;
}

u32 shared(u32 words) {
    pause();
    Driver driver;
    Block &block = *current->block;
    if (!block.shared) {
        block.shared = shared_words + shared_used;
        block.words = words;
        shared_used += words;
        if (4 * shared_used > SHARED) fail("setup", "no shared memory left");
        std::fill_n(block.shared, words, UNWRITTEN);
    }
    if (block.words != words) fail("shared memory", "two sizes of it in a kernel");
    return SHARED_AT;
}

static Block *block_of(u32 address) {
    const u32 of = address >> 24;
    Block *block = current->block;
    if (of) {
        if (!block->cluster || of > block->cluster->blocks.size()) fail("shared memory", "of a block that the cluster does not have");
        block = block->cluster->blocks[of - 1];
        if (!block) fail("shared memory", "of a block that has ended");
        if (!block->shared) fail("shared memory", "of a block that has not begun");
    }
    return block;
}

u32 *shared_at(u32 address, u32 words) {
    Driver driver;
    const Block *block = block_of(address);
    const u32 at = (address & 0xFFFFFF) - SHARED_AT;
    for (const Mbarrier &barrier : block->mbarriers)
        if (at + 4 * words > barrier.at - SHARED_AT && at < barrier.at - SHARED_AT + 8) fail("shared memory", "a word where a memory barrier is");
    if (at % (4 * words) || at / 4 + words > block->words) fail("shared memory", "beside what there is: byte " + std::to_string(at));
    return block->shared + at / 4;
}

static Mbarrier &mbarrier_of(u32 address) {
    for (Mbarrier &barrier : block_of(address)->mbarriers)
        if (barrier.at == (address & 0xFFFFFF)) return barrier;
    fail("shared memory", "a memory barrier that is not initialized");
}

void mbarrier_init(u32 address, u32 bytes) {
    pause();
    Driver driver;
    const u32 end = (address & 0xFFFFFF) - SHARED_AT + 8;
    if (address % 8 || end > 4 * current->block->words) fail("shared memory", "a memory barrier at byte " + std::to_string(address));
    for (const Mbarrier &barrier : current->block->mbarriers)
        if (barrier.at == address) fail("shared memory", "a memory barrier that is initialized twice");
    current->block->mbarriers.push_back({address, bytes, {}});
}

void arrived(u32 barrier, u32 bytes, u32 at) {
    Driver driver;
    if (block_of(at) != block_of(barrier)) fail("shared memory", "a word and its memory barrier in different blocks");
    Mbarrier &to = mbarrier_of(barrier);
    if (to.due < bytes) fail("shared memory", "more bytes come than a memory barrier waits for");
    release(current->context, &to.order);
    if (to.due -= bytes) return;
    for (Fiber *fiber : to.waiting) make_runnable(fiber);
    to.waiting.clear();
    progress = now;
}

void mbarrier_wait(u32 address) {
    pause();
    Driver driver;
    Mbarrier &barrier = mbarrier_of(address);
    if (barrier.due) {
        park();
        barrier.waiting.push_back(current);
        yield();
    }
    current->fenced = false;
    acquire(current->context, &barrier.order);
}

void cluster_arrive() {
    pause();
    Driver driver;
    Cluster &cluster = *current->block->cluster;
    if (current->arrived) fail("apart", "a thread arrives twice at the barrier of a cluster");
    current->arrived = true;
    current->turn = cluster.turn;
    if (++cluster.arrived < cluster.threads) return;
    cluster.arrived = 0;
    cluster.turn ^= 1;
    for (Fiber *fiber : cluster.waiting) make_runnable(fiber);
    cluster.waiting.clear();
    progress = now;
}

void cluster_wait() {
    pause();
    Driver driver;
    Cluster &cluster = *current->block->cluster;
    if (!current->arrived) fail("apart", "a thread waits at the barrier of a cluster where it has not arrived");
    if (cluster.turn == current->turn) {
        park();
        cluster.waiting.push_back(current);
        yield();
    }
    current->arrived = false;
}

void trigger() {
    pause();
    Driver driver;
    ::trigger(*current->block);
}

void wait() {
    pause();
    Driver driver;
    Kernel *kernel = current->block->kernel;
    Rank &rank = ranks[kernel->rank];
    while (rank.completed < rank.stream.size() && &rank.stream[rank.completed] != kernel) {
        park();
        rank.waiting.push_back(current);
        yield();
    }
    current->fenced = false;
    kernel->waited = true;
    acquire(current->context, &rank.order);
}

// Everything that the block stored before it becomes visible first.
void fence() {
    pause();
    Block &block = *current->block;
    const u64 number = store_number;
    for (;;) {
        u32 older = 0, chosen = 0;
        for (u32 i = 0; i < block.stores.size(); i++)
            if (block.stores[i].number < number && below(++older) == 0) chosen = i;
        if (!older) break;
        Driver driver;
        commit(block, chosen);
        yield();
    }
    for (u32 i = 0; i < std::min(current->loads, LOOKBACK); i++) __tsan_acquire(reinterpret_cast<void *>(current->since_fence[i]));
    current->loads = 0;
    current->fenced = true;
}

// What PTX asks of an address, and the protocol of a scope: what a peer or the host writes or reads is for sys alone, but for a rank's
// look at the word that stops it, where that is in its own memory.
void access(u64 address, u32 nbytes, Scope scope, bool write) {
    Driver driver;
    if (address % nbytes) fail("misaligned", std::to_string(nbytes) + " bytes at " + std::to_string(address % 16) + " modulo 16");
    if (scope == SYS) return;
    for (const Slots &s : slots)
        if (address >= s.begin - s.header && address < s.end && (write || scope == WEAK || !request.poisoned || address != s.begin - s.header))
            fail("scope", "an access to the staging memory of rank " + std::to_string(s.owner) + " that is not of system scope");
    for (u64 report : report_addresses)
        if (address >= report && address < report + 64) fail("scope", "an access to a report that is not of system scope");
}

void weak() { current->fenced = false; }

bool fenced() { return current->fenced; }

void loaded(u64 address) { current->since_fence[current->loads++ % LOOKBACK] = address; }

void storing(u64 address, u32 value) { check_slot(address, value, current->block->kernel->rank); }

void stored(u64 address) {
    Driver driver;
    changed(address);
}

u64 load(u64 address, u32 nbytes) {
    const auto &stores = current->block->stores;
    for (size_t i = stores.size(); i-- > 0;)
        if (stores[i].address == address && stores[i].nbytes == nbytes) return stores[i].value;
    if (nbytes == 4) return __atomic_load_n(reinterpret_cast<u32 *>(address), __ATOMIC_RELAXED);
    return __atomic_load_n(reinterpret_cast<u64 *>(address), __ATOMIC_RELAXED);
}

void store(u64 address, u64 value, u32 nbytes, bool packet) {
    Block &block = *current->block;
    if (!block.dirty) dirty.push_back(&block);
    block.dirty = true;
    block.stores.push_back({address, value, nbytes, packet, store_number++});
    while (block.stores.size() > BUFFERED) commit(block, below(block.stores.size()));
}

void settle(u64 address) {
    Block &block = *current->block;
    for (size_t i = block.stores.size(); i-- > 0;)
        if (block.stores[i].address == address) commit(block, i), i = block.stores.size();
    progress = now;
}

}  // namespace twin

// Argument: the file of shared memory. Says where it is mapped, then serves requests until stdin ends.
int main(int, char **argv) {
    const int file = open(argv[1], O_RDWR);
    const off_t size = lseek(file, 0, SEEK_END);
    void *base = mmap(nullptr, size_t(size), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (file < 0 || base == MAP_FAILED) return 1;
    shared_words = static_cast<u32 *>(mmap(nullptr, SHARED, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (shared_words == MAP_FAILED) return 1;
    host.context = __tsan_get_current_fiber();
    std::printf("%llu\n", u64(base));
    std::fflush(stdout);
    for (;;) run();
}

// Fibers: one per lane. A parked lane jumps straight to the next ready one; nothing runs in parallel.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <string>

#include "runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace wph {

Lane *current = nullptr;

namespace {

// A sanitizer's own longjmp forgets what it knows of the stack it leaves; the C library's keeps it, and leave() and
// arrive() tell the sanitizer all it needs.
using Jump = void (*)(jmp_buf, int);
Jump jump = nullptr;

const LaunchPlan *plan = nullptr;
std::deque<Cta> ctas;  // as many as take turns, in whole clusters
std::deque<Cluster> clusters;
Cta *mapped = nullptr;        // whose shared memory is in the arena
std::vector<unsigned> order;  // of the grid's clusters
std::size_t next_cluster = 0;
std::uint64_t random_state = 0;
Lane main_lane;

void find_jump() {
    if (jump) return;
    void *library = dlopen("libc.so.6", RTLD_NOW | RTLD_NOLOAD);
    void *symbol = library ? dlsym(library, "_longjmp") : nullptr;
    if (!symbol) fail(0, "the C library has no _longjmp: expected glibc");
    std::memcpy(&jump, &symbol, sizeof jump);
}

void finish_lane();

void run_lane() {
    arrive(current->fiber);
    for (;;) {
        const Meeting &end = current->warp->cta->end;
        happens_after(end.before());
        plan->entry->call(plan->entry->kernel, plan->params);
        happens_before(end.now());
        finish_lane();
    }
}

void enter(Lane &lane) {
    if (lane.warp) {
        const uint3 index = lane.warp->cta->index;
        threadIdx = {lane.thread, 0, 0};
        blockIdx = index;
        status->cta[0] = static_cast<int>(index.x);
        status->cta[1] = static_cast<int>(index.y);
        status->cta[2] = static_cast<int>(index.z);
        status->thread = static_cast<int>(lane.thread);
    }
    Lane *left = current;
    current = &lane;
    if (left == &lane) return;
    if (_setjmp(left->context) == 0) {
        leave(left->fiber, lane.fiber);
        if (lane.started) jump(lane.context, 1);
        lane.started = true;
        setcontext(&lane.first_context);
    }
    arrive(current->fiber);
}

void map_shared(Cta &cta) {
    if (mapped == &cta) return;
    const unsigned bytes = plan->shared_bytes;
    if (mapped && mapped->live && bytes) {
        mapped->shared.resize(bytes);
        std::memcpy(mapped->shared.data(), shared_begin(), bytes);
    }
    if (bytes) forget(shared_begin(), bytes);
    if (cta.shared.size() == bytes && bytes) {
        std::memcpy(shared_begin(), cta.shared.data(), bytes);
    } else if (bytes) {
        std::memset(shared_begin(), kPoison, bytes);
    }
    mapped = &cta;
}

// CTA `id` of the grid begins in this slot; its shared memory is poison.
void begin_cta(Cta &cta, unsigned id) {
    const dim3 grid = plan->grid;
    cta.index = {id % grid.x, id / grid.x % grid.y, id / grid.x / grid.y};
    cta.lanes_left = plan->block;
    cta.phases.clear();
    cta.bulk.clear();
    cta.stores.clear();
    cta.met = false;
    cta.shared.clear();
    cta.settled.clear();
    cta.seen.clear();
    cta.live = true;
    for (NamedBarrier &barrier : cta.barriers) barrier = NamedBarrier{};
    for (Warp &warp : cta.warps) {
        warp.ready = kFullWarp;
        warp.arrived = warp.exited = 0;
        warp.owes_wait = false;
        warp.priority = random_word();
        for (Lane &lane : warp.lanes) {
            lane.copies.clear();
            lane.groups.assign(1, {});
        }
    }
    if (mapped == &cta) mapped = nullptr;
}

// The grid's next cluster begins in these slots, once all of them are free.
bool begin_cluster(Cluster &cluster) {
    if (next_cluster == order.size()) return false;
    for (const Cta *cta : cluster.ctas) {
        if (cta->live) return false;
    }
    cluster.barrier.arrived = 0, cluster.ordered = true;  // the cluster before may have ended between the halves of one
    const auto count = static_cast<unsigned>(cluster.ctas.size());
    const unsigned first = order[next_cluster++] * count;
    for (unsigned rank = 0; rank < count; ++rank) begin_cta(*cluster.ctas[rank], first + rank);
    return true;
}

// Seed 0: stay in the warp, else the next one. Odd seeds run one warp as far as it goes, even ones mix them.
Warp *ready_warp(Cta &cta, Warp *last) {
    const std::size_t count = cta.warps.size();
    if (plan->seed % 2) {
        Warp *best = nullptr;
        for (Warp &warp : cta.warps) {
            if (warp.ready && (!best || warp.priority > best->priority)) best = &warp;
        }
        return best;
    }
    if (last && last->cta == &cta && last->ready) return last;
    std::size_t start = last ? last->index + 1 : 0;
    if (shuffled()) start = random_word() % count;
    std::size_t at = start % count;
    for (std::size_t i = 0; i < count; ++i, at = at + 1 < count ? at + 1 : 0) {
        if (cta.warps[at].ready) return &cta.warps[at];
    }
    return nullptr;
}

[[noreturn]] void report_deadlock() {
    std::string waits;
    for (Cta &cta : ctas) {
        if (!cta.live) continue;
        struct Site { const char *name; int line, lanes; };
        std::vector<Site> sites;
        int exited = 0;
        for (Warp &warp : cta.warps) {
            for (Lane &lane : warp.lanes) {
                if (warp.exited >> lane.index & 1u) {
                    ++exited;
                    continue;
                }
                Site *found = nullptr;
                for (Site &site : sites) {
                    if (site.line == lane.line && !std::strcmp(site.name, lane.waits_at)) found = &site;
                }
                if (!found) found = &sites.emplace_back(Site{lane.waits_at, lane.line, 0});
                ++found->lanes;
                status->thread = static_cast<int>(lane.thread);
            }
        }
        for (const Site &site : sites) {
            waits += std::string(waits.empty() ? "" : ", ") + std::to_string(site.lanes) + " threads wait at " +
                     site.name + " (line " + std::to_string(site.line) + ")";
        }
        if (exited) waits += ", " + std::to_string(exited) + " have exited";
        fail(sites.empty() ? 0 : sites[0].line, "deadlock: %s", waits.c_str());
    }
    fail(0, "deadlock");
}

// The lane to run next; nullptr when the grid is done.
Lane *next_lane(Cta *after, bool other_cta) {
    for (;;) {
        bool live = false, progress = false;
        const std::size_t count = ctas.size();
        std::size_t at = after ? after->place : 0;
        if (other_cta) at = (at + (shuffled() ? random_word() % count : 1)) % count;
        for (std::size_t i = 0; i < count; ++i, at = at + 1 < count ? at + 1 : 0) {
            Cta &cta = ctas[at];
            if (!cta.live && !begin_cluster(*cta.cluster)) continue;
            live = true;
            map_shared(cta);
            Warp *warp = ready_warp(cta, other_cta ? nullptr : current->warp);
            if (!warp) {
                progress |= deliver(cta);
                continue;
            }
            unsigned lane;
            if (shuffled()) {
                const unsigned turn = random_word() & 31u;
                const unsigned turned = turn ? warp->ready >> turn | warp->ready << (32 - turn) : warp->ready;
                lane = (static_cast<unsigned>(__builtin_ctz(turned)) + turn) & 31u;
            } else {
                lane = static_cast<unsigned>(__builtin_ctz(warp->ready));
            }
            warp->ready &= ~(1u << lane);
            return &warp->lanes[lane];
        }
        if (!live) return nullptr;
        if (!progress) report_deadlock();
    }
}

void give_way(bool other_cta) {
    Lane *next = next_lane(current->warp ? current->warp->cta : nullptr, other_cta);
    enter(next ? *next : main_lane);
}

void finish_lane() {
    Lane &lane = *current;
    Warp &warp = *lane.warp;
    if (warp.arrived) {
        fail(warp.line, "divergence: thread %u exits while %d lanes of its warp wait at %s (line %d)", lane.thread,
             __builtin_popcount(warp.arrived), warp.collective, warp.line);
    }
    warp.exited |= 1u << lane.index;
    Cta &cta = *warp.cta;
    const bool ended = --cta.lanes_left == 0;
    if (ended) {
        if (!cta.bulk.empty()) {
            fail(cta.bulk[0].copy.line, "the CTA exits while a bulk_copy (line %d) is in flight", cta.bulk[0].copy.line);
        }
        if (!cta.stores.empty()) {
            fail(cta.stores[0].line, "CTA %u of the cluster exits while a store_cluster (line %d) to it is in flight", cta.rank,
                 cta.stores[0].line);
        }
        check_unread(cta);
        cta.live = false;
        ++cta.end.completed;
    }
    give_way(ended && spreads_ctas);
}

void make_fibers(Cta &cta) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    cta.warps = std::vector<Warp>(plan->block / kLanes);
    for (Warp &warp : cta.warps) {
        warp.cta = &cta;
        warp.index = static_cast<unsigned>(&warp - cta.warps.data());
        for (unsigned i = 0; i < kLanes; ++i) {
            Lane &lane = warp.lanes[i];
            lane.warp = &warp;
            lane.index = i;
            lane.thread = warp.index * kLanes + i;
            // The page below stays without access: a stack overflow ends there.
            void *memory = mmap(nullptr, kStackBytes + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (memory == MAP_FAILED) fail(0, "no memory for the stacks of %u threads", plan->block);
            unsigned char *stack = static_cast<unsigned char *>(memory) + page;
            mprotect(stack, kStackBytes, PROT_READ | PROT_WRITE);
            lane.fiber.stack = stack;
            lane.fiber.stack_bytes = kStackBytes;
            create(lane.fiber);
            getcontext(&lane.first_context);
            lane.first_context.uc_stack.ss_sp = stack;
            lane.first_context.uc_stack.ss_size = kStackBytes;
            lane.first_context.uc_link = nullptr;
            makecontext(&lane.first_context, run_lane, 0);
        }
    }
}

void free_fibers() {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    for (Cta &cta : ctas) {
        for (Warp &warp : cta.warps) {
            for (Lane &lane : warp.lanes) {
                destroy(lane.fiber);
                munmap(lane.fiber.stack - page, kStackBytes + page);
            }
        }
    }
    ctas.clear();
    clusters.clear();
}

}  // namespace

bool shuffled() { return plan->seed != 0; }

std::uint64_t random_word() {
    // Splitmix64's finaliser over a counter.
    std::uint64_t z = random_state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

void fail(int line, const char *format, ...) {
    std::fprintf(stderr, "wph-emulate: line %d: ", line);
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fputc('\n', stderr);
    std::fflush(stderr);
    _exit(3);
}

unsigned char *shared_of(Cta &cta) { return mapped == &cta ? shared_begin() : cta.shared.data(); }
const unsigned char *shared_of(const Cta &cta) { return mapped == &cta ? shared_begin() : cta.shared.data(); }

void wake(Lane &lane) { lane.warp->ready |= 1u << lane.index; }
void wake(Warp &warp, unsigned lanes) { warp.ready |= lanes; }

void park(const char *waits_at, int line) {
    current->waits_at = waits_at;
    current->line = line;
    give_way(false);
}

void yield_lane() {
    if (ctas.size() < 2 && !shuffled()) return;
    wake(*current);
    give_way(true);
}

void run_launch(const LaunchPlan &launch) {
    find_jump();
    plan = &launch;
    random_state = launch.seed;
    gridDim = launch.grid;
    blockDim = {launch.block, 1, 1};
    const unsigned size = launch.entry->cluster;
    if (launch.grid.x % size) fail(0, "a grid of %u CTAs in x, expected whole clusters of %u", launch.grid.x, size);
    order.resize(std::size_t{launch.grid.x} * launch.grid.y * launch.grid.z / size);
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<unsigned>(i);
    if (shuffled()) {
        for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_word() % i]);
    }
    next_cluster = 0;
    mapped = nullptr;
    clusters.resize((launch.concurrent_ctas + size - 1) / size);
    for (Cluster &cluster : clusters) {
        for (unsigned rank = 0; rank < size; ++rank) {
            Cta &cta = ctas.emplace_back();
            cta.place = ctas.size() - 1;
            make_fibers(cta);
            cta.cluster = &cluster;
            cta.rank = rank;
            cluster.ctas.push_back(&cta);
        }
    }
    main_lane.started = true;
    current = &main_lane;
    give_way(false);
    for (const Cta &cta : ctas) happens_after(cta.end.before());
    free_fibers();
}

}  // namespace wph

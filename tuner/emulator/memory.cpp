// Shared memory, asynchronous copies and their barriers. A copy reads its source and writes its destination as late as
// it may; until then the destination holds poison.
#include <algorithm>
#include <cstring>
#include <functional>

#include "runtime.h"

extern "C" {
// The kernel's shared memory starts kSharedGuard bytes in (the linker's --defsym); nothing around it may be touched.
alignas(1024) unsigned char wph_arena[16384 + 256 * 1024 + 16384];
}

namespace wph {
namespace {

constexpr std::size_t kSharedGuard = 16384;
constexpr std::uint64_t kBarrierTag = 0x6d62617272696572u;  // stands in memory where an mbarrier is

unsigned shared_bytes = 0;

bool multiple(const void *p, std::size_t alignment) { return reinterpret_cast<std::uintptr_t>(p) % alignment == 0; }

void perform(const AsyncCopy &copy) {
    check_global(copy.source, static_cast<std::size_t>(copy.valid), 1, "an asynchronous copy's source", copy.line);
    std::memcpy(copy.destination, copy.source, static_cast<std::size_t>(copy.valid));
    std::memset(copy.destination + copy.valid, 0, static_cast<std::size_t>(copy.bytes - copy.valid));
}

PhaseBarrier &find_barrier(Cta &cta, const std::uint64_t *bar, const char *what, int line) {
    check_shared(bar, 8, 8, what, line);
    reads(bar, 8);
    for (PhaseBarrier &barrier : cta.phases) {
        if (barrier.address != bar) continue;
        if (*bar != kBarrierTag) fail(line, "%s: the mbarrier was overwritten", what);
        return barrier;
    }
    fail(line, "%s: no mbarrier was initialised there", what);
}

// Ends the phase when all arrivals and bytes are there.
bool advance(PhaseBarrier &barrier) {
    if (barrier.pending || barrier.bytes) return false;
    barrier.pending = barrier.arrivals;
    ++barrier.phase;
    const bool woke = !barrier.waiting.empty();
    for (Lane *lane : barrier.waiting) wake(*lane);
    barrier.waiting.clear();
    return woke;
}

}  // namespace

unsigned char *shared_begin() { return wph_arena + kSharedGuard; }

void set_shared_size(unsigned bytes) {
    shared_bytes = bytes;
    guard(wph_arena, sizeof wph_arena, shared_begin(), bytes);
}

void check_shared(const void *p, std::size_t bytes, std::size_t alignment, const char *what, int line) {
    const unsigned char *begin = shared_begin();
    const auto *address = static_cast<const unsigned char *>(p);
    if (address < begin || address + bytes > begin + shared_bytes) {
        fail(line, "%s: %zu bytes at shared memory's byte %td, expected within its %u bytes", what, bytes,
             address - begin, shared_bytes);
    }
    if (!multiple(p, alignment)) {
        fail(line, "%s: misaligned: shared memory's byte %td, expected a multiple of %zu", what, address - begin,
             alignment);
    }
}

void check_global(const void *p, std::size_t bytes, std::size_t alignment, const char *what, int line) {
    if (!multiple(p, alignment)) fail(line, "%s: misaligned: %p, expected a multiple of %zu", what, p, alignment);
    check_access(p, bytes, what, line);
}

// Where a CTA's dynamic shared memory starts on GPUs: the system keeps the first KiB. The highest byte of an address is
// the CTA's rank in its cluster (so on Hopper), so that an address without it means the first CTA's memory.
constexpr unsigned shared_start = 1024, window_bytes = 1u << 24;

unsigned shared_address(const void *p, int line) {
    check_shared(p, 0, 1, "shared_address", line);
    const auto at = static_cast<unsigned>(static_cast<const unsigned char *>(p) - shared_begin());
    return current->warp->cta->rank * window_bytes + shared_start + at;
}

unsigned load_shared(unsigned address, int line) {
    const unsigned owner = address / window_bytes, rank = current->warp->cta->rank;
    if (owner != rank) fail(line, "load_shared: an address of CTA %u of the cluster, expected one of CTA %u", owner, rank);
    const unsigned char *from = shared_begin() + (static_cast<long>(address % window_bytes) - shared_start);
    check_shared(from, 4, 4, "load_shared", line);
    reads(from, 4);
    unsigned v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

void settle(Cta &cta, bool ordered) {
    cta.met = true;
    const unsigned char *now = shared_of(cta);
    for (std::size_t i = 0; i < cta.seen.size(); ++i) {
        if (cta.seen[i] && now[i] != cta.settled[i]) {
            fail(cta.seen_line, "data race: CTA %u of the cluster writes shared memory's byte %zu, which another reads",
                 cta.rank, i);
        }
    }
    if (ordered) cta.settled.assign(now, now + shared_bytes);
    cta.seen.assign(cta.settled.size(), 0);
}

void check_unread(const Cta &cta) {
    for (const unsigned char seen : cta.seen) {
        if (!seen) continue;
        fail(cta.seen_line, "data race: CTA %u of the cluster exits while another reads its shared memory", cta.rank);
    }
}

void load_cluster(void *to, const void *p, int rank, int bytes, int line) {
    const auto size = static_cast<std::size_t>(bytes);
    check_shared(p, size, size, "load_cluster", line);
    const Cta &self = *current->warp->cta;
    const auto &ctas = self.cluster->ctas;
    if (rank < 0 || static_cast<std::size_t>(rank) >= ctas.size()) {
        fail(line, "load_cluster: CTA %d of a cluster of %zu", rank, ctas.size());
    }
    Cta &other = *ctas[static_cast<std::size_t>(rank)];
    const auto at = static_cast<std::size_t>(static_cast<const unsigned char *>(p) - shared_begin());
    if (&other == &self) {
        reads(p, size);
    } else if (!other.live) {
        fail(line, "load_cluster: CTA %d of the cluster has exited", rank);
    } else if (other.settled.empty()) {
        fail(line, "load_cluster: nothing says that CTA %d of the cluster has begun: expected sync_cluster", rank);
    } else {
        if (std::memcmp(shared_of(other) + at, other.settled.data() + at, size) != 0) {
            fail(line, "data race: CTA %d of the cluster has written shared memory's byte %zu since its last barrier", rank,
                 at);
        }
        std::memset(other.seen.data() + at, 1, size);
        other.seen_line = line;
    }
    std::memcpy(to, shared_of(other) + at, size);
}

void store_cluster(void *p, int rank, const void *value, int bytes, unsigned long long *bar, int line) {
    const auto size = static_cast<std::size_t>(bytes);
    check_shared(p, size, size, "store_cluster", line);
    check_shared(bar, 8, 8, "store_cluster's mbarrier", line);
    const auto &ctas = current->warp->cta->cluster->ctas;
    if (rank < 0 || static_cast<std::size_t>(rank) >= ctas.size()) {
        fail(line, "store_cluster: CTA %d of a cluster of %zu", rank, ctas.size());
    }
    Cta &other = *ctas[static_cast<std::size_t>(rank)];
    if (!other.live) fail(line, "store_cluster: CTA %d of the cluster has exited", rank);
    if (!other.met || current->warp->owes_wait) {
        fail(line, "store_cluster: nothing says that CTA %d of the cluster has begun: expected wait_cluster", rank);
    }
    auto *counter = reinterpret_cast<std::uint64_t *>(bar);
    const auto counts = [counter](const PhaseBarrier &barrier) { return barrier.address == counter && barrier.shown; };
    if (std::none_of(other.phases.begin(), other.phases.end(), counts)) {
        fail(line, "store_cluster: CTA %d of the cluster shows no mbarrier there: expected mbarrier_fence_init", rank);
    }
    auto *destination = static_cast<unsigned char *>(p);
    for (const ClusterStore &pending : other.stores) {
        if (destination < pending.destination + pending.bytes && pending.destination < destination + size) {
            fail(line, "data race: two stores to byte %td of CTA %d's shared memory are in flight", destination - shared_begin(),
                 rank);
        }
    }
    ClusterStore store{destination, {}, size, counter, line};
    std::memcpy(store.value, value, size);
    std::memset(shared_of(other) + (destination - shared_begin()), kPoison, size);
    other.stores.push_back(store);
}

void copy_async(void *shared, const void *global, int bytes, int valid, int line, const void *call) {
    const auto size = static_cast<std::size_t>(bytes);
    if (valid < 0 || valid > bytes) fail(line, "cp_async: %d valid bytes, expected 0 to %d", valid, bytes);
    check_shared(shared, size, size, "cp_async's destination", line);
    check_global(global, static_cast<std::size_t>(valid), size, "cp_async's source", line);
    auto *destination = static_cast<unsigned char *>(shared);
    Lane &lane = *current;
    for (const AsyncCopy &pending : lane.copies) {
        if (destination < pending.destination + pending.bytes && pending.destination < destination + size) {
            fail(line, "data race in shared memory: two copies to byte %td are in flight",
                 std::max(destination, pending.destination) - shared_begin());
        }
    }
    std::memset(destination, kPoison, size);
    CopyGroup &group = lane.groups.back();
    starts_copy(lane.fiber, shared, size, global, static_cast<std::size_t>(valid), call, &group.landed);
    lane.copies.push_back({destination, static_cast<const unsigned char *>(global), bytes, valid, line});
    ++group.copies;
}

void copy_commit() { current->groups.emplace_back(); }

void copy_wait(int pending) {
    Lane &lane = *current;
    while (lane.groups.size() > static_cast<std::size_t>(pending) + 1) {
        const CopyGroup &group = lane.groups.front();
        for (std::size_t i = 0; i < group.copies; ++i) perform(lane.copies[i]);
        lane.copies.erase(lane.copies.begin(), lane.copies.begin() + static_cast<std::ptrdiff_t>(group.copies));
        happens_after(&group.landed);
        lane.groups.pop_front();
    }
}

void barrier_init(unsigned long long *bar, int arrivals, int line) {
    auto *address = reinterpret_cast<std::uint64_t *>(bar);
    check_shared(bar, 8, 8, "mbarrier_init", line);
    if (arrivals < 1 || arrivals >= 1 << 20) fail(line, "mbarrier_init: %d arrivals, expected 1 to 1048575", arrivals);
    Cta &cta = *current->warp->cta;
    for (PhaseBarrier &barrier : cta.phases) {
        if (barrier.address == address) fail(line, "mbarrier_init: the mbarrier is initialised already");
    }
    cta.phases.push_back({address, arrivals, arrivals, 0, 0, {}, {}, current, false, false});
    writes(bar, 8);
    std::memcpy(address, &kBarrierTag, sizeof kBarrierTag);
}

void fence_barrier_init() {
    Cta &cta = *current->warp->cta;
    for (PhaseBarrier &barrier : cta.phases) barrier.fenced |= barrier.opener == current;
    happens_before(cta.cluster);
}

void barrier_arrive(unsigned long long *bar, int bytes, const char *name, int line) {
    if (bytes < 0 || bytes >= 1 << 20) fail(line, "%s: %d bytes, expected 0 to 1048575", name, bytes);
    PhaseBarrier &barrier = find_barrier(*current->warp->cta, reinterpret_cast<std::uint64_t *>(bar), name, line);
    if (barrier.pending == 0) {
        fail(line, "%s: more arrivals than the %d that mbarrier_init named, its bytes are not there yet", name,
             barrier.arrivals);
    }
    happens_before(&barrier.tokens[barrier.phase % 2]);
    barrier.bytes += bytes;
    --barrier.pending;
    advance(barrier);
}

void barrier_wait(unsigned long long *bar, int parity, int line) {
    if (parity != 0 && parity != 1) fail(line, "mbarrier_wait: parity %d, expected 0 or 1", parity);
    PhaseBarrier &barrier =
        find_barrier(*current->warp->cta, reinterpret_cast<std::uint64_t *>(bar), "mbarrier_wait", line);
    if (static_cast<int>(barrier.phase & 1u) == parity) {
        barrier.waiting.push_back(current);
        park("mbarrier_wait", line);
    }
    happens_after(&barrier.tokens[parity]);
}

void copy_bulk(void *shared, const void *global, int bytes, unsigned long long *bar, int line, const void *call) {
    if (bytes <= 0 || bytes % 16) fail(line, "bulk_copy: %d bytes, expected a positive multiple of 16", bytes);
    const auto size = static_cast<std::size_t>(bytes);
    check_shared(shared, size, 16, "bulk_copy's destination", line);
    check_global(global, size, 16, "bulk_copy's source", line);
    Cta &cta = *current->warp->cta;
    auto *address = reinterpret_cast<std::uint64_t *>(bar);
    const PhaseBarrier &barrier = find_barrier(cta, address, "bulk_copy", line);
    auto *destination = static_cast<unsigned char *>(shared);
    std::memset(destination, kPoison, size);
    starts_copy(current->fiber, shared, size, global, size, call, &barrier.tokens[barrier.phase % 2]);
    cta.bulk.push_back({{destination, static_cast<const unsigned char *>(global), bytes, bytes, line}, address});
}

bool deliver(Cta &cta) {
    for (std::size_t i = 0; i < cta.phases.size(); ++i) {
        PhaseBarrier &barrier = cta.phases[i];
        if (barrier.waiting.empty()) continue;
        const auto arrives = [&barrier](const ClusterStore &store) { return store.barrier == barrier.address; };
        const auto arriving = std::stable_partition(cta.stores.begin(), cta.stores.end(), std::not_fn(arrives));
        if (arriving != cta.stores.end()) {
            for (auto store = arriving; store != cta.stores.end(); ++store) {
                const auto written = [](unsigned char byte) { return byte != kPoison; };
                if (std::any_of(store->destination, store->destination + store->bytes, written)) {
                    fail(store->line, "data race: CTA %u of the cluster writes shared memory's byte %td, where a store is in flight",
                         cta.rank, store->destination - shared_begin());
                }
                std::memcpy(store->destination, store->value, store->bytes);
                barrier.bytes -= static_cast<long long>(store->bytes);
            }
            cta.stores.erase(arriving, cta.stores.end());
            advance(barrier);
            return true;
        }
        std::vector<BulkCopy> mine, others;
        for (const BulkCopy &bulk : cta.bulk) (bulk.barrier == barrier.address ? mine : others).push_back(bulk);
        if (mine.empty()) continue;
        cta.bulk.swap(others);
        for (const BulkCopy &bulk : mine) {
            perform(bulk.copy);
            barrier.bytes -= bulk.copy.bytes;
        }
        advance(barrier);
        return true;
    }
    return false;
}

}  // namespace wph

// What the lanes of a warp, or the warps of a CTA, do together.
#include <cstring>

#include "runtime.h"

namespace wph {
namespace {

// The current lane joins its warp at a collective, its operands being in warp.in. True for the last to arrive, which
// must produce the results and call release(); the others return false once that has happened.
bool join(const char *name, int line) {
    Lane &lane = *current;
    Warp &warp = *lane.warp;
    if (warp.exited) {
        fail(line, "divergence: thread %u is at %s (line %d), but %d lanes of its warp have exited", lane.thread, name,
             line, __builtin_popcount(warp.exited));
    }
    if (warp.arrived == 0) {
        warp.collective = name;
        warp.line = line;
    } else if (warp.line != line || (warp.collective != name && std::strcmp(warp.collective, name) != 0)) {
        fail(line, "divergence: thread %u is at %s (line %d), other lanes of its warp wait at %s (line %d)", lane.thread,
             name, line, warp.collective, warp.line);
    }
    warp.arrived |= 1u << lane.index;
    if (warp.arrived == kFullWarp) return true;
    park(name, line);
    return false;
}

// Everyone but the current lane, which goes on anyway, may run again.
void release(Warp &warp) {
    warp.arrived = 0;
    wake(warp, kFullWarp & ~(1u << current->index));
    if (shuffled() && random_word() % 8 == 0) yield_lane();
}

// The current warp, all of whose lanes are there, comes to `barrier`. True for the one that completes its `threads`, which
// lets those go on that wait there.
bool come(NamedBarrier &barrier, int threads) {
    barrier.arrived += static_cast<int>(kLanes);
    if (barrier.arrived < threads) return false;
    for (Warp *waiting : barrier.waiting) wake(*waiting, kFullWarp);
    barrier.waiting.clear();
    barrier.arrived = 0;
    ++barrier.meeting.completed;
    return true;
}

// Parks the current warp, all of whose lanes are there, until the last one comes.
void wait_for_others(NamedBarrier &barrier, const char *name, int line) {
    Warp &warp = *current->warp;
    warp.arrived = 0;
    barrier.waiting.push_back(&warp);
    park(name, line);
}

// Parks the current lane until `threads` of them are at the CTA's barrier `id`.
void meet(int id, int threads, const char *name, int line) {
    Warp &warp = *current->warp;
    // Barriers are warp instructions: all 32 lanes must be at the same one.
    const unsigned self = current->index;
    warp.in[self][0] = static_cast<unsigned>(id);
    warp.in[self][1] = static_cast<unsigned>(threads);
    if (!join(name, line)) return;
    for (unsigned lane = 0; lane < kLanes; ++lane) {
        if (warp.in[lane][0] != warp.in[self][0] || warp.in[lane][1] != warp.in[self][1]) {
            fail(line, "divergence: lanes of a warp name different barriers at %s (line %d)", name, line);
        }
    }
    NamedBarrier &barrier = warp.cta->barriers[id];
    if (barrier.arrived && barrier.threads != threads) {
        fail(line, "%s: barrier %d with %d threads (line %d), others wait there for %d (line %d)", name, id, threads,
             line, barrier.threads, barrier.line);
    }
    barrier.threads = threads;
    barrier.line = line;
    if (come(barrier, threads)) {
        release(warp);
    } else {
        wait_for_others(barrier, name, line);
    }
}

// The same at the cluster's barrier, which orders memory if all come to it in a way that does.
bool come(Cluster &cluster, bool ordered, const char *name, int line) {
    Warp &warp = *current->warp;
    if (warp.owes_wait) fail(line, "%s: the warp has arrived already, expected wait_cluster", name);
    for (PhaseBarrier &barrier : warp.cta->phases) barrier.shown |= barrier.fenced && barrier.opener->warp == &warp;
    cluster.ordered &= ordered;
    if (!come(cluster.barrier, static_cast<int>(cluster.ctas.size() * blockDim.x))) return false;
    for (Cta *cta : cluster.ctas) settle(*cta, cluster.ordered);
    cluster.ordered = true;
    return true;
}

void multiply_accumulate(Warp &warp, Element element) {
    float a[16][16], b[16][8];
    for (unsigned lane = 0; lane < kLanes; ++lane) {
        const unsigned group = lane / 4, pair = lane % 4 * 2;
        const std::uint32_t *word = warp.in[lane];
        for (unsigned half = 0; half < 2; ++half) {
            const auto value = [&](unsigned i) {
                const unsigned bits = word[i] >> (16 * half) & 0xffffu;
                if (element == Element::bfloat) return bits_to_float(bits << 16);
                return half_value(static_cast<unsigned short>(bits));
            };
            a[group][pair + half] = value(0);
            a[group + 8][pair + half] = value(1);
            a[group][pair + 8 + half] = value(2);
            a[group + 8][pair + 8 + half] = value(3);
            b[pair + half][group] = value(4);
            b[pair + 8 + half][group] = value(5);
        }
    }
    for (unsigned lane = 0; lane < kLanes; ++lane) {
        for (unsigned i = 0; i < 4; ++i) {
            const unsigned row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
            // The hardware aligns all products before it adds; a double sum rounded once is as good or better.
            double sum = bits_to_float(warp.in[lane][6 + i]);
            for (unsigned k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * static_cast<double>(b[k][column]);
            warp.out[lane][i] = float_to_bits(static_cast<float>(sum));
        }
    }
}

}  // namespace

unsigned shuffle_word(Shuffle kind, unsigned v, int operand, const char *name, int line) {
    const unsigned self = current->index;
    Warp &warp = *current->warp;
    warp.in[self][0] = v;
    warp.in[self][1] = static_cast<unsigned>(operand);
    if (join(name, line)) {
        for (unsigned lane = 0; lane < kLanes; ++lane) {
            const unsigned by = warp.in[lane][1];
            unsigned from = lane;
            switch (kind) {
                case Shuffle::exclusive_or: from = (lane ^ by) < kLanes ? lane ^ by : lane; break;
                case Shuffle::lane: from = by & 31u; break;
                case Shuffle::up: from = by <= lane ? lane - by : lane; break;
            }
            warp.out[lane][0] = warp.in[from][0];
        }
        release(warp);
    }
    return warp.out[self][0];
}

unsigned ballot(bool v, const char *name, int line) {
    const unsigned self = current->index;
    Warp &warp = *current->warp;
    warp.in[self][0] = v;
    if (join(name, line)) {
        unsigned votes = 0;
        for (unsigned lane = 0; lane < kLanes; ++lane) votes |= warp.in[lane][0] << lane;
        for (unsigned lane = 0; lane < kLanes; ++lane) warp.out[lane][0] = votes;
        release(warp);
    }
    return warp.out[self][0];
}

void sync_warp(int line) {
    Warp &warp = *current->warp;
    const char *token = warp.meeting.now();
    happens_before(token);
    if (join("sync_warp", line)) {
        ++warp.meeting.completed;
        release(warp);
    }
    happens_after(token);
}

void sync_threads(int id, int threads, const char *name, int line) {
    const int block = static_cast<int>(blockDim.x);
    if (id != 0 || threads != 0) {
        if (id < 1 || id > 15) fail(line, "sync_named: barrier %d, expected 1 to 15", id);
        if (threads < 32 || threads % 32 || threads > block) {
            fail(line, "sync_named: %d threads, expected a multiple of 32 up to the block's %d", threads, block);
        }
    } else {
        threads = block;
    }
    const char *token = current->warp->cta->barriers[id].meeting.now();
    happens_before(token);
    meet(id, threads, name, line);
    happens_after(token);
}

void sync_cluster(bool ordered, const char *name, int line) {
    Warp &warp = *current->warp;
    Cluster &cluster = *warp.cta->cluster;
    const char *token = cluster.barrier.meeting.now();
    if (ordered) happens_before(token);
    if (join(name, line)) {
        if (come(cluster, ordered, name, line)) {
            release(warp);
        } else {
            wait_for_others(cluster.barrier, name, line);
        }
    }
    if (ordered) happens_after(token);
}

void arrive_cluster(int line) {
    Warp &warp = *current->warp;
    Cluster &cluster = *warp.cta->cluster;
    if (!join("arrive_cluster", line)) return;
    warp.cluster_round = cluster.barrier.meeting.completed;
    come(cluster, false, "arrive_cluster", line);
    warp.owes_wait = true;
    release(warp);
}

void wait_cluster(int line) {
    Warp &warp = *current->warp;
    Cluster &cluster = *warp.cta->cluster;
    if (join("wait_cluster", line)) {
        if (!warp.owes_wait) fail(line, "wait_cluster: the warp has not arrived, expected arrive_cluster");
        warp.owes_wait = false;
        if (warp.cluster_round != cluster.barrier.meeting.completed) {
            release(warp);
        } else {
            wait_for_others(cluster.barrier, "wait_cluster", line);
        }
    }
    happens_after(&cluster);
}

void mma(float *c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1, Element element,
         const char *name, int line) {
    const unsigned self = current->index;
    Warp &warp = *current->warp;
    const unsigned ab[] = {a0, a1, a2, a3, b0, b1};
    std::memcpy(warp.in[self], ab, sizeof ab);
    std::memcpy(warp.in[self] + 6, c, 4 * sizeof(float));
    if (join(name, line)) {
        multiply_accumulate(warp, element);
        release(warp);
    }
    std::memcpy(c, warp.out[self], 4 * sizeof(float));
}

unsigned transpose(unsigned v, int line) {
    const unsigned self = current->index;
    Warp &warp = *current->warp;
    warp.in[self][0] = v;
    if (join("movmatrix", line)) {
        const auto element = [&warp](unsigned row, unsigned column) {
            return warp.in[4 * row + column / 2][0] >> (16 * (column % 2)) & 0xffffu;
        };
        for (unsigned lane = 0; lane < kLanes; ++lane) {
            const unsigned row = lane / 4, column = lane % 4 * 2;
            warp.out[lane][0] = element(column, row) | element(column + 1, row) << 16;
        }
        release(warp);
    }
    return warp.out[self][0];
}

}  // namespace wph

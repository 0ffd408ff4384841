// The emulator's own declarations: CTAs, warps and lanes, and what its files need from each other.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "emulate.h"
#include "sanitizer.h"

namespace wph {

constexpr unsigned kLanes = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr std::size_t kStackBytes = 256 * 1024;
constexpr unsigned char kPoison = 0xff;  // NaN in fp16, bf16 and fp32, -1 as an index

struct Cta;
struct Cluster;
struct Warp;

struct AsyncCopy {
    unsigned char *destination;
    const unsigned char *source;
    int bytes, valid, line;
};

// Tokens are chars that stay where they are: see happens_before().
struct CopyGroup {
    std::size_t copies = 0;
    char landed;
};

struct Lane {
    Warp *warp = nullptr;
    unsigned index = 0;   // within the warp
    unsigned thread = 0;  // within the CTA
    bool started = false;
    Fiber fiber;
    jmp_buf context;
    ucontext_t first_context;
    const char *waits_at = nullptr;  // what the lane is parked in, and the line of the kernel
    int line = 0;
    std::vector<AsyncCopy> copies;                            // in the order of issue
    std::deque<CopyGroup> groups = std::deque<CopyGroup>(1);  // the last one is not committed yet
};

// Tokens of lanes that meet, even and odd times apart: the first may come again before the last have left.
struct Meeting {
    unsigned completed = 0;
    char tokens[2];
    const char *now() const { return &tokens[completed % 2]; }
    const char *before() const { return &tokens[(completed + 1) % 2]; }
};

struct Warp {
    Cta *cta = nullptr;
    unsigned index = 0;
    unsigned ready = 0, arrived = 0, exited = 0;  // lane masks
    const char *collective = nullptr;             // what the arrived lanes wait at
    int line = 0;
    std::uint64_t priority = 0;
    Meeting meeting;
    bool owes_wait = false;      // arrived at the cluster's barrier, has not waited for the others there
    unsigned cluster_round = 0;  // how many such barriers were complete when it arrived
    std::uint32_t in[kLanes][10];
    std::uint32_t out[kLanes][4];
    Lane lanes[kLanes];
};

struct NamedBarrier {
    int threads = 0, arrived = 0, line = 0;
    std::vector<Warp *> waiting;
    Meeting meeting;
};

struct BulkCopy {
    AsyncCopy copy;
    std::uint64_t *barrier;
};

// A word or vector from another CTA of the cluster, on its way to the same address here.
struct ClusterStore {
    unsigned char *destination;
    unsigned char value[16];
    std::size_t bytes;
    std::uint64_t *barrier;
    int line;
};

struct PhaseBarrier {
    std::uint64_t *address;
    int arrivals;        // expected in each phase
    int pending;         // of the current phase
    long long bytes;     // expected minus copied in the current phase
    unsigned phase;      // number of completed phases
    std::vector<Lane *> waiting;
    char tokens[2];      // of even and odd phases
    Lane *opener;        // who initialised it
    bool fenced;         // by the opener
    bool shown;          // to the other CTAs: its warp has arrived at the cluster's barrier since
};

struct Cta {
    bool live = false;
    std::size_t place = 0;  // among those that take turns
    uint3 index{};
    unsigned lanes_left = 0;
    Meeting end;  // of its lanes: the slot's next CTA uses their stacks
    std::vector<Warp> warps;
    NamedBarrier barriers[16];
    std::deque<PhaseBarrier> phases;
    std::vector<BulkCopy> bulk;
    std::vector<unsigned char> shared;  // its shared memory while another CTA has the arena
    Cluster *cluster = nullptr;
    unsigned rank = 0;  // in the cluster
    bool met = false;   // all CTAs of the cluster are known to have begun
    std::vector<ClusterStore> stores;  // to it
    // What the cluster's last barrier found in its shared memory, and which bytes others have read since then.
    std::vector<unsigned char> settled, seen;
    int seen_line = 0;
};

struct Cluster {
    std::vector<Cta *> ctas;
    NamedBarrier barrier;
    bool ordered = true;  // who has come so far did so in a way that orders memory
};

// What Python reads after the child has died: where it was.
struct Status {
    std::int32_t launch, cta[3], thread, done;
};

struct LaunchPlan {
    const Entry *entry;
    const void *params;
    dim3 grid;
    unsigned block, shared_bytes, concurrent_ctas;
    std::uint64_t seed;
};

extern Status *status;
extern Lane *current;

// Ends the process with one line on stderr; `line` is the kernel's, 0 where there is none.
[[noreturn]] void fail(int line, const char *format, ...) __attribute__((format(printf, 2, 3)));

void run_launch(const LaunchPlan &plan);

// Scheduling: park() gives way until something makes the current lane ready again.
void park(const char *waits_at, int line);
void wake(Lane &lane);
void wake(Warp &warp, unsigned lanes);
std::uint64_t random_word();
bool shuffled();

// Shared memory.
unsigned char *shared_begin();
void set_shared_size(unsigned bytes);  // and poisons what lies around it
void check_shared(const void *p, std::size_t bytes, std::size_t alignment, const char *what, int line);
void check_global(const void *p, std::size_t bytes, std::size_t alignment, const char *what, int line);

// What a CTA's shared memory holds now.
unsigned char *shared_of(Cta &cta);
const unsigned char *shared_of(const Cta &cta);
// What other CTAs of the cluster read must be still from one barrier to the next, and written before one that orders
// memory: settle() is for each CTA at a barrier, check_unread() for one that exits.
void settle(Cta &cta, bool ordered);
void check_unread(const Cta &cta);

// Performs pending bulk copies, and stores of other CTAs, that a parked lane waits for; true if there were any.
bool deliver(Cta &cta);

}  // namespace wph

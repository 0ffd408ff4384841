// AddressSanitizer's side of sanitizer.h.
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>

#include <cstdio>

#include "sanitizer.h"

namespace wph {
namespace {

const void *main_stack = nullptr;
std::size_t main_stack_bytes = 0;

}  // namespace

const bool spreads_ctas = false;

void create(Fiber &) {}
void destroy(Fiber &) {}

void leave(Fiber &from, const Fiber &to) {
    __sanitizer_start_switch_fiber(&from.own, to.stack ? to.stack : main_stack,
                                   to.stack ? to.stack_bytes : main_stack_bytes);
}

void arrive(const Fiber &now) {
    const bool first = !main_stack;
    __sanitizer_finish_switch_fiber(now.own, first ? &main_stack : nullptr, first ? &main_stack_bytes : nullptr);
}

void guard(unsigned char *block, std::size_t block_bytes, unsigned char *begin, std::size_t bytes) {
    __asan_poison_memory_region(block, block_bytes);
    __asan_unpoison_memory_region(begin, bytes);
}

void check_access(const void *p, std::size_t bytes, const char *what, int line) {
    void *bad = bytes ? __asan_region_is_poisoned(const_cast<void *>(p), bytes) : nullptr;
    if (!bad) return;
    int frame = line;
    std::fprintf(stderr, "wph-emulate: line %d: %s\n", line, what);
    __asan_report_error(__builtin_return_address(0), __builtin_frame_address(0), &frame, bad, 0, bytes);
}

void happens_before(const void *) {}
void happens_after(const void *) {}
void reads(const void *, std::size_t) {}
void writes(const void *, std::size_t) {}
void starts_copy(Fiber &, const void *, std::size_t, const void *, std::size_t, const void *, const void *) {}
void forget(void *, std::size_t) {}

}  // namespace wph

// Runs the launches that a request file describes. The file is mapped and shared with the process that wrote it:
//   Header, then per launch: Launch; per relocation: Relocation; per buffer: Buffer; parameters; the buffers' bytes.
// Each buffer is copied into a block of its own size, so that AddressSanitizer guards both of its ends, and back.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "runtime.h"

namespace wph {

const Entry *Entry::first = nullptr;
Status *status = nullptr;

namespace {

struct Header {
    Status status;
    std::uint32_t launches, relocations, buffers, concurrent_ctas;
    std::uint32_t params_bytes, unused;
    std::uint64_t seed, params_at;
    std::uint64_t shared_address;  // written here, for messages
};
struct LaunchRecord {
    char entry[64];
    std::uint32_t grid[3], block, shared_bytes, unused;
};
struct Relocation {
    std::uint32_t field_at, buffer;
    std::uint64_t offset;
};
struct Buffer {
    std::uint64_t at, bytes, alignment;
    std::uint64_t address;  // written here, for messages
};

const Entry *find_entry(const char *name) {
    for (const Entry *entry = Entry::first; entry; entry = entry->next) {
        if (!std::strcmp(entry->name, name)) return entry;
    }
    fail(0, "no kernel %s in the source", name);
}

int run(const char *path) {
    const int file = open(path, O_RDWR);
    struct stat facts;
    if (file < 0 || fstat(file, &facts)) fail(0, "cannot open the request %s", path);
    void *memory = mmap(nullptr, static_cast<std::size_t>(facts.st_size), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) fail(0, "cannot map the request %s", path);
    auto *bytes = static_cast<unsigned char *>(memory);
    auto &header = *static_cast<Header *>(memory);
    status = &header.status;
    auto *launches = reinterpret_cast<LaunchRecord *>(bytes + sizeof(Header));
    auto *relocations = reinterpret_cast<Relocation *>(launches + header.launches);
    auto *buffers = reinterpret_cast<Buffer *>(relocations + header.relocations);

    std::vector<unsigned char *> blocks;
    for (std::uint32_t i = 0; i < header.buffers; ++i) {
        void *block = nullptr;
        if (posix_memalign(&block, buffers[i].alignment, buffers[i].bytes)) fail(0, "no memory for a buffer");
        std::memcpy(block, bytes + buffers[i].at, buffers[i].bytes);
        blocks.push_back(static_cast<unsigned char *>(block));
        buffers[i].address = reinterpret_cast<std::uintptr_t>(block);
    }
    void *params = nullptr;
    if (posix_memalign(&params, 64, header.params_bytes)) fail(0, "no memory for the parameters");
    std::memcpy(params, bytes + header.params_at, header.params_bytes);
    for (std::uint32_t i = 0; i < header.relocations; ++i) {
        const Relocation &r = relocations[i];
        unsigned char *address = blocks[r.buffer] + r.offset;
        std::memcpy(static_cast<unsigned char *>(params) + r.field_at, &address, sizeof address);
    }
    for (std::uint32_t i = 0; i < header.launches; ++i) {
        const LaunchRecord &launch = launches[i];
        const Entry *entry = find_entry(launch.entry);
        if (entry->params_bytes != header.params_bytes) {
            fail(0, "the parameters of %s have %llu bytes in the source, %u were given", launch.entry,
                 entry->params_bytes, header.params_bytes);
        }
        status->launch = static_cast<int>(i);
        set_shared_size(launch.shared_bytes);
        header.shared_address = reinterpret_cast<std::uintptr_t>(shared_begin());
        run_launch({entry, params, {launch.grid[0], launch.grid[1], launch.grid[2]}, launch.block, launch.shared_bytes,
                    header.concurrent_ctas, header.seed});
    }
    for (std::uint32_t i = 0; i < header.buffers; ++i) std::memcpy(bytes + buffers[i].at, blocks[i], buffers[i].bytes);
    status->done = 1;
    std::_Exit(0);
}

}  // namespace
}  // namespace wph

int main(int count, char **arguments) {
    if (count != 2) wph::fail(0, "expected one argument, the request file");
    return wph::run(arguments[1]);
}

// Which instruction set's kernels run. A table instead of the linker's resolvers (ifunc), which
// run before the sanitizers are ready.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace fastclip {

#ifdef FASTCLIP_X86
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
#endif
namespace baseline {
extern const Kernels kernels;
}

namespace {

struct Usable {
    const Kernels* kernels[3] = {};
    const char* names[4] = {};
    int count = 0;

    void add(const Kernels& found) {
        names[count] = found.name;
        kernels[count++] = &found;
    }
    Usable() {
#ifdef FASTCLIP_X86
        __builtin_cpu_init();
        const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            add(avx512::kernels);
        if (fma) add(avx2::kernels);
#endif
        add(baseline::kernels);
    }
};

const Usable& usable() {
    static const Usable found;
    return found;
}

std::atomic<const Kernels*>& chosen() {
    static std::atomic<const Kernels*> found{usable().kernels[0]};
    return found;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

const char* instructions() { return kernels().name; }

const char* const* usable_instructions() { return usable().names; }

bool use_instructions(const char* name) {
    for (int i = 0; i < usable().count; ++i) {
        if (std::strcmp(usable().names[i], name)) continue;
        chosen() = usable().kernels[i];
        return true;
    }
    return false;
}

}  // namespace fastclip

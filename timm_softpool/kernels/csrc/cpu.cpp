// The C interface of the native CPU backend, which cpu.py calls by ctypes. Nothing of PyTorch or Python is needed to
// build it, so one library serves all their versions.
#include "geometry.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace baseline { extern const Kernels kernels; }
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
#endif

struct Isa {
    const char* name;
    const Kernels* kernels;
};

static Isa find_isa(const char* name) {
    (void)name;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    auto asked = [name](const char* isa) { return !*name || !strcmp(name, isa); };
    if (asked("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return {"avx512", &avx512::kernels};
    if ((asked("avx2") || asked("avx512")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return {"avx2", &avx2::kernels};
#endif
    return {"baseline", &baseline::kernels};
}

static Isa isa = find_isa("");

// Serve with the instruction set `name` ("" for the best), or the best below it that this processor has; its name.
EXPORT const char* soft_pool_set_isa(const char* name) {
    isa = find_isa(name);
    return isa.name;
}

EXPORT void soft_pool_run(const Call* call, int32_t dtype, int32_t layout) {
    auto& kernels = call->grad_output ? isa.kernels->backward : isa.kernels->forward;
    kernels[dtype][layout](*call);
}

// That cpu.py fills the same structure is checked by its size.
EXPORT int32_t soft_pool_call_size() { return sizeof(Call); }

// So that linkers that look for it find the init function of an extension module; the library is not one.
EXPORT void* PyInit__cpu() { return nullptr; }

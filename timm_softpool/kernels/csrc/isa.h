// The table of all kernels of one instruction set.
#pragma once
#include "pixels.h"
#include "planes.h"

namespace SOFT_POOL_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    {{forward_planes<float>, forward_pixels<float>},
     {forward_planes<double>, forward_pixels<double>},
     {forward_planes<Bfloat16>, forward_pixels<Bfloat16>},
     {forward_planes<Float16>, forward_pixels<Float16>}},
    {{backward_planes<float>, backward_pixels<float>},
     {backward_planes<double>, backward_pixels<double>},
     {backward_planes<Bfloat16>, backward_pixels<Bfloat16>},
     {backward_planes<Float16>, backward_pixels<Float16>}},
};

}  // namespace SOFT_POOL_ISA

// The kernels as they are, under the emulation: FASTCLIP_CUDA=EMULATED puts this in their place.
#define FASTCLIP_EMULATED
#include "cuda/epilogues.cu"
#include "cuda/finish.cu"

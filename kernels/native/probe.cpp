// The least that every kernel needs: the compiler, vectors and OpenMP. Whether kernels can be built here shows in a second.
#include <omp.h>

#include "tensor.h"

extern "C" int probe() { return omp_get_max_threads(); }

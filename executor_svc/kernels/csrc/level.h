/* The kernels for one instruction set. native.c includes this file once for each, with NAME(x), LANES (floats in a vector),
 * SPLAT(x) (a vector of one value) and ROWS (rows of a product that are computed together, as many as there are registers
 * for) defined. */
#include "vector.h"

#include "attention.h"
#include "product.h"
#include "packed.h"
#include "rows.h"
#include "choose.h"

#include "experts.h"

#undef vf
#undef vu
#undef vi
#undef vh
#undef LOAD
#undef STORE
#undef VECTORS

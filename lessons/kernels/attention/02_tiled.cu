// attention 2: one kernel, with tiles in shared memory and an online softmax.
//
// The kernel is in cuda_cores.cuh, which the next rung shares. A tile of 32 keys is read from global memory once for 32
// queries; scores live in registers, and probabilities in shared memory for as long as a tile lasts.
//
// Moves: q, o and lse once; k and v, 256 bytes a key, once for every 32 queries, 8 bytes a lane.
//
// Last rung: the matrix of scores went through global memory five times and more, and k was read in pieces of 2 bytes.
//
// Gains: no (T, T) matrix is left, neither its traffic nor its memory.
//
// But: a row of the tile has 64 floats, twice the 32 banks of shared memory. So the lanes of a warp, who have a key
// each, all find theirs in the same banks, and are served one after the other.
//
// Promise: load sectors <= 0.02 x 01_naive
// Promise: store sectors <= 0.15 x 01_naive
// Promise: bank conflicts >= 1000

#include "cuda_cores.cuh"

extern "C" void attention(const fp16* q, const fp16* k, const fp16* v, fp16* o, float* lse, int B, int H, int T, int D,
                          float scale, cudaStream_t stream) {
  lessons::launch_tiled<lessons::kHeaddim>(q, k, v, o, lse, B, H, T, D, scale, stream);
}

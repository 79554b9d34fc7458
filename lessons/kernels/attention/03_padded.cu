// attention 3: four floats of padding after each row of a tile.
//
// Shared memory has 32 banks of 4 bytes, and serves a lane from each of them at a time. A row of 64 floats begins in
// bank 0 like all others. With 68 floats from row to row, row r begins in bank 4 * r % 32: eight lanes, who read 16
// bytes each, find theirs in all 32 banks, and eight is as many as 128 bytes can serve at a time.
//
// Moves: the same, 256 bytes a key for every 32 queries.
//
// Last rung: the eight lanes that could be served together were in the same four banks, and took eight turns.
//
// Gains: seven of these turns, for 16 bytes of each row.
//
// Promise: bank conflicts == 0
// Promise: bytes moved == 1 x 02_tiled

#include "cuda_cores.cuh"

extern "C" void attention(const fp16* q, const fp16* k, const fp16* v, fp16* o, float* lse, int B, int H, int T, int D,
                          float scale, cudaStream_t stream) {
  lessons::launch_tiled<lessons::kHeaddim + 4>(q, k, v, o, lse, B, H, T, D, scale, stream);
}

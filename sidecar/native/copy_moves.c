/* Pieces of mapped memory copied in one call, without the interpreter's lock: two threads share a transfer, and a piece
 * costs what its bytes cost. See sidecar/copy_library.py. */
#include <stdint.h>
#include <string.h>

/* Move i is `lengths[i]` bytes from `from_base + from[i]` to `to_base + to[i]`. No two destinations overlap, nor a
 * destination and a source. What the caller reads before and after, such as a lease's mark, is read before and after
 * the copy: not every processor does that unasked. */
void copy_moves(char *to_base, const int64_t *to, const char *from_base, const int64_t *from, const int64_t *lengths,
                int64_t num)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    for (int64_t i = 0; i < num; i++)
        memcpy(to_base + to[i], from_base + from[i], (size_t)lengths[i]);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

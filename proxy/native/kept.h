/* What was passed on of streams, in blocks of one size: they leave no holes, and those that are idle give their pages
 * back. The heap would do neither. */
#ifndef KEPT_H
#define KEPT_H

#include <stdint.h>

enum { BLOCK_BYTES = 8192 }; /* whole pages */

struct block {
    struct block *next;
    uint64_t size;
    char bytes[BLOCK_BYTES - 16];
};

/* Add `data` to the blocks that begin with `*first` and end with `*last`. -1 without memory: less of it was added. */
int keep(struct block **first, struct block **last, const char *data, uint64_t size);

/* `block` and all that follow it are free. By any thread. */
void relay_forget(struct block *block);

#endif

#define _GNU_SOURCE
#include "kept.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum {
    SLAB_BLOCKS = 128,
    MAX_WARM_BLOCKS = 256, /* that keep their pages while nobody uses them */
};

/* `idle` is a stack with room for all blocks there are; the `num_warm` on top of it have their pages. */
static struct {
    pthread_mutex_t lock;
    struct block **idle;
    uint64_t num_idle, num_warm, num_blocks;
} blocks = {.lock = PTHREAD_MUTEX_INITIALIZER};

static int add_slab(void)
{
    uint64_t num = blocks.num_blocks + SLAB_BLOCKS;
    struct block **idle = realloc(blocks.idle, num * sizeof *idle);
    if (!idle) return -1;
    blocks.idle = idle;
    char *slab = mmap(0, SLAB_BLOCKS * BLOCK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (slab == MAP_FAILED) return -1;
    blocks.num_blocks = num;
    for (int i = SLAB_BLOCKS; i-- > 0;) idle[blocks.num_idle++] = (struct block *)(slab + i * BLOCK_BYTES);
    return 0;
}

static struct block *new_block(void)
{
    struct block *block = 0;
    pthread_mutex_lock(&blocks.lock);
    if (blocks.num_idle || !add_slab()) {
        block = blocks.idle[--blocks.num_idle];
        if (blocks.num_warm) blocks.num_warm--;
    }
    pthread_mutex_unlock(&blocks.lock);
    if (block) {
        block->next = 0;
        block->size = 0;
    }
    return block;
}

int keep(struct block **first, struct block **last, const char *data, uint64_t size)
{
    while (size) {
        if (!*first || (*last)->size == sizeof (*last)->bytes) {
            struct block *block = new_block();
            if (!block) return -1;
            *(*first ? &(*last)->next : first) = block;
            *last = block;
        }
        struct block *block = *last;
        uint64_t fits = sizeof block->bytes - block->size;
        if (fits > size) fits = size;
        memcpy(block->bytes + block->size, data, fits);
        block->size += fits;
        data += fits;
        size -= fits;
    }
    return 0;
}

void relay_forget(struct block *block)
{
    pthread_mutex_lock(&blocks.lock);
    for (struct block *next; block; block = next) {
        next = block->next;
        blocks.idle[blocks.num_idle++] = block;
        if (blocks.num_warm < MAX_WARM_BLOCKS)
            blocks.num_warm++;
        else /* the one that was idle longest */
            madvise(blocks.idle[blocks.num_idle - 1 - blocks.num_warm], BLOCK_BYTES, MADV_DONTNEED);
    }
    pthread_mutex_unlock(&blocks.lock);
}

/* HTTP/1.1 chunks (RFC 9112 section 7.1), the strict part of them. */
#ifndef FRAMING_H
#define FRAMING_H

#include <stdint.h>

/* The size in bytes of the whole chunk that `data` begins with; 0 if more must come first, -1 if it is not one that is
 * passed on: bad framing, an extension, the last one, more than `most`. */
int64_t whole_chunk(const char *data, uint64_t size, uint64_t most);

#endif

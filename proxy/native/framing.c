#include "framing.h"

enum { MAX_SIZE_DIGITS = 6 };

int64_t whole_chunk(const char *data, uint64_t size, uint64_t most)
{
    uint64_t length = 0, digits = 0;
    for (; digits < size; digits++) {
        char c = data[digits];
        int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10
                  : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
        if (digit < 0) break;
        if (digits == MAX_SIZE_DIGITS) return -1;
        length = length * 16 + digit;
    }
    if (digits == size) return 0;
    if (!digits || data[digits] != '\r') return -1;
    if (digits + 1 == size) return 0;
    if (data[digits + 1] != '\n' || !length) return -1;
    uint64_t whole = digits + 2 + length + 2;
    if (whole > most) return -1;
    if (whole > size) return 0;
    return data[whole - 2] == '\r' && data[whole - 1] == '\n' ? (int64_t)whole : -1;
}

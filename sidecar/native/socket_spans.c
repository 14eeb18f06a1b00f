/* Many spans of mapped memory to and from a blocking socket in one call, without the interpreter's lock. Thousands of
 * steps of Python between the calls to the kernel would leave the other end waiting. See transport/tcp_spans.py. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define MAX_VIEWS 256
/* A call to the kernel sends this much, and takes less: the window opens with each call that took something. */
#define SEND_BYTES (1u << 20)
#define RECEIVE_BYTES (1u << 18)

enum { ENDED = -1, STOPPED = -2 }; /* beside 0 and the values of errno, which are positive */

/* As a request on the wire has it. */
struct span {
    uint64_t offset;
    uint64_t bytes;
};

/* What is still to be moved: spans from `next` on, `done` bytes of the first one being moved already. */
struct rest {
    const struct span *next;
    int64_t num;
    uint64_t done;
};

static int next_views(struct rest rest, char *base, size_t room, struct iovec *views, int max_views)
{
    int num = 0;
    for (; rest.num && room && num < max_views; rest.next++, rest.num--, rest.done = 0) {
        uint64_t left = rest.next->bytes - rest.done;
        size_t bytes = left < room ? (size_t)left : room;
        views[num].iov_base = base + rest.next->offset + rest.done;
        views[num++].iov_len = bytes;
        room -= bytes;
    }
    return num;
}

static void advance(struct rest *rest, size_t bytes)
{
    while (bytes) {
        uint64_t left = rest->next->bytes - rest->done;
        if (bytes < left) {
            rest->done += bytes;
            return;
        }
        bytes -= (size_t)left;
        rest->next++;
        rest->num--;
        rest->done = 0;
    }
}

/* The sum of the spans' bytes; -1 if one is empty or leaves a pool of `pool_bytes`. */
int64_t total_bytes(const struct span *spans, int64_t num, uint64_t pool_bytes)
{
    uint64_t total = 0;
    for (int64_t i = 0; i < num; i++) {
        if (!spans[i].bytes || spans[i].bytes > pool_bytes || spans[i].offset > pool_bytes - spans[i].bytes)
            return -1;
        if (__builtin_add_overflow(total, spans[i].bytes, &total) || total > INT64_MAX)
            return -1;
    }
    return (int64_t)total;
}

/* Send `head` and then the spans, which total_bytes has let through; 0 or errno. */
int send_spans(int sock, char *head, size_t head_bytes, char *base, const struct span *spans, int64_t num)
{
    struct rest rest = {spans, num, 0};
    struct iovec views[MAX_VIEWS + 1];
    while (head_bytes || rest.num) {
        views[0] = (struct iovec){head, head_bytes};
        int first = head_bytes ? 0 : 1;
        struct msghdr message = {
            .msg_iov = views + first,
            .msg_iovlen = (size_t)(1 - first + next_views(rest, base, SEND_BYTES, views + 1, MAX_VIEWS)),
        };
        ssize_t sent = sendmsg(sock, &message, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR)
                continue;
            return errno;
        }
        size_t of_head = (size_t)sent < head_bytes ? (size_t)sent : head_bytes;
        head += of_head;
        head_bytes -= of_head;
        advance(&rest, (size_t)sent - of_head);
    }
    return 0;
}

/* Receive into the spans until they are full or `stopped` is not 0; 0, errno, ENDED or STOPPED. */
int receive_spans(int sock, char *base, const struct span *spans, int64_t num, const int32_t *stopped)
{
    struct rest rest = {spans, num, 0};
    struct iovec views[MAX_VIEWS];
    while (rest.num) {
        if (__atomic_load_n(stopped, __ATOMIC_RELAXED))
            return STOPPED;
        struct msghdr message = {
            .msg_iov = views,
            .msg_iovlen = (size_t)next_views(rest, base, RECEIVE_BYTES, views, MAX_VIEWS),
        };
        ssize_t got = recvmsg(sock, &message, MSG_WAITALL);
        if (got == 0)
            return ENDED;
        if (got < 0) {
            if (errno == EINTR)
                continue;
            return errno;
        }
        advance(&rest, (size_t)got);
    }
    return 0;
}
